"""The language model: Moshi's `LMModel` at a small size, trained on freshly drawn dialogues.

User tracks are encoded once; the agent's side is put together from codes of single sentences, with a new draw of its
loose behaviour every time a track is used. The timing of one dialogue can then not be learnt by heart.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from moshi.models import LMModel, MimiModel
from moshi.models.lm_utils import _delay_sequence
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from envs.files import replacing

from .codec import BINS, CODEBOOKS, FRAME_SIZE, SAMPLE_RATE
from .dialogues import NOISE_LEVELS, STATES, AgentVoice, Line, Looseness, Track, behave_loosely, room_noise, speak_on
from .tokenizer import EPAD, PAD, PIECES
from .voices import word_times

FRAME = FRAME_SIZE / SAMPLE_RATE  # 0.08 s
OFFSETS = 4  # positions of a sentence's onset inside a frame that are encoded

CONFIG = {
    "dim": 128, "text_card": PIECES, "existing_text_padding_id": PAD, "n_q": 2 * CODEBOOKS, "dep_q": CODEBOOKS,
    "card": BINS, "num_heads": 4, "num_layers": 4, "hidden_scale": 4.125, "causal": True, "layer_scale": None,
    "context": 400, "max_period": 10000, "gating": "silu", "norm": "rms_norm_f32", "positional_embedding": "rope",
    "depformer_dim": 96, "depformer_dim_feedforward": 384, "depformer_num_heads": 4, "depformer_num_layers": 1,
    "depformer_layer_scale": None, "depformer_multi_linear": True, "depformer_context": CODEBOOKS,
    "depformer_max_period": 10000, "depformer_gating": "silu", "depformer_pos_emb": "none",
    "depformer_weights_per_step": True, "depformer_weights_per_step_schedule": [0, 1, 2, 2, 3, 3, 3, 3],
    "delays": [0, *([0] + [1] * (CODEBOOKS - 1)) * 2],
}  # fmt: skip


@dataclass
class AgentCodes:
    """Codes of the agent's closed set: (text, rendition, offset) -> [8, frames], and of silence [8, frames]."""

    lines: dict[tuple[str, int, int], np.ndarray]
    silence: np.ndarray


@dataclass
class UserCodes:
    """A user track that ends with the last word, and its codes [8, frames]. quiet: digital silence leads in."""

    track: Track
    codes: np.ndarray
    quiet: bool
    level: int


@dataclass
class Room:
    """Codes [8, frames] of digital silence and of noise at each of `NOISE_LEVELS`."""

    silence: np.ndarray
    noise: list[np.ndarray]

    def place(self, user: UserCodes, shift: int, frames: int, rng: np.random.Generator) -> tuple[np.ndarray, Track]:
        """Move a track by `shift` frames (less than 0: cut its lead-in) in a channel of `frames` frames."""
        noise = self.noise[user.level]
        start = int(rng.integers(20, noise.shape[1] - frames))
        noise = noise[:, start : start + frames]
        out = (self.silence[:, :frames] if user.quiet and shift >= 0 else noise).copy()
        codes = user.codes[:, max(0, -shift) :][:, : frames - max(0, shift)]
        end = max(0, shift) + codes.shape[1]
        out[:, max(0, shift) : end] = codes
        out[:, end:] = noise[:, end:]
        return out, user.track.moved(shift * FRAME)


