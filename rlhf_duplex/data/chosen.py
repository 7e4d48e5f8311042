"""The chosen continuation of each kind of problem, beside the rejected one, which is the log itself.

- *interruption*: the same reply, moved on the frame grid to after the user's end.
- *unresponsive*: the policy's own reply, drawn after the user's speech, where the reward axis is content with it.
- *content*: the judge's rewrite, spoken by a synthesiser in the reply's place.

After arXiv 2506.21463, section 3. Shapes: `K` streams, `F` frames as heard, `T` columns of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs.episode import Episode, Word
from envs.segments import Segment
from envs.speech import Interval, SpeechDetector
from envs.utterances import Utterance, clip_intervals
from rewards.turn_taking import TurnTaking
from rlhf_duplex.data.content import reply_words
from rlhf_duplex.data.conversation import Conversation
from rlhf_duplex.data.pair_options import PairOptions
from rlhf_duplex.data.problems import Problem
from rlhf_duplex.data.streams import Streams
from rlhf_duplex.data.synthesis import Speech
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.rollout import episode_seed, one_core_operations


class Unusable(Exception):
    """A problem that no pair can be made of, and why, in a few words that are counted."""


@dataclass(frozen=True)
class Continuations:
    """What a pair is made of, as the model has it.

    Attributes:
        context: `(K, Tc)`; chosen, rejected: `(K, Tw)`, `(K, Tl)`.
        start: seconds of the recording at which the context begins.
        details: for the provenance.
    """

    context: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    start: float
    details: dict[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """A conversation with its speech found.

    Attributes:
        log: audio and words.
        agent, user: utterances in time order.
        user_speech: intervals.
    """

    log: Conversation
    agent: tuple[Utterance, ...]
    user: tuple[Utterance, ...]
    user_speech: tuple[Interval, ...]

    def words_of(self, reply: Utterance) -> list[Word]:
        """The words of one of the agent's utterances."""
        before = [u.end for u in self.agent if u.end <= reply.start]
        return reply_words(self.log.agent_words, reply, max(before, default=0.0))


@dataclass(frozen=True)
class _Window:
    """Frames [first, first + frames) of a conversation."""

    first: int
    frames: int
    streams: Streams

    @property
    def start(self) -> float:
        return self.first / self.streams.frame_rate

    def cut(self, audio: np.ndarray) -> np.ndarray:
        size = self.streams.codec.frame_samples
        return audio[self.first * size : (self.first + self.frames) * size]

    def words(self, words: Sequence[Word], until: float = float("inf"), later: float = 0.0) -> list[Word]:
        """Words that begin in the window and before `until` (seconds of the recording), in its time, `later` moved."""
        shift = later - self.start
        return [Word(w.text, w.start + shift, w.end + shift) for w in words if self.start <= w.start < until]


