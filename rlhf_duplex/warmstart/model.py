"""Moshi's `LMModel` behind the call that TRL's `DPOTrainer` makes: tokens in, their log-probabilities out."""

from dataclasses import dataclass
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


@dataclass
class PairOutput(FusedCausalLMOutput):
    """With `sft`, the mean negative log-likelihood of the chosen replies, a scalar; None where nobody asked."""

    sft: torch.Tensor | None = None


class PairModel(nn.Module):
    """Log-probabilities of a reply's tokens given everything before them: pi(T^y | x, A^y, A'^y), teacher-forced.

    Args:
        lm: is trained in place.
        streams: `text`, `semantic` or `audio`. Where only text is asked for the depth transformer is not run.
        prompt: `(K, P)` columns that every dialogue begins with and no loss is about; None for none.
        objective: what of a text token is learned; None: the token.
        sft_streams: of the likelihood of the chosen replies; None: it is not asked for.

    Raises:
        InputError: the model has a delayed text stream.
    """

    def __init__(
        self,
        lm: LMModel,
        streams: str = "text",
        objective: Objective | None = None,
        prompt: torch.Tensor | None = None,
        sft_streams: str | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective or Objective()
        if lm.delays[0] != 0:
            raise InputError(f"the text stream of this model is delayed by {lm.delays[0]} frames, 0 is needed")
        self.lm = lm
        self.targets = stream_ids(lm, streams).targets
        self.sft_targets = stream_ids(lm, sft_streams).targets if sft_streams else ()
        self._prompt = None if prompt is None else prompt.to(lm.device)

    def forward(
        self,
        codes: torch.Tensor,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        reply_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> PairOutput:
        """Shapes as in `rlhf_duplex.warmstart.data.PairCollator`; fields are `(2P, N)` and 0 outside the mask.

        `log_probs` and `sft` alone have a gradient. `entropy`, `mean_logits` and `is_top1` are what TRL logs.
        """
        frames = codes.shape[-1]
        labels, masks = input_ids[:, 1:].split(frames, dim=1), loss_mask.split(frames, dim=1)
        logits = self._logits(codes)
        parts = [
            _token_statistics(row, label, mask, self.objective if stream == 0 else Objective())
            for stream, (row, label, mask) in enumerate(zip(logits[: len(self.targets)], labels, masks, strict=True))
        ]
        log_probs, entropy, mean_logits, is_top1 = (torch.cat(field, dim=1) for field in zip(*parts, strict=True))
        return PairOutput(
            log_probs=log_probs,
            entropy=entropy,
            mean_logits=mean_logits,
            is_top1=is_top1,
            label_mask=loss_mask,
            sft=self._sft(logits, codes, reply_mask) if self.sft_targets and reply_mask is not None else None,
        )

    def _sft(self, logits: list[torch.Tensor], codes: torch.Tensor, reply_mask: torch.Tensor) -> torch.Tensor:
        """Mean over streams and pairs of the mean over the tokens of a chosen reply."""
        pairs = len(codes) // 2
        found = []
        for row in self.sft_targets:
            inside = reply_mask[:pairs] & (codes[:pairs, row] >= 0)
            label = codes[:pairs, row].masked_fill(~inside, -100)
            # NaN where a delayed stream has no valid position, see `_token_statistics`.
            valid = torch.where(inside[..., None], logits[row][:pairs].float(), torch.zeros((), device=codes.device))
            losses = nn.functional.cross_entropy(valid.transpose(1, 2), label, reduction="none")  # 0 where -100
            found.append((losses.sum(dim=1) / inside.sum(dim=1).clamp(min=1)).mean())
        return torch.stack(found).mean()

    def _logits(self, codes: torch.Tensor) -> list[torch.Tensor]:
        """`(2P, T, V)` of each stream that is asked for, text first."""
        targets = max(self.targets, self.sft_targets, key=len)
        before = 0
        if self._prompt is not None:
            before = self._prompt.shape[1]
            codes = torch.cat([self._prompt.expand(len(codes), -1, -1), codes], dim=-1)
        if len(targets) == 1:
            return [self._text_logits(codes)[:, before:]]
        # A stream delayed by d has no logits in the last d frames: frames that do not exist are put behind.
        frames = codes.shape[-1]
        output = self.lm(nn.functional.pad(codes, (0, max(self.lm.delays)), value=int(self.lm.zero_token_id)))
        audio = output.logits[..., before:frames, :]
        return [output.text_logits[:, 0, before:frames], *(audio[:, row - 1] for row in targets[1:])]

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