def encode_users(mimi: MimiModel, tracks: list[tuple[Track, bool, int]]) -> list[UserCodes]:
    """Encode (track, quiet lead-in?, noise level) each; lengths are padded with silence to whole half seconds."""
    half = SAMPLE_RATE // 2 // FRAME_SIZE * FRAME_SIZE
    padded = [np.pad(track.audio, (0, -len(track.audio) % half)) for track, _, _ in tracks]
    codes = encode(mimi, padded)
    return [
        UserCodes(track, row[:, : len(track.audio) // FRAME_SIZE], quiet, level)
        for (track, quiet, level), row in zip(tracks, codes, strict=True)
    ]


def encode_room(mimi: MimiModel, seconds: float = 60.0) -> Room:
    """Codes of silence and noise."""
    length = round(seconds * SAMPLE_RATE) // FRAME_SIZE * FRAME_SIZE
    rng = np.random.default_rng(7)
    channels = [room_noise(length, level, rng) for level in NOISE_LEVELS]
    silence, *noise = encode(mimi, [np.zeros(length, np.float32), *channels])
    return Room(silence, noise)


@torch.no_grad()
def encode(mimi: MimiModel, audio: list[np.ndarray], batch: int = 16) -> list[np.ndarray]:
    """Codes [8, T] of each channel [N]; channels of one length go through the codec together."""
    out: list[np.ndarray] = [np.zeros(0)] * len(audio)
    order = sorted(range(len(audio)), key=lambda i: len(audio[i]))
    while order:
        rows = [i for i in order[:batch] if len(audio[i]) == len(audio[order[0]])]
        order = order[len(rows) :]
        codes = mimi.encode(torch.from_numpy(np.stack([audio[i] for i in rows]))[:, None])
        for i, row in zip(rows, codes, strict=True):
            out[i] = row.numpy().astype(np.int16)
    return out


def encode_agent(mimi: MimiModel, agent: AgentVoice) -> AgentCodes:
    """Encode every rendition of the closed set, after silence, at several positions inside a frame."""
    before, after = 2 * SAMPLE_RATE // FRAME_SIZE, 6  # frames of silence around a sentence
    keys, channels = [], []
    for text, renditions in agent.audio.items():
        for variant, audio in enumerate(renditions):
            for offset in range(OFFSETS):
                frames = before + math.ceil(len(audio) / FRAME_SIZE + 1) + after
                channel = np.zeros(frames * FRAME_SIZE, np.float32)
                first = before * FRAME_SIZE + offset * FRAME_SIZE // OFFSETS
                channel[first : first + len(audio)] = audio
                keys.append((text, variant, offset))
                channels.append(channel)
    codes = encode(mimi, channels)
    silence = encode(mimi, [np.zeros(400 * FRAME_SIZE, np.float32)])[0]
    return AgentCodes({key: row[:, before:] for key, row in zip(keys, codes, strict=True)}, silence)


def agent_streams(
    lines: list[Line], agent: AgentVoice, codes: AgentCodes, frames: int, word_ids: dict[str, int],
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """The agent's text and audio streams [1 + 8, frames]: a word's token in its onset frame, EPAD before, else PAD.

    Every other word inside a line comes a frame early or late: with exact times the model would learn the clock of
    each rendition, and lose the sentence as soon as it samples one word off that clock.
    """
    out = np.empty((1 + CODEBOOKS, frames), np.int64)
    out[0] = PAD
    out[1:] = codes.silence[:, :frames]
    taken = -1
    for line in lines:
        for text, variant, start, end in agent.parts(line):
            frame = int(start / FRAME)
            offset = min(OFFSETS - 1, int((start / FRAME - frame) * OFFSETS))
            part = codes.lines[text, variant, offset][:, : max(0, frames - frame)]
            out[1:, frame : frame + part.shape[1]] = part
            for index, (word, onset, _) in enumerate(word_times(text, start, end)):
                off = int(rng.choice((-1, 0, 0, 1))) if index else 0
                taken = max(taken + 1, int(onset / FRAME) + off)
                if taken < frames:
                    out[0, taken] = word_ids[word]
                    if taken and out[0, taken - 1] == PAD:
                        out[0, taken - 1] = EPAD
    return out


def loss_of(
    model: LMModel, listener: nn.Linear, codes: Tensor, states: Tensor, weight: Tensor, deaf: Tensor,
    pad_weight: float, first_weight: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Cross-entropies of codes [B, 17, T]: the sum that is trained, then those of text, words, audio and user state.

    listener: reads the user's state [B, T] (see `STATES`) from the temporal transformer's output. It is not shipped:
    it sees to it that the model knows a pause from an end however loosely it acts on that, as a model of Moshi's size
    does from its data alone.
    weight: [B, T], of the audio in each frame.
    deaf: [B], dialogues in which the agent does not hear itself, so that its text must follow from its text: otherwise
    the next word is read off the agent's own audio, and as soon as that is sampled a little off, the sentence is lost.

    This is `LMModel.forward` with the depth transformer run only on frames
    of positive weight: in two thirds of all frames the agent is silent, and those are all alike.
    """
    initial = model._get_initial_token().expand(len(codes), -1, -1)
    delayed = torch.cat([initial, _delay_sequence(model.delays, codes, initial)], dim=2)
    heard = delayed[:, :, :-1].clone()
    heard[deaf, 1 : 1 + CODEBOOKS] = initial[deaf, 1 : 1 + CODEBOOKS]
    weight = weight * ~deaf[:, None]
    hidden, text_logits = model.forward_text(heard)
    text = codes[:, 0]
    text_weight = torch.where(text == PAD, pad_weight, 1.0)
    text_loss = F.cross_entropy(text_logits[:, 0].transpose(1, 2), text, reduction="none")
    word = (text != PAD) & (text != EPAD)
    word_loss = text_loss.detach()[word].mean()
    text_loss = (text_loss * text_weight).sum() / text_weight.sum()
    state_loss = F.cross_entropy(listener(hidden).transpose(1, 2), states)
    row, frame = weight.nonzero(as_tuple=True)
    target = delayed[row, :, frame + 1].T[None]  # [1, 17, selected]: what the depth transformer writes in that step
    logits = model.forward_depformer_training(target, hidden[row, frame][None])
    target = target[:, 1 : 1 + CODEBOOKS]
    known = target < model.card  # the first frame's delayed codebooks hold the initial token
    audio_loss = F.cross_entropy(logits.transpose(1, 3).transpose(2, 3), target * known, reduction="none") * known
    share = weight[row, frame].expand(1, CODEBOOKS, -1).clone()
    share[:, 0] *= first_weight
    audio_loss = (audio_loss * share).sum() / share.sum()
    total = text_loss + audio_loss + 0.5 * state_loss
    return total, text_loss.detach(), word_loss, audio_loss.detach(), state_loss.detach()


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        steps: of the optimiser; batch: dialogues a step; frames: of each.
        rate: learning rate at its highest.
        deaf: share of dialogues in which the agent does not hear itself.
        alone: the agent says one sentence after another, to nobody.
    """

    steps: int
    batch: int
    frames: int
    rate: float
    deaf: float
    alone: bool = False


# Monologues first: three times as many words a second as in dialogues. The last stage only settles how the agent errs;
# it can be run again by itself (`--lm-stage 3`) when `Looseness` is changed.
STAGES = (
    Stage(1200, 12, 104, 2e-3, 0.5, alone=True),
    Stage(1300, 12, 184, 2e-3, 0.3),
    Stage(350, 12, 184, 1e-3, 0.2),
)


class Draws:
    """Training dialogues, drawn without end."""

    def __init__(
        self, users: list[UserCodes], room: Room, agent: AgentVoice, codes: AgentCodes, word_ids: dict[str, int],
        loose: Looseness, rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self.users, self.room, self.agent, self.codes, self.word_ids = users, room, agent, codes, word_ids
        self.loose, self.rng = loose, rng
        self.order = np.empty(0, np.int64)

    def batch(self, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, 17, T], the user's states [B, T] and the weights of the audio loss [B, T]."""
        if len(self.order) < stage.batch:
            self.order = self.rng.permutation(len(self.users))
        chosen, self.order = self.order[: stage.batch], self.order[stage.batch :]
        drawn = [self._monologue(stage.frames) if stage.alone else self._dialogue(int(i), stage.frames) for i in chosen]
        rows, states, weights = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
        return rows, states, weights

    def _dialogue(self, index: int, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        latest = 4 if self.users[index].track.kind == "interrupt" else 20  # or its answer would lie outside
        user, track = self.room.place(self.users[index], int(self.rng.integers(-11, latest)), frames, self.rng)
        lines = behave_loosely(track, self.agent, self.rng, self.loose)
        return self._row(user, track, lines, frames)

    def _monologue(self, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        nothing = Track("silent", np.zeros(0, np.float32))
        empty = np.zeros((CODEBOOKS, 0), np.int16)
        user = UserCodes(nothing, empty, bool(self.rng.integers(2)), int(self.rng.integers(len(NOISE_LEVELS))))
        codes, track = self.room.place(user, 0, frames, self.rng)
        line = speak_on(self.agent, frames * FRAME, self.rng)
        return self._row(codes, track, [line], frames)

    def _row(
        self, user: np.ndarray, track: Track, lines: list[Line], frames: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        streams = agent_streams(lines, self.agent, self.codes, frames, self.word_ids, self.rng)
        row = np.concatenate([streams, user.astype(np.int64)])
        return row, track.states(frames, FRAME), audio_weight(lines, frames, self.rng)


def train(
    users: list[UserCodes], room: Room, agent: AgentVoice, agent_codes: AgentCodes, word_ids: dict[str, int], out: Path,
    stages: tuple[Stage, ...] = STAGES, pad_weight: float = 0.3, first_weight: float = 4.0,
    loose: Looseness | None = None, seed: int = 0, begin: int = 1,
) -> None:  # fmt: skip
    """Train a new model through the stages and write it to `out`, and to `out` with the stage's number after each.

    begin: number of the stage to begin with; what the stages before it gave is read. Every stage has a seed and an
    optimiser of its own, so that a later one can be run again by itself.
    """
    torch.manual_seed(seed)
    model = LMModel(**CONFIG)
    listener = nn.Linear(CONFIG["dim"], len(STATES))
    whole = nn.ModuleDict({"model": model, "listener": listener})
    if begin > 1:
        whole.load_state_dict(load_file(_after(out, begin - 1)))
    began = time.time()
    for number, stage in list(enumerate(stages, 1))[begin - 1 :]:
        rng = np.random.default_rng((seed, number))
        draws = Draws(users, room, agent, agent_codes, word_ids, loose or Looseness(), rng)
        optimiser = torch.optim.AdamW(whole.parameters(), lr=stage.rate, betas=(0.9, 0.95), weight_decay=0.02)
        sums = np.zeros(4)
        for step in range(1, stage.steps + 1):
            cosine = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
            optimiser.param_groups[0]["lr"] = stage.rate * min(step / 50, 0.03 + 0.97 * cosine)
            codes, states, weight = draws.batch(stage)
            deaf = torch.from_numpy(rng.random(len(codes)) < stage.deaf)
            loss, *parts = loss_of(model, listener, codes, states, weight, deaf, pad_weight, first_weight)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
            optimiser.step()
            sums += [part.item() for part in parts]
            if step % 50 == 0:
                names = ("text", "words", "audio", "state")
                means = "  ".join(f"{name} {value / 50:.3f}" for name, value in zip(names, sums, strict=True))
                sums[:] = 0
                print(f"{time.time() - began:6.0f} s  lm {number}: {step}/{stage.steps}  {means}", flush=True)
        save(whole, _after(out, number))
    save(model, out)


def _after(out: Path, number: int) -> Path:
    return out.with_name(f"{out.stem}.{number}.safetensors")


def audio_weight(lines: list[Line], frames: int, rng: np.random.Generator) -> np.ndarray:
    """Weight of the audio loss in each frame [frames]: 1 in and just after speech, else one silent frame in eight."""
    out = (rng.random(frames) < 0.12).astype(np.float32)
    out[:2] = 1.0
    for line in lines:
        out[max(0, int(line.start / FRAME) - 1) : int(line.end / FRAME) + 5] = 1.0
    return out


def save(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the weights as safetensors, through a temporary name."""
    weights = {name: value.detach().to(dtype).contiguous() for name, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(weights, temporary)
