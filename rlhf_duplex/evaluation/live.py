"""`evaluate --suite live`: dialogues with a user that reacts, and who had the floor in them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from envs.episode import Episode, Word
from envs.errors import InputError
from envs.floor import analyse_floor
from envs.speech import SileroDetector, make_detector
from rewards.content import alternating_turns
from rewards.judge import Field, Judge, JudgeConfig, Question, Rubric
from rlhf_duplex.config import Config
from rlhf_duplex.evaluation.cases import Case, save_cases, worst_first
from rlhf_duplex.evaluation.metrics import SegmentValues, write_results
from rlhf_duplex.evaluation.speech_quality import Predictor, predict_quality
from rlhf_duplex.evaluation.statistics import segment_means
from rlhf_duplex.evaluation.systems import System, load_policy
from rlhf_duplex.live import live_environment, second_policy
from rlhf_duplex.policy.bundle import find_bundle
from rlhf_duplex.rollout import episode_seed, rollout

DIALOGUES = 32

RUBRIC = Rubric(
    "live_dialogue",
    "A person (USER) and a speech model (MODEL) talk for a while. Judge the MODEL over the whole conversation by the "
    "words alone.",
    (
        Field("fluency", 1, 5, "how naturally turns follow each other: 1 = broken, 5 = as between two people"),
        Field("relevance", 1, 5, "how well the MODEL's turns answer what was said: 1 = not at all, 5 = always"),
    ),
)


def run_live(
    data: Path | None,
    prepare: Callable[[], Path],
    systems: Sequence[System],
    config: Config,
    console: Console,
    judge_options: JudgeConfig | None = None,
    quality: Predictor | None = None,
) -> dict[str, Any]:
    """Play live dialogues to every system; writes `NAME.json` and the worst dialogues, gives the results by name.

    Every system meets the same users, scripts and draws.

    Args:
        data: manifest of the segments whose users' utterances are spoken; None for nano's held-out ones.
        prepare: makes the run folder, once everything else is known to be right.
        systems, config: who talks, and how: `live.seconds` a dialogue, `evaluation.limit` dialogues (32 where it is 0).
        judge_options: of a judge of the words, where there is one.
        quality: predicts how the agent sounds, where there is one.

    Raises:
        InputError: what is wrong, before a model is loaded.
    """
    from rlhf_duplex.inputs import load_segments
    from rlhf_duplex.run_folder import progress

    detector = make_detector(config.detector.name, **config.detector.options)
    if not isinstance(detector, SileroDetector):
        raise InputError("--suite live hears frame by frame, which only Silero can: set detector.name=silero")
    notes: list[str] = []
    segments = load_segments("nano" if data is None else str(data), "heldout", detector, notes)
    for note in notes:
        console.print(note, soft_wrap=True, markup=False)
    if not any(segment.axis == "turn_taking" for segment in segments):
        raise InputError(f"{data}: a live user needs recorded turns, found no segment of the axis turn_taking")
    if config.live.user != "scripted":
        find_bundle(config.live.user)
        if judge_options is not None:
            raise InputError("--judge-url needs a user whose words are known: set live.user=scripted")
    judge = None if judge_options is None else Judge(judge_options)
    if judge is not None:
        judge.check()
    out = prepare()
    results = {}
    for system in systems:
        policy, codec = load_policy(system, config)
        lead_in, seconds, seed = config.live.lead_in, config.live.seconds, config.evaluation.seed
        count = config.evaluation.limit or DIALOGUES
        second = second_policy(config, codec)
        env, dialogues = live_environment(segments, codec, detector, count, seconds, lead_in, seed, second)
        chosen = [dialogue for dialogue in dialogues for _ in range(config.evaluation.samples)]
        seeds = [episode_seed(seed, i, sample) for i in range(count) for sample in range(config.evaluation.samples)]
        with progress(
            console, f"talking with {system.name}", len(chosen) * (seconds + lead_in) * codec.frame_rate
        ) as advance:
            size = min(config.rollout.batch_size or DIALOGUES, DIALOGUES)  # each has a codec's state, too
            episodes = rollout(policy, env, chosen, seeds, [0.0] * len(chosen), batch_size=size, on_frame=advance)
        values = live_values(episodes)
        failed = 0
        if judge is not None:
            failed = judge.meter.failed
            values["live"] |= _judge(judge, episodes)
            failed = judge.meter.failed - failed
        extra: dict[str, Any] = {
            "suite": "live",
            "system": system.name,
            "checkpoint": system.checkpoint,
            "lead_in_seconds": lead_in,
            "samples": len(episodes),
            "seconds": seconds,
            "user": config.live.user,
            "data": "nano" if data is None else str(data),
        }
        if judge is not None:
            extra["judge"] = {"model": judge.config.model, "failed": failed}
        if quality is not None:
            extra["speech_quality"] = quality.name
            values |= _quality(quality, episodes, detector)
        save_cases(out / "cases" / system.name, worst_first(_cases(episodes), 4))
        results[system.name] = write_results(out / f"{system.name}.json", values, extra)
    if judge is not None:
        judge.close()
    return results


def live_values(episodes: Sequence[Episode]) -> SegmentValues:
    """By metric of `envs.floor.Floor.metrics`, the mean over each dialogue's episodes, under the axis `live`."""
    found: dict[str, dict[str, list[float]]] = {}
    for episode in episodes:
        floor = analyse_floor(episode.user_speech, episode.agent_speech, episode.scored_from, episode.duration)
        figures = floor.metrics() | {"user_yields": float(len(episode.segment.events.get("yields", [])))}
        for metric, value in figures.items():
            found.setdefault(metric, {}).setdefault(episode.segment.id, []).append(value)
    return {"live": {m: {k: sum(v) / len(v) for k, v in column.items()} for m, column in found.items()}}


