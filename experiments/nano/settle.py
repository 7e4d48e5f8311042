"""How the agent errs, settled anew in a bundle that exists: 200 steps on the agent's own utterances, in other places.

Stage 3 of the LM's training settles how the agent errs, but from the recipe's own weights and its synthesised voice.
Here the agent's utterances are those that the bundle itself speaks on the shipped training segments, laid into fresh
dialogues by `dialogues.behave_loosely`. Text outside of utterances, which is when the agent begins, is learned; inside
them, and in what the depth transformer is given, the model is held to itself: words and voice stay as they are.

python -m experiments.nano.settle --work runs/nano_recipe --out FOLDER [--bundle nano] [--steps 200]
(needs the recipe's speech: python -m experiments.nano --stage speech)
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from moshi.models.lm_utils import _delay_sequence
from torch import Tensor

from envs.episode import Episode
from rewards.timing import agent_units
from rlhf_duplex.cluster.local import LocalCluster
from rlhf_duplex.cluster.roles import make_units
from rlhf_duplex.config import load_config
from rlhf_duplex.inputs import load_inputs
from rlhf_duplex.policy.bundle import Bundle, load_bundle

from . import bank, build, sentences
from .codec import CODEBOOKS
from .dialogues import AgentVoice, Line, Looseness, behave_loosely
from .language_model import FRAME, Room, UserCodes
from .tokenizer import EPAD, PAD

BREAK = 12  # frames without a word between two utterances
SENTENCE_SECONDS = 1.9  # of an utterance, for each sentence that is asked for
FRAMES = 184  # of a training dialogue
BATCH = 12


@dataclass(frozen=True)
class Said:
    """An utterance as the model spoke it, with a frame before its first word: text `(n,)` and audio codes `(8, n)`."""

    text: np.ndarray
    audio: np.ndarray


class OwnVoice(AgentVoice):
    """Lines of `Said` utterances: a line's only text is `short` or `a long one`, its variant the utterance's number.

    A line is one part, and is never cut: the agent of these dialogues does not stop when the user comes in
    (`Looseness.yields` is without effect).
    """

    def __init__(self, short: list[Said], long: list[Said]) -> None:
        super().__init__({}, 0.0)
        object.__setattr__(self, "said", {"short": short, "a long one": long})

    def line(self, start: float, texts: tuple[str, ...], rng: np.random.Generator) -> Line:
        """An utterance of that kind, at most as long as so many sentences."""
        kind = "short" if texts[0] in sentences.BACKCHANNELS else "a long one"
        number = int(rng.integers(len(self.said[kind])))
        frames = len(self.said[kind][number].text)
        if kind != "short":
            frames = min(frames, int(SENTENCE_SECONDS * len(texts) / FRAME))
        return Line(start, (kind,), (number,), start + frames * FRAME)

    def parts(self, line: Line) -> list[tuple[str, int, float, float]]:
        """As one part."""
        return [(line.texts[0], line.variants[0], line.start, line.end)]


def own_utterances(bundle: str, repeats: int, seed: int) -> tuple[list[Said], list[Said], np.ndarray]:
    """What the bundle says on nano's training segments: backchannels, replies, and the codes of its silence `(8,)`."""
    config = load_config(None, [f"checkpoint={bundle}", "segments=nano", "context.lead_in=1.0", f"seed={seed}"])
    inputs = load_inputs(config)
    cluster = LocalCluster(config, inputs)
    segments = [segment for segment in inputs.segments for _ in range(repeats)]
    seeds = [seed * 1_000_000 + index for index in range(len(segments))]
    cluster.begin(make_units(segments, seeds, [0.0] * len(segments), 96, audio=True))
    short, long, silence = [], [], None
    words = set(sentences.BACKCHANNELS)
    for played in cluster.played():
        for episode in played.episodes:
            found = utterances_of(episode)
            if not found:
                silence = episode.audio_tokens[:CODEBOOKS, 20]
            for said in found:
                text = cluster.bundle.codec.decode_text(said.text.tolist()).split()
                if text and text[0] not in words:
                    long.append(said)
                elif len(text) == 1:
                    short.append(said)
    if silence is None or not short or not long:
        raise RuntimeError("the model was never silent for an episode, or never spoke: nothing to settle with")
    return short, long, silence


