"""Logs of a policy's own conversations: recorded users are replayed to it, and what both say is written down.

A log is stereo (left agent, right user) with the words of both beside it, as `rlhf_duplex.data.conversation` reads it:
the user's words from the manifest, the agent's from its inner monologue.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from envs.audio import audio_info, read_audio, write_audio
from envs.dialogues import UserSides
from envs.episode import Episode
from envs.errors import InputError
from envs.files import file_name, write_text
from envs.segments import Segment
from envs.speech import Interval
from envs.vector import DuplexDialogueVectorEnv
from rewards.transcripts import CorpusWords
from rlhf_duplex.data.conversation import Entry, read_corpus, write_conversation
from rlhf_duplex.data.streams import Streams
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.rollout import episode_seed, rollout

LISTING = "conversations.jsonl"


class _NoSpeech:
    """Nothing is scored here, so that nothing needs to be detected."""

    def detect(self, audio: Sequence[np.ndarray], sample_rate: int) -> list[list[Interval]]:
        return [[] for _ in audio]


def converse(
    streams: Streams,
    policy: MoshiPolicy,
    segments: Sequence[Segment],
    out: Path,
    samples: int = 1,
    lead_in: float = 1.0,
    tail: float = 4.0,
    batch_size: int = 64,
    seed: int = 0,
    on_frame: Callable[[int], None] | None = None,
) -> list[Entry]:
    """Play segments to the policy and write the dialogues to a folder, with `conversations.jsonl` that lists them.

    Args:
        streams, policy: of one bundle.
        segments: whose users are replayed.
        out: the folder.
        samples: dialogues with each segment's user.
        lead_in: seconds of silence before the segment.
        tail: seconds that a dialogue goes on after it, with what the recording has there and then silence: time for
            an answer that comes late, or does not come.
        batch_size: dialogues at once.
        seed: of everything that is drawn; a dialogue depends on it, its segment and its number only.
        on_frame: called with the number of dialogues after each frame.

    Raises:
        InputError: the folder lists other dialogues already.
    """
    check_log_folder(out, segments, samples)
    out.mkdir(parents=True, exist_ok=True)
    entries: list[Entry] = []
    for first in range(0, len(segments), max(1, batch_size // samples)):
        chosen = list(segments[first : first + max(1, batch_size // samples)])
        with tempfile.TemporaryDirectory() as folder:
            longer = [_longer(s, tail, Path(folder) / f"{i}.flac") for i, s in enumerate(chosen)]
            users = UserSides(streams.codec, _NoSpeech(), lead_in)
            env = DuplexDialogueVectorEnv(longer, streams.codec, _NoSpeech(), user_sides=users)
            keys = [int.from_bytes(hashlib.sha256(s.id.encode()).digest()[:4], "big") for s in chosen]
            seeds = [episode_seed(seed, key, member) for key in keys for member in range(samples)]
            repeated = [segment for segment in longer for _ in range(samples)]
            episodes = rollout(
                policy, env, repeated, seeds, [0.0] * len(repeated), batch_size=batch_size, on_frame=on_frame
            )
        for number, episode in enumerate(episodes):
            segment = chosen[number // samples]
            path = out / _log_name(segment, number % samples)
            entries.append(_write(path, episode, streams))
    sources = (segment.recording.resolve() for segment in segments for _ in range(samples))
    lines = [
        json.dumps({"path": e.path.name, "duration": round(e.duration or 0.0, 3), "source": str(source)}) + "\n"
        for e, source in zip(entries, sources, strict=True)
    ]
    write_text(out / LISTING, "".join(lines))
    return entries


def _log_name(segment: Segment, sample: int) -> str:
    return f"{file_name(segment.id)}-{sample}.wav"


def check_log_folder(out: Path, segments: Sequence[Segment], samples: int) -> None:
    """Look whether `out` holds logs already that these would drop from its list.

    Raises:
        InputError: it does.
    """
    if not (out / LISTING).is_file():
        return
    mine = {_log_name(segment, sample) for segment in segments for sample in range(samples)}
    others = [entry.path.name for entry in read_corpus(out / LISTING) if entry.path.name not in mine]
    if others:
        raise InputError(
            f"{out / LISTING} lists {len(others)} dialogues that this command does not write, such as {others[0]}: "
            "choose another --out"
        )


def dialogue_frames(segments: Sequence[Segment], samples: int, lead_in: float, tail: float, frame_rate: float) -> float:
    """Frames that `converse` will play, for a progress bar."""
    return sum(s.duration + lead_in + tail for s in segments) * samples * frame_rate


def _longer(segment: Segment, tail: float, path: Path) -> Segment:
    """The segment with `tail` seconds more, of a recording that was filled up with silence."""
    rate, _, duration = audio_info(segment.recording)
    end = segment.end + tail
    channels = 2 if segment.agent_recording is None else 1
    user = read_audio(segment.recording, segment.user_channel, rate, segment.start, min(end, duration), channels)
    stereo = np.zeros((round((end - segment.start) * rate), 2), dtype=np.float32)
    stereo[: len(user), 1] = user[: len(stereo)]
    write_audio(path, stereo, rate)
    shift = segment.start
    words = tuple((w, (s - shift, e - shift), who) for w, (s, e), who in segment.transcript)
    return replace(
        segment,
        recording=path,
        agent_recording=None,
        user_channel=1,
        start=0.0,
        end=len(stereo) / rate,
        events={},
        transcript=words,
    )


def _write(path: Path, episode: Episode, streams: Streams) -> Entry:
    assert episode.text_tokens is not None
    pad = streams.aligner.pad
    heard = [pad] * streams.max_delay + episode.text_tokens.tolist()[: len(episode.text_tokens) - streams.max_delay]
    (found,) = CorpusWords().words([episode])  # what a transcript has of before and after was not heard
    user_words = [word._replace(end=min(word.end, episode.duration)) for word in found or []]
    audio = episode.agent_audio, episode.user_audio
    return write_conversation(path, *audio, episode.sample_rate, streams.words(heard), user_words)