def _judge(judge: Judge, episodes: Sequence[Episode]) -> dict[str, dict[str, float]]:
    questions = []
    for episode in episodes:
        user = [
            Word(str(text), episode.at(float(start)), episode.at(float(end)))
            for text, (start, end), _ in episode.segment.transcript
        ]
        questions.append(Question(RUBRIC, tuple(alternating_turns(user, list(episode.words)))))
    found: dict[str, dict[str, list[float]]] = {}
    for episode, verdict in zip(episodes, judge.ask(questions), strict=True):
        if verdict is not None:
            for name, score in verdict.scores.items():
                found.setdefault(f"judged_{name}", {}).setdefault(episode.segment.id, []).append(float(score))
    return {metric: {k: sum(v) / len(v) for k, v in column.items()} for metric, column in found.items()}


def _quality(predictor: Predictor, episodes: Sequence[Episode], detector: SileroDetector) -> SegmentValues:
    audio, rates = [e.agent_audio for e in episodes], [e.sample_rate for e in episodes]
    found = zip(episodes, predict_quality(predictor, audio, rates, detector), strict=True)
    scored = [(e.segment.id, score) for e, score in found if score is not None]
    return {"speech_quality": {"mos": segment_means([s for _, s in scored], [i for i, _ in scored])}} if scored else {}


def _cases(episodes: Sequence[Episode]) -> list[Case]:
    cases = []
    for episode in episodes:
        floor = analyse_floor(episode.user_speech, episode.agent_speech, episode.scored_from, episode.duration)
        if floor.seconds_lost is None:
            continue
        why = (
            f"{floor.seconds_lost:.2f} s lost a turn: {len(floor.offsets)} of {floor.turns} turns answered, "
            f"{floor.barge_ins} barge-ins, {floor.overlap:.1f} s of overlap."
        )
        cases.append(Case("live", episode.segment.id, floor.seconds_lost, why, episode))
    return cases
