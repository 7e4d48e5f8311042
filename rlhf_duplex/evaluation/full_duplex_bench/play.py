"""A policy hears the benchmark's inputs: `output.wav`, time-synchronous with `input.wav`, and `output.json`.

A lead-in of silence is played before each input and cut off again, with what the agent says in it: output.wav begins
where input.wav does and lasts as long. The lead-in moves the figures, so every result states it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile

from envs.audio import resample
from envs.episode import Episode, Word
from envs.files import replacing
from envs.frames import samples_in
from envs.speech import SpeechDetector
from envs.vector import DuplexDialogueVectorEnv
from rewards.transcripts import InnerMonologue, Transcriber
from rlhf_duplex.evaluation.full_duplex_bench.samples import Sample, read_output, write_words
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.rollout import episode_seed, rollout

OUTPUT_RATE = 24000  # what the models of the benchmark write


def play_benchmark(
    policy: MoshiPolicy,
    env: DuplexDialogueVectorEnv,
    samples: Sequence[Sample],
    root: Path,
    transcriber: Transcriber,
    seed: int = 1,
    batch_size: int = 64,
    on_frame: Callable[[int], None] | None = None,
) -> None:
    """Play all samples, and write what the agent said below `root`.

    Args:
        policy: acts.
        env: of the policy's codec; it plays the lead-in.
        samples: of a benchmark.
        root: `root/{task}/{ID}/output.wav` and `output.json` are written (`clean_output` for a clean input).
        transcriber: of the agent's side.
        seed: of the draws; a sample's depend on (seed, its place) alone.
        batch_size: dialogues at once.
        on_frame: called with the number of dialogues after each frame.
    """

    def write(rows: list[int], episodes: list[Episode]) -> None:
        for row, episode, words in zip(rows, episodes, transcriber.words(episodes), strict=True):
            _write(samples[row], episode, words or [], root)

    segments = [sample.segment() for sample in samples]
    seeds = [episode_seed(seed, index) for index in range(len(samples))]
    # A batch at a time is written: what was played is there even where the next batch is stopped.
    rollout(policy, env, segments, seeds, [0.0] * len(samples), 0, batch_size, on_frame, write)


def _write(sample: Sample, episode: Episode, words: Sequence[Word], root: Path) -> None:
    audio_path, words_path = sample.outputs(root)
    count = samples_in(sample.seconds, episode.sample_rate)
    audio = np.zeros(count, dtype=np.float32)
    heard = episode.agent_audio[samples_in(episode.scored_from, episode.sample_rate) :][:count]
    audio[: len(heard)] = heard
    shifted = [Word(w.text, w.start - episode.scored_from, w.end - episode.scored_from) for w in words]
    inside = [word for word in shifted if 0 <= word.start < sample.seconds]
    resampled = resample(audio, episode.sample_rate, OUTPUT_RATE)
    with replacing(audio_path) as temporary:  # in place last: where it is, the sample is whole
        soundfile.write(str(temporary), resampled, OUTPUT_RATE, format="WAV", subtype="PCM_16")
        write_words(words_path, [Word(w.text, w.start, min(w.end, sample.seconds)) for w in inside])


def transcribe_outputs(
    samples: Sequence[Sample], root: Path, target: Path, transcriber: Transcriber, detector: SpeechDetector
) -> int:
    """Write `output.json` below `target` for every `output.wav` of another system that has none; gives how many.

    Only speech recognition can do that: the inner monologue of another system is not known. The system's own folder is
    left as it is.
    """
    missing = [s for s in samples if not s.outputs(root)[1].exists() and not isinstance(transcriber, InnerMonologue)]
    for sample in missing:
        audio, rate = read_output(sample.outputs(root)[0])
        (speech,) = detector.detect([audio], rate)
        nothing = np.zeros(0, dtype=np.float32)
        episode = Episode(sample.segment(), nothing, audio, rate, [], speech, len(audio) / rate)
        (words,) = transcriber.words([episode])
        path = sample.outputs(target)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_words(path, words or [])
    return len(missing)