def divide(streams: Streams, chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Context, chosen and rejected `(K, T)` of two dialogues as heard `(K, F)` that part somewhere.

    Raises:
        Unusable: they never part, or one ends before.
    """
    return divide_columns(streams.columns(chosen), streams.columns(rejected), streams)


def divide_columns(won: torch.Tensor, lost: torch.Tensor, streams: Streams) -> tuple[torch.Tensor, ...]:
    """`divide` for streams as the model has them."""
    shared = min(won.shape[1], lost.shape[1])
    agent = slice(0, 1 + streams.codec.agent_codebooks)
    differ = (won[agent, :shared] != lost[agent, :shared]).any(dim=0).nonzero()
    if not len(differ):
        raise Unusable("chosen and rejected do not part")
    at = int(differ[0])
    return won[:, :at], won[:, at:], lost[:, at:]


def moved_reply(streams: Streams, dialogue: Dialogue, problem: Problem, options: PairOptions) -> Continuations:
    """The reply that interrupted, moved to `gap` seconds after the user's end; where it stood, the agent is silent.

    The reply's codes are moved as they are, with the frame before and after; its words move as many frames. What the
    agent said later is in neither continuation. Beyond the end of the recording the user is silent.

    Raises:
        Unusable: the reply has no words, or the user goes on before it would be over.
    """
    reply, user, log = problem.reply, problem.user, dialogue.log
    assert reply is not None
    assert user is not None
    words = dialogue.words_of(reply)
    if not words:
        raise Unusable("the reply has no words")
    rate = streams.frame_rate
    onset = streams.frame_at(min(reply.start, words[0].start))
    begin, end = max(0, onset - 1), streams.frames_in(reply.end) + 1
    shift = streams.frames_in(user.end + options.gap) - onset
    if any(u.start > user.start and u.start < reply.end + shift / rate for u in dialogue.user):
        raise Unusable("the user goes on before the moved reply would be over")
    window = _Window(max(0, begin - streams.frames_in(options.context)), 0, streams)
    window = _Window(window.first, end + shift - window.first, streams)
    said_before = [w for w in log.agent_words if w.start < words[0].start]
    text = window.words([*said_before, *words])
    heard = streams.heard(window.cut(log.agent_audio), window.cut(log.user_audio), text, window.frames)
    begin, end = begin - window.first, end - window.first
    codebooks = slice(1, 1 + streams.codec.agent_codebooks)
    chosen = heard.clone()
    chosen[codebooks, begin:] = streams.silence(window.frames - begin)
    chosen[codebooks, begin + shift : end + shift] = heard[codebooks, begin:end]
    moved = window.words(said_before) + window.words(words, later=shift / rate)
    chosen[0] = streams.aligner.place(moved, window.frames)
    context, won, lost = divide(streams, chosen, heard[:, :end])
    details = {
        "user_end": user.end,
        "reply": [reply.start, reply.end],
        "moved_by": shift / rate,
        "reply_text": " ".join(w.text for w in words),
    }
    return Continuations(context, won, lost, window.start, details)


def drawn_reply(
    streams: Streams,
    policy: MoshiPolicy,
    detector: SpeechDetector,
    dialogue: Dialogue,
    problem: Problem,
    options: PairOptions,
    seed: int,
) -> Continuations:
    """The policy's own reply to a turn that the log leaves unanswered, the best of a few by `rewards.turn_taking`.

    The recorded streams up to the turn's end are the policy's history; from there on it draws its own. A reply counts
    where it begins within `accept` seconds of the turn's end, and it ends where its utterance ends.

    Raises:
        Unusable: none of the replies is good enough.
    """
    user, log = problem.user, dialogue.log
    assert user is not None
    turn = streams.frames_in(user.end)
    following = [u.start for u in dialogue.user if u.start > user.start]
    room = min(options.reply, *(start - user.end for start in following)) if following else options.reply
    last = turn + max(streams.frames_in(room), streams.frames_in(options.response))
    first = max(0, turn - max(1, streams.frames_in(options.context)))  # a policy goes on from a frame at least
    window = _Window(first, last - first, streams)
    turn -= window.first
    words = window.words(log.agent_words)
    heard = streams.heard(window.cut(log.agent_audio), window.cut(log.user_audio), words, window.frames)
    seeds = [episode_seed(options.seed, seed, member) for member in range(options.candidates)]
    drawn = _draw(streams, policy, heard, turn, seeds)
    replies = _finish(streams, detector, dialogue, user, window, heard, drawn)
    scores = TurnTaking().score(replies)
    best = max(range(len(scores)), key=lambda i: -1e9 if scores[i] is None else scores[i].value)  # type: ignore[union-attr]
    score = scores[best]
    response = score.details.get("response") if score is not None else None
    if score is None or response is None or -score.value > options.accept:
        raise Unusable("no drawn reply is good enough")
    until = streams.frames_in(response[1]) + 1  # in the window: episodes have its time
    rejected = streams.columns(heard[:, : turn + streams.frames_in(options.response)])
    chosen = drawn[best][:, : min(until, window.frames) - streams.max_delay]
    context, won, lost = divide_columns(chosen, rejected, streams)
    text = streams.codec.decode_text(won[0].tolist())
    if not text:
        raise Unusable("the drawn reply has no words")
    latency = response[0] - replies[best].scored_from
    details = {
        "user_end": user.end,
        "latency": latency,
        "scores": [None if s is None else s.value for s in scores],
        "reply_text": text,
        "seed": seeds[best],
    }
    return Continuations(context, won, lost, window.start, details)


def _draw(
    streams: Streams, policy: MoshiPolicy, heard: torch.Tensor, turn: int, seeds: list[int]
) -> list[torch.Tensor]:
    """Columns `(K, T)` of a dialogue that is as heard `(K, F)` up to frame `turn`, and drawn from there; one a seed."""
    users = heard[1 + streams.codec.agent_codebooks :].to(policy.device)
    history = streams.columns(heard)[:, :turn].to(policy.device)
    frames = heard.shape[1]
    with one_core_operations(policy.device):
        policy.begin(seeds, frames)
        try:
            policy.prefill(history[None].expand(len(seeds), -1, -1))
            for frame in range(history.shape[1], frames):
                policy.act(users[:, frame].expand(len(seeds), -1))
            codes = policy.trajectory().codes.cpu()
        finally:
            policy.end()
    # The last column lacks delayed codes and the user's next frame: it stands for no whole frame.
    return list(codes[:, :, : frames - max(streams.max_delay, 1)])


def _finish(
    streams: Streams,
    detector: SpeechDetector,
    dialogue: Dialogue,
    user: Utterance,
    window: _Window,
    heard: torch.Tensor,
    drawn: Sequence[torch.Tensor],
) -> list[Episode]:
    """Episodes to be scored: turn-taking from the end of the user's turn on."""
    rate, samples = streams.codec.sample_rate, streams.codec.frame_samples
    codes = torch.stack([streams.agent_frames(columns) for columns in drawn])
    audio = streams.codec.decode(codes.to(streams.codec.device)).float().cpu().numpy()
    speech = detector.detect(list(audio), rate)
    turn_end = user.end - window.start
    shown = clip_intervals(dialogue.user_speech, window.start, window.start + window.frames / streams.frame_rate)
    user_speech = [Interval(i.start - window.start, i.end - window.start) for i in shown]
    user_audio = window.cut(dialogue.log.user_audio)
    return [
        Episode(
            Segment(
                dialogue.log.id,
                "turn_taking",
                Path(dialogue.log.path),
                1,
                user.end,
                user.end + len(clip) / rate - turn_end,
                {"user_turn_end": user.end},
            ),
            np.pad(user_audio, (0, max(0, window.frames * samples - len(user_audio)))),
            clip,
            rate,
            user_speech,
            intervals,
            len(clip) / rate,
            scored_from=turn_end,
        )
        for clip, intervals in zip(audio, speech, strict=True)
    ]


def rewritten_reply(
    streams: Streams, dialogue: Dialogue, problem: Problem, speech: Speech, options: PairOptions
) -> Continuations:
    """The reply's place taken by other words.

    The agent's channel is encoded with the new speech in it; before the reply the codes are the log's own.

    Args:
        streams: of the bundle.
        dialogue: the log.
        problem: whose `reply` is replaced.
        speech: at the codec's sample rate, with word times, without silence at its ends.
        options: how much context.

    Raises:
        Unusable: the reply has no words, or the new one would not be over before the user goes on.
    """
    reply, log = problem.reply, dialogue.log
    assert reply is not None
    assert speech.words is not None
    words = dialogue.words_of(reply)
    if not words:
        raise Unusable("the reply has no words")
    begin = max(0, streams.frame_at(min(reply.start, words[0].start)) - 1)
    spoken_until = reply.start + len(speech.audio) / speech.sample_rate
    if any(reply.end <= u.start < spoken_until for u in dialogue.user):
        raise Unusable("the user goes on before the rewrite would be over")
    first = max(0, begin - streams.frames_in(options.context))
    until = max(streams.frames_in(reply.end), streams.frames_in(spoken_until)) + 1
    window = _Window(first, until - first, streams)
    said_before = [w for w in log.agent_words if w.start < words[0].start]
    heard = streams.heard(
        window.cut(log.agent_audio), window.cut(log.user_audio), window.words([*said_before, *words]), window.frames
    )
    agent = np.zeros(window.frames * streams.codec.frame_samples, dtype=np.float32)
    kept = (begin - first) * streams.codec.frame_samples
    agent[:kept] = window.cut(log.agent_audio)[:kept]
    at = round((reply.start - window.start) * speech.sample_rate)
    agent[at : at + len(speech.audio)] = speech.audio[: len(agent) - at]
    new_words = [Word(w.text, w.start + reply.start, w.end + reply.start) for w in speech.words]
    chosen = streams.heard(agent, window.cut(log.user_audio), window.words([*said_before, *new_words]), window.frames)
    chosen[1:, : begin - first] = heard[1:, : begin - first]
    context, won, lost = divide(
        streams,
        chosen[:, : streams.frames_in(spoken_until) + 1 - first],
        heard[:, : streams.frames_in(reply.end) + 1 - first],
    )
    details = {"reply": [reply.start, reply.end], "reply_text": " ".join(w.text for w in words)}
    return Continuations(context, won, lost, window.start, details)
