"""The Moshi policy: acting frame by frame in B dialogues, and scoring whole episodes in parallel.

Shapes: `B` episodes, `T` frames, `K` streams of a frame (text, agent's codebooks, user's codebooks), `V` text
vocabulary. Frame n of an episode is step n of `moshi`'s own `LMGen`: the user's frame n goes in, text token n and the
depth transformer's codes come out, and what is complete by then (frame n - max_delay) is what is heard.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel
from moshi.models.lm_utils import _delay_sequence

from envs.errors import InputError
from rlhf_duplex.policy.codec import agent_codebooks
from rlhf_duplex.policy.frame import FrameStep
from rlhf_duplex.policy.sampling import Sampling, draw, log_distribution, uniforms
from rlhf_duplex.policy.transformer import PlainTransformer, plain_norm


@dataclass
class _Stream:
    """What lasts from frame to frame of a batch of dialogues."""

    step: FrameStep
    going: list[int]  # at each frame, how many rows are computed
    grid: torch.Tensor  # (K, positions, B) tokens by the position at which they are model input
    nothing: torch.Tensor  # (1 + agent_codebooks,) the action before anything is complete
    noise: torch.Tensor  # (T, 1 + depth steps, B)
    log_probs: torch.Tensor  # (T, B)
    frame: int = 0


@dataclass(frozen=True)
class Trajectory:
    """The tokens of B dialogues as `LMModel.forward` takes them.

    Attributes:
        codes: `(B, K, T)` int64; -1 where a token never came to be.
        log_probs: `(B, T)` float32, of each text token under the distribution that it was drawn from.
    """

    codes: torch.Tensor
    log_probs: torch.Tensor


class MoshiPolicy:
    """Acts with an `LMModel`, and evaluates what was done.

    Args:
        lm: Moshi's language model, of any size.
        sampling: how tokens are drawn; `evaluate_actions` scores under the same transform.

    Raises:
        InputError: a model whose text stream is delayed (no Moshi has one; frames would not line up).
    """

    def __init__(self, lm: LMModel, sampling: Sampling | None = None) -> None:
        if lm.delays[0] != 0:
            raise InputError(f"the text stream of this model is delayed by {lm.delays[0]} frames, 0 is needed")
        self.lm = lm
        self.sampling = sampling or Sampling()
        self.agent_codebooks = agent_codebooks(lm.n_q, lm.dep_q)
        self.max_delay = max(lm.delays)
        self._delays = torch.tensor(lm.delays, device=lm.device)
        streams = torch.arange(lm.n_q + 1, device=lm.device)
        self._agent, self._user = streams[: 1 + self.agent_codebooks], streams[1 + self.agent_codebooks :]
        self._stream: _Stream | None = None

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @torch.no_grad()
    def begin(self, seeds: Sequence[int], frames: int | Sequence[int]) -> None:
        """Start B = len(seeds) dialogues with fresh caches, which hold as many positions as the longest has frames.

        Args:
            seeds: of each dialogue.
            frames: how many each dialogue will have, or one number for all. A dialogue that has ended, and all after
                it have too, costs nothing more: put long ones first.
        """
        self.end()
        lm, batch = self.lm, len(seeds)
        if lm.training:
            lm.eval()
        lengths = [frames] * batch if isinstance(frames, int) else list(frames)
        longest = max(lengths)
        # Dialogues that go on at each frame: up to the last one that does.
        going = [1 + max(row for row in range(batch) if lengths[row] > frame) for frame in range(longest)]
        streams = 1 + lm.n_q
        grid = torch.full((streams, longest + self.max_delay + 1, batch), lm.zero_token_id, device=self.device)
        initial = lm._get_initial_token()[0, :, 0]
        for stream, delay in enumerate(lm.delays):
            grid[stream, : delay + 1] = initial[stream, None, None]
        self._stream = _Stream(
            FrameStep(lm, batch, longest),
            going,
            grid,
            initial[self._agent],
            uniforms(list(seeds), longest, 1 + self.agent_codebooks, self.device),
            torch.zeros(longest, batch, device=self.device),
        )

    @torch.no_grad()
    def prefill(self, codes: torch.Tensor) -> None:
        """Put what was already said into dialogues that were just begun, so that `act` goes on from there.

        All frames go through the model at once. The delayed codes of the last column are drawn anew by the first
        `act`, as it draws them for a column of its own.

        Args:
            codes: `(B, K, n)` as in `Trajectory.codes`, n at least 1 and less than the frames begun for.

        Raises:
            RuntimeError: `begin` was not called, frames were already played, or there are too many.
        """
        stream, frames = self._stream, codes.shape[2]
        if stream is None or stream.frame > 0:
            raise RuntimeError("a dialogue can be prefilled only right after begin")
        if not 0 < frames < len(stream.noise):
            raise RuntimeError(f"the dialogue was begun for {len(stream.noise)} frames, {frames} cannot be prefilled")
        for index, delay in enumerate(self.lm.delays):
            stream.grid[index, delay + 1 : delay + 1 + frames] = codes[:, index].T
        stream.step.prefill(stream.grid[:, :frames])
        stream.frame = frames

    def end(self) -> None:
        """Free the caches."""
        self._stream = None

    @torch.no_grad()
    def act(self, user_codes: torch.Tensor) -> torch.Tensor:
        """One frame of every dialogue.

        Args:
            user_codes: `(B, user_codebooks)` of this frame.

        Returns:
            `(B, 1 + agent_codebooks)`: text token and audio codes that are heard in this frame; in the first
            `max_delay` frames nothing is complete yet, and the values are the model's initial tokens, as they are
            for a dialogue that has ended.

        Raises:
            RuntimeError: `begin` was not called, or the frames that it was told of are used up.
        """
        stream = self._stream
        if stream is None:
            raise RuntimeError("the policy is not in a dialogue: call begin first")
        frame, grid = stream.frame, stream.grid
        if frame >= len(stream.noise):
            raise RuntimeError(f"the dialogue was begun for {len(stream.noise)} frames, which are used up")
        count = stream.going[frame]
        if frame > 0:  # the first user frame is never model input: the initial tokens are, as in LMGen
            grid[self._user, frame + self._delays[self._user], :count] = user_codes[:count].T
        hidden, logits = stream.step.text(grid[:, frame, :count], frame)
        noise = stream.noise[frame, :, :count]
        text = draw(logits, noise[0], self.sampling.text_temperature, self.sampling.text_top_k)
        distribution = log_distribution(logits, self.sampling.text_temperature, self.sampling.text_top_k)
        stream.log_probs[frame, :count] = distribution.gather(-1, text[:, None])[:, 0]
        tokens = torch.stack([text, *self._draw_audio(stream.step, text, hidden, noise[1:])])
        # A stream delayed by d frames is preceded by d + 1 initial tokens: what is drawn there is dropped.
        drawn = self._agent if frame >= self.max_delay else self._agent[self._delays[self._agent] <= frame]
        grid[drawn, frame + 1, :count] = tokens[drawn]
        stream.frame = frame + 1
        heard = frame + 1 - self.max_delay
        if heard <= 0:
            return stream.nothing.expand(grid.shape[2], -1)
        actions = grid[self._agent, heard + self._delays[self._agent]].T
        return torch.where(actions < 0, stream.nothing, actions)  # dialogues that have ended

    def _draw_audio(
        self, step: FrameStep, text: torch.Tensor, hidden: torch.Tensor, noise: torch.Tensor
    ) -> list[torch.Tensor]:
        """The agent's codes, `agent_codebooks` times `(n,)`, of one frame, codebook by codebook.

        A model that predicts the user's streams too (PersonaPlex) is stopped after the agent's.
        """
        projected, codes, previous = step.project(hidden), [], text
        for codebook in range(self.agent_codebooks):
            logits = step.audio(codebook, previous, projected)
            previous = draw(logits, noise[codebook], self.sampling.audio_temperature, self.sampling.audio_top_k)
            codes.append(previous)
        return codes

    def trajectory(self) -> Trajectory:
        """What was done so far in the dialogues that are under way."""
        if self._stream is None:
            raise RuntimeError("the policy is not in a dialogue: call begin first")
        frames, grid = self._stream.frame, self._stream.grid
        positions = grid[:, : frames + 1]
        codes = torch.full((grid.shape[0], frames, grid.shape[2]), self.lm.zero_token_id, device=self.device)
        for stream_index, delay in enumerate(self.lm.delays):
            codes[stream_index, : frames - delay] = positions[stream_index, delay + 1 :]
        return Trajectory(codes.permute(2, 0, 1).contiguous(), self._stream.log_probs[:frames].T.contiguous())

    def text_logits(self, codes: torch.Tensor) -> torch.Tensor:
        """Teacher-forced text logits `(B, T, V)` for codes `(B, K, T)`; the depth transformer is not run.

        Equals `LMModel.forward(codes).text_logits[:, 0]` (tested).
        """
        return self.forward(codes)[1]

    def forward(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The temporal transformer's output `(B, T, D)` before each frame's token is drawn, and the text logits."""
        lm = self.lm
        initial = lm._get_initial_token().expand(len(codes), -1, -1)
        delayed = torch.cat([initial, _delay_sequence(lm.delays, codes, initial)], dim=2)
        tokens = delayed[:, :, :-1]
        # As in `LMModel.forward_text`: audio first, then text.
        inputs = lm.emb[0](tokens[:, 1])
        for stream, table in enumerate(lm.emb[1:], start=2):
            inputs = inputs + table(tokens[:, stream])
        hidden = PlainTransformer(lm.transformer, tokens.shape[-1]).whole(inputs + lm.text_emb(tokens[:, 0]))
        hidden = plain_norm(lm.out_norm)(hidden)
        return hidden, lm.text_linear(hidden)

    def evaluate_actions(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the text tokens of whole episodes, under the same transform as when acting.

        Args:
            codes: `(B, K, T)` as in `Trajectory.codes`, padded at the end with -1.

        Returns:
            `(B, T)` log-probability of each text token (of token 0 where the text is -1: mask it), and `(B, T, V)`
            the whole log-distribution, for KL and entropy.
        """
        return self.evaluate(codes)[1:]

    def evaluate(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `evaluate_actions`, and before it the temporal transformer's output `(B, T, D)`, for a value function."""
        text = codes[:, 0].clamp(min=0)
        hidden, logits = self.forward(codes)
        distribution = log_distribution(logits, self.sampling.text_temperature, self.sampling.text_top_k, keep=text)
        return hidden, distribution.gather(-1, text[..., None])[..., 0], distribution
