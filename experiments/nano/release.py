"""Writing what ships: the bundle folder and the folder of recorded dialogues."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import av
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from envs.files import replacing

from . import codec, language_model
from .dialogues import (
    NOISE_LEVELS,
    AgentVoice,
    Line,
    Spoken,
    Track,
    agent_audio,
    agent_words,
    behave_well,
    user_track,
)  # fmt: skip

AXIS_OF = {
    "pause": "pause_handling", "turn": "turn_taking", "long": "backchannel", "interrupt": "user_interruption",
}  # fmt: skip
START = 0.5  # seconds of recording before the user's first word
# Scored seconds after the user's last word. An answer that begins after the user's end cannot last a second in either
# and so is never a takeover; on the backchannel axis it would count as a short interval, hence hardly any tail.
TAIL = {"pause": 0.8, "long": 0.2}
SHORTEST = 3.0  # seconds of an utterance on the interruption axis
BIT_RATE = 14_000  # of both channels together


def write_bundle(folder: Path, lm: Path, mimi: Path, tokenizer: Path, card: str) -> None:
    """Put together config, weights in 16 bits, tokenizer and model card; the old folder is replaced in one go."""
    with replacing(folder) as fresh:
        fresh.mkdir()
        config = {
            **language_model.CONFIG,
            "moshi_name": "model.safetensors",
            "mimi_name": "mimi.safetensors",
            "mimi_config_name": "mimi_config.json",
            "tokenizer_name": "tokenizer.model",
            "lm_gen_config": {"temp": 0.8, "temp_text": 0.7, "top_k": 250, "top_k_text": 0},
            "model_type": "moshi",
        }
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (fresh / "mimi_config.json").write_text(json.dumps(codec.CONFIG, indent=2) + "\n")
        state = {name: value.to(torch.bfloat16) for name, value in load_file(lm).items()}
        save_file(state, fresh / "model.safetensors")
        codec.save(codec.load(mimi), fresh / "mimi.safetensors", dtype=torch.float16)
        shutil.copy(tokenizer, fresh / "tokenizer.model")
        (fresh / "MODEL_CARD.md").write_text(card)


def recording(
    kind: str, utterances: list[Spoken], agent: AgentVoice, rng: np.random.Generator
) -> tuple[Track, list[Line], np.ndarray]:
    """One well-behaved dialogue: the user's track, the agent's lines, and stereo audio [N, 2], left the agent."""
    track = user_track(kind, utterances, START, 6.0, float(rng.choice(NOISE_LEVELS)), rng)
    lines = behave_well(track, agent, rng)
    if kind in TAIL:  # nothing after the scored utterance: an answer there would only cost bytes
        lines = [line for line in lines if line.start < track.utterances[-1][1]]
    end = max([track.utterances[-1][1] + 0.6, *(line.end for line in lines)]) + 0.4
    samples = math.ceil(end * codec.SAMPLE_RATE)
    track.audio = track.audio[:samples]
    return track, lines, np.stack([agent_audio(lines, agent, samples / codec.SAMPLE_RATE), track.audio], axis=1)


def segment(identity: str, name: str, track: Track, lines: list[Line], agent: AgentVoice) -> dict:
    """The manifest line of a recording; times in seconds of the recording."""
    begin, end = track.utterances[0]
    events: dict = {}
    if track.kind == "pause":
        events["pauses"] = [[cue.start, cue.end] for cue in track.cues if cue.kind == "pause"]
        end += TAIL["pause"]
    elif track.kind == "turn":
        events["user_turn_end"] = end
        end = lines[-1].end
    elif track.kind == "long":
        events["true_backchannels"] = [[line.start, line.end] for line in lines]
        end += TAIL["long"]
    else:
        events["interruption"] = list(track.utterances[1])
        events["user_turn_end"] = end
        end = lines[-1].end
    words = [[w, [s, e], "user"] for w, s, e in track.words]
    words += [[w, [s, e], "agent"] for w, s, e in agent_words(lines, agent)]
    words.sort(key=lambda word: word[1][0])
    out = {"id": identity, "axis": AXIS_OF[track.kind], "recording": name, "user_channel": 1, "start": begin,
           "end": end, "events": events, "transcript": words}  # fmt: skip
    return json.loads(json.dumps(out), parse_float=lambda x: round(float(x), 2))


def write_recordings(
    folder: Path, bank: list[Spoken], agent: AgentVoice, per_axis: int, seed: int, prefix: str
) -> None:
    """Ogg/Opus recordings with sidecars, `data.jsonl`, `segments.jsonl`; each utterance of the bank once at most."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    pools = {kind: [s for s in bank if s.kind == kind] for kind in AXIS_OF}
    # First utterances of the barge-ins: short ones, for these are the longest segments.
    openers = sorted((s for s in pools["turn"][per_axis:] if s.seconds >= SHORTEST), key=lambda s: s.seconds)
    segments, recordings = [], []
    for kind, pool in pools.items():
        for spoken in pool[:per_axis]:
            utterances = [spoken]
            if kind == "interrupt":
                first = next(s for s in openers if s.voice == spoken.voice)
                openers.remove(first)
                utterances = [first, spoken]
            track, lines, audio = recording(kind, utterances, agent, rng)
            number = len(segments)
            name = f"{number:04d}.ogg"
            write_opus(folder / name, audio)
            info = segment(f"{prefix}-{number:04d}", name, track, lines, agent)
            tags = {"agent": "SPEAKER_MAIN", "user": "SPEAKER_USER"}
            alignments = [[w, t, tags[who]] for w, t, who in info["transcript"]]
            (folder / f"{number:04d}.json").write_text(json.dumps({"alignments": alignments}) + "\n")
            segments.append(info)
            recordings.append({"path": name, "duration": round(len(audio) / codec.SAMPLE_RATE, 3)})
    for name, rows in (("segments.jsonl", segments), ("data.jsonl", recordings)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_opus(path: Path, audio: np.ndarray) -> None:
    """Write audio [N, 2] at 8 kHz as Ogg/Opus of two channels that know nothing of each other.

    Through PyAV for the sake of mapping family 255: libsndfile writes family 0, whose encoder folds two hard-panned
    channels into one at such rates. libsndfile reads both.
    """
    container = av.open(str(path), "w", format="ogg")
    options = {"mapping_family": "255", "application": "voip", "frame_duration": "60", "compression_level": "10"}
    stream = container.add_stream("libopus", rate=48000, options=options)
    stream.bit_rate, stream.layout = BIT_RATE, "stereo"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio.T, np.float32), format="fltp", layout="stereo")
    frame.sample_rate = codec.SAMPLE_RATE
    resampler = av.AudioResampler(format=stream.format.name, layout="stereo", rate=48000)
    fifo = av.AudioFifo()
    for part in [*resampler.resample(frame), *resampler.resample(None)]:
        part.pts = None
        fifo.write(part)
    while (part := fifo.read(stream.codec_context.frame_size or 2880, partial=True)) is not None:
        part.pts = None
        container.mux(stream.encode(part))
    container.mux(stream.encode(None))
    container.close()


def write_data(
    folder: Path, train: list[Spoken], held_out: list[Spoken], agent: AgentVoice, counts: tuple[int, int]
) -> None:
    """`train/` and `heldout/` under `folder`; counts: segments an axis in each."""
    with replacing(folder) as fresh:
        write_recordings(fresh / "train", train, agent, counts[0], 101, "train")
        write_recordings(fresh / "heldout", held_out, agent, counts[1], 102, "heldout")
