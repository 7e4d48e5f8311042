"""The Moshi policy: acting frame by frame in B dialogues, and scoring whole episodes in parallel.

Shapes: `B` episodes, `T` frames, `K` streams of a frame (text, agent's codebooks, user's codebooks), `V` text
vocabulary. Frame n of an episode is step n of `moshi`'s own `LMGen`: the user's frame n goes in, text token n and the
depth transformer's codes come out, and what is complete by then (frame n - max_delay) is what is heard.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.models.lm_utils import _delay_sequence

from envs.errors import InputError
from rlhf_duplex.policy.codec import agent_codebooks
from rlhf_duplex.policy.frame import FrameStep
from rlhf_duplex.policy.graphs import Graphed, shared_pool
from rlhf_duplex.policy.sampling import Sampling, draw, log_distribution, uniforms
from rlhf_duplex.policy.transformer import PlainTransformer, plain_norm

# Positions that a CUDA graph of a frame is good for: each recording costs time, each masked position bandwidth.
SEEN_TOGETHER = 128


@dataclass
class _Stream:
    """What lasts from frame to frame of a batch of dialogues."""

    step: FrameStep
    going: list[int]  # at each frame, how many rows are computed
    grid: torch.Tensor  # (K, positions, B) tokens by the position at which they are model input
    nothing: torch.Tensor  # (1 + agent_codebooks,) the action before anything is complete
    noise: torch.Tensor  # (T, 1 + depth steps, B)
    log_probs: torch.Tensor  # (T, B)
    user: torch.Tensor  # (B, user_codebooks) of the frame that is computed
    clock: torch.Tensor  # (1,) number of that frame, on the device
    graphs: dict[tuple[int, int], Graphed[torch.Tensor]]  # of a frame, by rows and positions that are read
    pool: Any  # memory of the graphs
    frames: int  # that were begun for
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
        prompt: `(K, P)` columns that precede every dialogue and count as none of its frames
            (`rlhf_duplex.policy.prompt`); None for none.
        fixed: compute frames in shapes that do not change, with nothing read back to the host, as CUDA graphs of them
            need; None: where the model is on a GPU. Dialogues that have ended are then computed on until half of the
            rows have; what they do is to be dropped.

    Raises:
        InputError: a model whose text stream is delayed (no Moshi has one; frames would not line up).
    """

    def __init__(
        self,
        lm: LMModel,
        sampling: Sampling | None = None,
        prompt: torch.Tensor | None = None,
        fixed: bool | None = None,
    ) -> None:
        if lm.delays[0] != 0:
            raise InputError(f"the text stream of this model is delayed by {lm.delays[0]} frames, 0 is needed")
        self.lm = lm
        self.sampling = sampling or Sampling()
        self.agent_codebooks = agent_codebooks(lm.n_q, lm.dep_q)
        self.max_delay = max(lm.delays)
        self._delays = torch.tensor(lm.delays, device=lm.device)
        streams = torch.arange(lm.n_q + 1, device=lm.device)
        self._agent, self._user = streams[: 1 + self.agent_codebooks], streams[1 + self.agent_codebooks :]
        # A stream delayed by d frames is preceded by d + 1 initial tokens (or those of the prompt): what is drawn there
        # is dropped. By frame, the streams that are not.
        delays = lm.delays[: 1 + self.agent_codebooks]
        self._early = [
            torch.tensor([stream for stream, delay in enumerate(delays) if delay <= frame], device=lm.device)
            for frame in range(self.max_delay)
        ]
        self.prompt = None if prompt is None or not prompt.shape[1] else prompt.to(lm.device)
        self._before = 0 if self.prompt is None else self.prompt.shape[1]
        self.fixed = lm.device.type == "cuda" if fixed is None else fixed
        self._stream: _Stream | None = None
        self._kept: _Stream | None = None  # of dialogues that have ended, for the next ones

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
        if self._stream is not None:
            self.end()
        lm, batch = self.lm, len(seeds)
        if lm.training:
            lm.eval()
        lengths = [frames] * batch if isinstance(frames, int) else list(frames)
        longest = max(lengths)
        # Dialogues that go on at each frame: up to the last one that does.
        going = [1 + max(row for row in range(batch) if lengths[row] > frame) for frame in range(longest)]
        stream, self._kept = self._kept, None
        if stream is not None and (stream.noise.shape[0] < longest or stream.noise.shape[2] != batch):
            stream.graphs.clear()
            stream = None  # freed before as much is taken again
        if stream is None:
            stream = self._room(batch, longest)
        stream.going, stream.frames, stream.frame = going, longest, 0
        initial = lm._get_initial_token()[0, :, 0]
        stream.grid.fill_(lm.zero_token_id)
        for index, delay in enumerate(lm.delays):
            stream.grid[index, : delay + 1] = initial[index]
            if self.prompt is not None:
                stream.grid[index, delay + 1 : delay + 1 + self._before] = self.prompt[index, :, None]
        if self.prompt is not None:
            stream.step.prefill(stream.grid[:, : self._before, :1])
        stream.noise[:longest] = uniforms(list(seeds), longest, 1 + self.agent_codebooks, self.device)
        stream.log_probs.zero_()
        self._stream = stream

    def _room(self, batch: int, frames: int) -> _Stream:
        """Caches and buffers for B dialogues of at most so many frames."""
        lm, device = self.lm, self.device
        if self.fixed:
            frames = -(-(self._before + frames) // 8) * 8 - self._before  # what attention's kernels like
        positions = self._before + frames
        return _Stream(
            FrameStep(lm, batch, positions),
            [],
            torch.zeros(1 + lm.n_q, positions + self.max_delay + 1, batch, dtype=torch.long, device=device),
            lm._get_initial_token()[0, self._agent, 0],
            torch.zeros(frames, 1 + self.agent_codebooks, batch, device=device),
            torch.zeros(frames, batch, device=device),
            torch.zeros(batch, len(self._user), dtype=torch.long, device=device),
            torch.zeros(1, dtype=torch.long, device=device),
            {},
            shared_pool(device),
            frames,
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
        if not 0 < frames < stream.frames:
            raise RuntimeError(f"the dialogue was begun for {stream.frames} frames, {frames} cannot be prefilled")
        for index, delay in enumerate(self.lm.delays):
            first = self._before + delay + 1
            stream.grid[index, first : first + frames] = codes[:, index].T
        stream.step.prefill(stream.grid[:, : self._before + frames])
        stream.frame = frames

    def end(self, keep: bool = False) -> None:
        """Free the caches; `keep` holds them, and the graphs on them, for as many dialogues that are begun next.

        A model whose weights were changed meanwhile needs new ones: call `end()` before.
        """
        for stream in (self._kept, self._stream):
            if stream is not None and not (keep and stream is self._stream):
                stream.graphs.clear()  # they refer to the stream, which would outlast them
        self._kept, self._stream = (self._stream if keep else None), None

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
        frame = stream.frame
        if frame >= stream.frames:
            raise RuntimeError(f"the dialogue was begun for {stream.frames} frames, which are used up")
        stream.frame = frame + 1
        stream.user.copy_(user_codes)
        count = stream.going[frame]
        if not self.fixed or frame < max(1, self.max_delay):
            self._compute(stream, frame, len(stream.user) if self.fixed else count)
            heard = self._before + frame + 1 - self.max_delay
            if frame < self.max_delay:
                return stream.nothing.expand(len(stream.user), -1)
            return self._heard(stream, heard)
        # A few shapes for all frames: rows halved, positions in steps.
        rows = len(stream.user)
        while (rows + 1) // 2 >= count and rows > 1:
            rows = (rows + 1) // 2
        positions = self._before + stream.noise.shape[0]
        seen = min(positions, -(-(self._before + frame + 1) // SEEN_TOGETHER) * SEEN_TOGETHER)
        if (rows, seen) not in stream.graphs:

            def whole_frame() -> torch.Tensor:
                self._compute(stream, stream.clock, rows, seen)
                return self._heard(stream, self._before + stream.clock + 1 - self.max_delay)

            stream.graphs[rows, seen] = Graphed(whole_frame, self.device, stream.pool)
        stream.clock.fill_(frame)
        return stream.graphs[rows, seen]().clone()

    def _compute(self, stream: _Stream, frame: int | torch.Tensor, count: int, seen: int = 0) -> None:
        """Draw the tokens of a frame, a number or `(1,)` on the device, in the first `count` dialogues."""
        grid, position = stream.grid, self._before + frame
        # The first user frame is never model input: what was there before is, the initial tokens as in LMGen.
        if isinstance(frame, torch.Tensor) or frame > 0:
            grid[self._user, position + self._delays[self._user], :count] = stream.user[:count].T
        hidden, logits = stream.step.text(_row(grid.transpose(0, 1), position)[:, :count], position, seen)
        noise = _row(stream.noise, frame)[:, :count]
        text = draw(logits, noise[0], self.sampling.text_temperature, self.sampling.text_top_k)
        distribution = log_distribution(logits, self.sampling.text_temperature, self.sampling.text_top_k)
        stream.log_probs[frame, :count] = distribution.gather(-1, text[:, None])[:, 0]
        tokens = torch.stack([text, *self._draw_audio(stream.step, text, hidden, noise[1:])])
        drawn = self._early[frame] if isinstance(frame, int) and frame < self.max_delay else self._agent
        grid[drawn, position + 1, :count] = tokens[drawn]

    def _heard(self, stream: _Stream, position: int | torch.Tensor) -> torch.Tensor:
        """`(B, 1 + agent_codebooks)` of the frame whose text is at a position."""
        actions = stream.grid[self._agent, position + self._delays[self._agent]].T
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
        positions = grid[:, self._before : self._before + frames + 1]
        codes = torch.full((grid.shape[0], frames, grid.shape[2]), self.lm.zero_token_id, device=self.device)
        for stream_index, delay in enumerate(self.lm.delays):
            codes[stream_index, : frames - delay] = positions[stream_index, delay + 1 :]
        return Trajectory(codes.permute(2, 0, 1).contiguous(), self._stream.log_probs[:frames].T.contiguous())

    def text_hidden(self, codes: torch.Tensor) -> torch.Tensor:
        """Teacher-forced states `(B, T, D)` that the text logits are a linear map of, for codes `(B, K, T)`."""
        lm = self.lm
        if self.prompt is not None:
            codes = torch.cat([self.prompt.expand(len(codes), -1, -1), codes], dim=2)
        initial = lm._get_initial_token().expand(len(codes), -1, -1)
        delayed = torch.cat([initial, _delay_sequence(lm.delays, codes, initial)], dim=2)
        tokens = delayed[:, :, :-1]
        # As in `LMModel.forward_text`: audio first, then text; added up in float32 as in `act`, and rounded once.
        inputs = lm.emb[0](tokens[:, 1])
        dtype, inputs = inputs.dtype, inputs.float()
        for stream, table in enumerate(lm.emb[1:], start=2):
            inputs = inputs + table(tokens[:, stream])
        inputs = (inputs + lm.text_emb(tokens[:, 0])).to(dtype)
        hidden = PlainTransformer(lm.transformer, tokens.shape[-1]).whole(inputs)
        return plain_norm(lm.out_norm)(hidden[:, self._before :])

    def text_logits(self, codes: torch.Tensor) -> torch.Tensor:
        """Teacher-forced text logits `(B, T, V)` for codes `(B, K, T)`; the depth transformer is not run.

        Without a prompt they equal `LMModel.forward(codes).text_logits[:, 0]` (tested).
        """
        return self.lm.text_linear(self.text_hidden(codes))

    def depth_inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the depth transformer is given of `text_hidden`, `(..., D)` to `(..., D')`, its steps side by side."""
        return torch.cat([project(hidden) for project in self.lm.depformer_in], dim=-1)

    def whole(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Call a function with all of the model's weights at hand (they are; `rlhf_duplex.parallel` may cut them)."""
        return function(*inputs)

    def evaluate_actions(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the text tokens of whole episodes, under the same transform as when acting.

        Args:
            codes: `(B, K, T)` as in `Trajectory.codes`, padded at the end with -1.

        Returns:
            `(B, T)` log-probability of each text token (of token 0 where the text is -1: mask it), and `(B, T, V)`
            the whole log-distribution, for KL and entropy.
        """
        text = codes[:, 0].clamp(min=0)
        distribution = log_distribution(
            self.text_logits(codes), self.sampling.text_temperature, self.sampling.text_top_k, keep=text
        )
        return distribution.gather(-1, text[..., None])[..., 0], distribution


def _row(values: torch.Tensor, index: int | torch.Tensor) -> torch.Tensor:
    """`values[index]` without its first dimension, for a number or `(1,)` on the device."""
    return values[index] if isinstance(index, int) else values.index_select(0, index)[0]