def utterances_of(episode: Episode) -> list[Said]:
    """The agent's utterances in an episode, each to the end of its speech; none shorter than five frames."""
    text, audio = episode.text_tokens, episode.audio_tokens[:CODEBOOKS]
    at = np.nonzero((text != PAD) & (text != EPAD))[0]
    first = [frame for index, frame in enumerate(at) if index == 0 or frame - at[index - 1] > BREAK]
    found = []
    for begin, following in zip(first, [*first, len(text)][1:], strict=True):
        heard = [u.end for u in agent_units(episode) if u.start < following * FRAME and u.end > begin * FRAME]
        last = max(frame for frame in at if frame < following) * FRAME + 0.3
        # The last frames lack codes that come later.
        end = min(following - 2, int(max([last, *heard]) / FRAME) + 2, len(text) - 3)
        if heard and begin >= 1 and end - begin >= 4:
            found.append(Said(text[begin - 1 : end].copy(), audio[:, begin - 1 : end].copy()))
    return found


class Draws:
    """Dialogues without end: user tracks of the recipe, the agent's own utterances where `behave_loosely` has them."""

    def __init__(
        self, users: list[UserCodes], room: Room, voice: OwnVoice, silence: np.ndarray, loose: Looseness, seed: int
    ) -> None:
        self.users, self.room, self.voice, self.silence, self.loose = users, room, voice, silence, loose
        self.rng = np.random.default_rng(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Codes `(B, 17, T)`, and which frames are inside of an utterance, `(B, T)`."""
        rows = [self._dialogue() for _ in range(BATCH)]
        codes, inside = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return codes, inside

    def _dialogue(self) -> tuple[np.ndarray, np.ndarray]:
        user = self.users[int(self.rng.integers(len(self.users)))]
        latest = 4 if user.track.kind == "interrupt" else 20
        heard, track = self.room.place(user, int(self.rng.integers(-11, latest)), FRAMES, self.rng)
        text, audio = np.full(FRAMES, PAD), np.repeat(self.silence[:, None], FRAMES, axis=1)
        inside = np.zeros(FRAMES, np.float32)
        for line in behave_loosely(track, self.voice, self.rng, self.loose):
            said = self.voice.said[line.texts[0]][line.variants[0]]
            first = int(line.start / FRAME)
            count = min(round((line.end - line.start) / FRAME), len(said.text), FRAMES - first)
            if first < 1 or count < 3:
                continue
            text[first : first + count] = said.text[:count]
            audio[:, first : first + count] = said.audio[:, :count]
            inside[first + 2 : first + count + 3] = 1  # its first word is still outside: it is when the agent begins
        codes = np.concatenate([text[None], audio, heard]).astype(np.int64)
        return np.where(codes < 0, 0, codes), inside


def settle(bundle: Bundle, draws: Draws, steps: int, rate: float = 5e-4, pad_weight: float = 0.3) -> None:
    """Train the bundle's temporal transformer in place; the depth transformer stays as it is."""
    model = bundle.lm.float().train()
    known = copy.deepcopy(model).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("depformer", "linears")))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(1, steps + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.param_groups[0]["lr"] = rate * min(step / 30, 0.03 + 0.97 * cosine)
        codes, inside = draws.batch()
        initial = model._get_initial_token().expand(len(codes), -1, -1)
        tokens = torch.cat([initial, _delay_sequence(model.delays, codes, initial)], dim=2)[:, :, :-1]
        hidden, logits = model.forward_text(tokens)
        with torch.no_grad():
            others, reference = known.forward_text(tokens)
        ours, theirs = logits[:, 0].log_softmax(-1), reference[:, 0].log_softmax(-1)
        text = codes[:, 0]
        weight = torch.where(text == PAD, pad_weight, 1.0) * (1 - inside)
        timing = (F.nll_loss(ours.transpose(1, 2), text, reduction="none") * weight).sum() / weight.sum()
        kept = ((theirs.exp() * (theirs - ours)).sum(-1) * inside).sum() / inside.sum()
        mine, before = model.depformer_in[0](hidden), known.depformer_in[0](others)
        drift = ((mine - before).square().sum(-1) / before.square().sum(-1)).mean()
        loss = timing + kept + 0.5 * drift
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        if step % 50 == 0:
            print(f"{step}/{steps}  timing {timing:.3f}  words {kept:.4f}  voice {drift:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.nano.settle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, default=Path("runs/nano_recipe"), help="where speech.npz is")
    parser.add_argument("--bundle", default="nano", help="to begin from")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new bundle")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=10, help="episodes of each training segment, for utterances")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    short, long, silence = own_utterances(arguments.bundle, arguments.repeats, arguments.seed)
    print(f"{len(short)} backchannels and {len(long)} replies of its own", flush=True)
    bundle = load_bundle(arguments.bundle)
    users, room = build.encoded_users(bank.load(arguments.work / "speech.npz").train, bundle.mimi, every=2)
    draws = Draws(users, room, OwnVoice(short, long), silence, Looseness(), arguments.seed)
    settle(bundle, draws, arguments.steps)
    bundle.lm.eval().to(torch.bfloat16)
    bundle.save(arguments.out)


if __name__ == "__main__":
    main()
