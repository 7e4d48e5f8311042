"""Moshi's `LMModel` behind the call that TRL's `DPOTrainer` makes: tokens in, their log-probabilities out."""

from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.models.lm_utils import _delay_sequence
from torch import nn
from trl.trainer.utils import FusedCausalLMOutput

from envs.errors import InputError
from rlhf_duplex.algorithms.objectives import Objective
from rlhf_duplex.policy.codec import agent_codebooks
from rlhf_duplex.warmstart.config import LossConfig
from rlhf_duplex.warmstart.data import StreamIds


def stream_ids(lm: LMModel, streams: str) -> StreamIds:
    """Which rows of a frame a loss on `text`, `semantic` or `audio` streams is about."""
    count = {"text": 0, "semantic": 1, "audio": agent_codebooks(lm.n_q, lm.dep_q)}[streams]
    return StreamIds(
        tuple(range(1 + count)), (lm.text_padding_token_id, lm.end_of_text_padding_id), int(lm.zero_token_id)
    )


def make_objective(lm: LMModel, loss: LossConfig) -> Objective:
    """The objective of a configuration, with this model's tokens."""
    return Objective(loss.objective, lm.text_padding_token_id, lm.end_of_text_padding_id, loss.onset_frames)


class PairModel(nn.Module):
    """Log-probabilities of a reply's tokens given everything before them: pi(T^y | x, A^y, A'^y), teacher-forced.

    Args:
        lm: is trained in place.
        streams: `text`, `semantic` or `audio`. With `text` the depth transformer is not run.
        objective: what of a text token is learned; None: the token.

    Raises:
        InputError: the model has a delayed text stream.
    """

    def __init__(self, lm: LMModel, streams: str = "text", objective: Objective | None = None) -> None:
        super().__init__()
        self.objective = objective or Objective()
        if lm.delays[0] != 0:
            raise InputError(f"the text stream of this model is delayed by {lm.delays[0]} frames, 0 is needed")
        self.lm = lm
        self.targets = stream_ids(lm, streams).targets

    def forward(
        self, codes: torch.Tensor, input_ids: torch.Tensor, loss_mask: torch.Tensor, **_: Any
    ) -> FusedCausalLMOutput:
        """Shapes as in `rlhf_duplex.warmstart.data.PairCollator`; every field is `(2P, N)` and 0 outside the mask.

        `log_probs` alone has a gradient. `entropy`, `mean_logits` and `is_top1` are what TRL logs.
        """
        frames = codes.shape[-1]
        labels, masks = input_ids[:, 1:].split(frames, dim=1), loss_mask.split(frames, dim=1)
        parts = [
            _token_statistics(logits, label, mask, self.objective if stream == 0 else Objective())
            for stream, (logits, label, mask) in enumerate(zip(self._logits(codes), labels, masks, strict=True))
        ]
        log_probs, entropy, mean_logits, is_top1 = (torch.cat(field, dim=1) for field in zip(*parts, strict=True))
        return FusedCausalLMOutput(
            log_probs=log_probs, entropy=entropy, mean_logits=mean_logits, is_top1=is_top1, label_mask=loss_mask
        )

    def _logits(self, codes: torch.Tensor) -> list[torch.Tensor]:
        """`(2P, T, V)` of each target stream."""
        if len(self.targets) == 1:
            return [self._text_logits(codes)]
        # A stream delayed by d has no logits in the last d frames: frames that do not exist are put behind.
        frames = codes.shape[-1]
        output = self.lm(nn.functional.pad(codes, (0, max(self.lm.delays)), value=int(self.lm.zero_token_id)))
        audio = output.logits[..., :frames, :]
        return [output.text_logits[:, 0, :frames], *(audio[:, row - 1] for row in self.targets[1:])]

    def _text_logits(self, codes: torch.Tensor) -> torch.Tensor:
        """As `LMModel.forward`, without its depth transformer. Moshi's own modules are called, which sharding needs."""
        initial = self.lm._get_initial_token().expand(len(codes), -1, -1)
        delayed = torch.cat([initial, _delay_sequence(self.lm.delays, codes, initial)], dim=2)
        return self.lm.forward_text(delayed[:, :, :-1])[1][:, 0]

    # What transformers and TRL ask of a model that can recompute its activations.
    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.lm.transformer.checkpointing)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        self._checkpoint(True)

    def gradient_checkpointing_disable(self) -> None:
        self._checkpoint(False)

    def _checkpoint(self, on: bool) -> None:
        self.lm.transformer.checkpointing = on
        if self.lm.depformer is not None:
            self.lm.depformer.checkpointing = on


def _token_statistics(
    logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability, entropy, mean logit and whether it is the likeliest, `(B, T)` each, of logits `(B, T, V)`.

    Moshi's logits are NaN where a delayed stream has no valid position: replaced before the softmax, since NaN times 0
    is NaN, in the gradient as well.
    """
    logits = torch.where(mask[..., None], logits.float(), torch.zeros((), device=logits.device))
    log_distribution = torch.log_softmax(logits, dim=-1)
    log_probs = objective.log_probs(log_distribution, labels)
    with torch.no_grad():
        entropy = -(log_distribution.exp() * log_distribution).sum(dim=-1)
        mean_logits, is_top1 = logits.mean(dim=-1), logits.argmax(dim=-1) == labels
    nothing = torch.zeros((), device=logits.device)
    return torch.where(mask, log_probs, nothing), torch.where(mask, entropy, nothing), mean_logits, is_top1 & mask
