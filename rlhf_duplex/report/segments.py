"""The page of `curate`: what was found, and a random handful of segments of each axis to look at and listen to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader

from envs.episode import Episode
from envs.errors import InputError
from envs.files import write_text
from envs.segments import Segment
from envs.speech import Interval
from envs.utterances import clip_intervals
from rewards import Backchannel, PauseHandling, TurnTaking, UserInterruption
from rlhf_duplex.data.curate_options import CurateOptions
from rlhf_duplex.data.detection import Detection
from rlhf_duplex.data.summary import axis_rows, facts
from rlhf_duplex.report.labels import axis_title
from rlhf_duplex.report.timeline import audio_uri, outcome, timeline_svg, user_words, words_are_cut

if TYPE_CHECKING:
    from rlhf_duplex.data.summary import Summary

SAMPLE_RATE = 16000


def build_segments_page(
    path: Path,
    segments: Sequence[Segment],
    shown: Mapping[str, tuple[Detection, int]],
    summary: "Summary",
    options: CurateOptions,
) -> Path:
    """Write the page; it loads nothing from elsewhere.

    Args:
        path: of the page.
        segments: all of the manifest.
        shown: by id, those to show: the detection of the recording, and which of its sides is the user.
        summary, options: of the run.

    Raises:
        InputError: the page cannot be written.
    """
    by_id = {segment.id: segment for segment in segments}
    chosen = sorted(shown, key=lambda name: segments.index(by_id[name]))
    examples = [_example(index, by_id[name], *shown[name]) for index, name in enumerate(chosen)]
    environment = Environment(
        loader=PackageLoader("rlhf_duplex.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("segments.html").render(
        name=path.stem,
        facts=[*facts(summary), ("Segments", str(len(segments))), ("Seed", str(options.seed))],
        axes=[(axis_title(axis), *rest) for axis, *rest in axis_rows(summary)],
        problems=summary.problems,
        examples=[example for example in examples if "error" not in example],
        unread=[example for example in examples if "error" in example],
    )
    try:
        write_text(path, page)
    except OSError as error:
        raise InputError(f"page {path} cannot be written ({error})") from error
    return path


def _example(index: int, segment: Segment, detection: Detection, user: int) -> dict[str, Any]:
    try:
        episode = curated_episode(segment, detection, user)
    except InputError as error:  # speech times of the corpus' own: its audio was not read before
        return {"segment": segment.id, "error": str(error)}
    axes = (PauseHandling(), TurnTaking(), Backchannel(), UserInterruption())
    scored = {axis.name: axis.score([episode])[0] for axis in axes if segment.axis in axis.applies_to}
    scores = {name: {"value": s.value, "details": s.details} for name, s in scored.items() if s is not None}
    words = [("User", user_words(episode)), ("Agent", episode.text)]
    return {
        "segment": segment.id,
        "axis": axis_title(segment.axis),
        "where": f"{segment.start:.2f}\u2013{segment.end:.2f} s of {segment.recording.name}",
        "outcome": outcome(episode, scores),
        "svg": timeline_svg(episode, scores, episode.duration, f"s{index}"),
        "audio": audio_uri(episode),
        "words": [(who, text) for who, text in words if words_are_cut(text)],
    }


def curated_episode(segment: Segment, detection: Detection, user: int) -> Episode:
    """The recording as an episode, with the speech that curate saw in it.

    Raises:
        InputError: its audio cannot be read.
    """
    user_audio, agent_audio = segment.user_audio(SAMPLE_RATE), segment.agent_audio(SAMPLE_RATE)

    def within(side: Sequence[Interval]) -> list[Interval]:
        clipped = clip_intervals(side, segment.start, segment.end)
        return [Interval(i.start - segment.start, i.end - segment.start) for i in clipped]

    return Episode(
        segment,
        user_audio,
        agent_audio,
        SAMPLE_RATE,
        within(detection.speech[user]),
        within(detection.speech[1 - user]),
        len(user_audio) / SAMPLE_RATE,
        text=" ".join(str(word[0]) for word in segment.transcript if word[2] == "agent"),
    )
