"""The two-lane timeline of an episode as inline SVG, what was scored in words, and its audio. Every text is escaped."""

import base64
import io
import math
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import soundfile
from markupsafe import Markup

from envs.audio import resample
from envs.episode import Episode
from envs.speech import Interval
from rewards.timing import ROUNDING_SECONDS
from rewards.transcripts import CorpusWords
from rlhf_duplex.report.charts import nice_ticks
from rlhf_duplex.report.labels import axis_title, label, number, with_options

WIDTH, LEFT, RIGHT = 560, 48, 10
_USER_TOP, _AGENT_TOP, _LANE = 22, 88, 26
_MARKS_TOP, _WORDS_TOP, _AXIS_TOP = 118, 150, 172
_HEIGHT = 204
_LINE_CHARACTERS, _LINES = 84, 2

Record = Mapping[str, Any]  # of scores.json: {"value": ..., "details": {...}}


def timeline_svg(
    episode: Episode, scores: Mapping[str, Record], seconds: float, identifier: str, grey: str = "not scored"
) -> Markup:
    """The episode: user lane above, agent lane below, events and what was scored marked, words under each lane.

    Args:
        episode: what happened.
        scores: by axis, as in `scores.json`; intervals that the segment's axis names in `details` are marked.
        seconds: length of the time axis, so that two episodes of a segment can be drawn to the same scale.
        identifier: prefix of the ids in the SVG, unique in the page.
        grey: what the part before `scored_from` is.
    """
    scale = (WIDTH - LEFT - RIGHT) / max(seconds, 1e-6)

    def at(time: float) -> float:
        return LEFT + min(max(time, 0.0), seconds) * scale

    parts = [_background(episode, at, grey)]
    parts += [_block("user", i, at, _USER_TOP) for i in episode.user_speech]
    parts += [_block("agent", i, at, _AGENT_TOP) for i in episode.agent_speech]
    parts += _events(episode, at)
    parts += _scored_marks(episode, scores, at)
    parts.append(_words(user_words(episode), _USER_TOP + _LANE + 13))
    parts.append(_words(episode.text, _WORDS_TOP))
    parts.append(_time_axis(seconds, at))
    parts.append(
        Markup('<line class="playhead" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(LEFT, _USER_TOP - 6, _AXIS_TOP)
    )
    description = (
        f"{len(episode.user_speech)} stretches of user speech, {len(episode.agent_speech)} of agent speech in "
        f"{episode.duration:.1f} s; scored from {episode.scored_from:.1f} s. " + " ".join(outcome(episode, scores))
    )
    return Markup(
        '<svg class="timeline" viewBox="0 0 {w} {h}" role="img" aria-labelledby="{i}-t {i}-d" data-left="{l}" '
        'data-scale="{s:.4f}"><title id="{i}-t">Timeline of segment {name}</title><desc id="{i}-d">{d}</desc>{b}</svg>'
    ).format(
        w=WIDTH,
        h=_HEIGHT,
        i=identifier,
        l=LEFT,
        s=scale,
        name=episode.segment.id,
        d=description,
        b=Markup("").join(parts),
    )


def _background(episode: Episode, at, grey: str) -> Markup:
    parts = []
    if episode.scored_from > 0:
        x0, x1 = at(0), at(episode.scored_from)
        parts.append(
            Markup(
                '<rect class="unscored" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>'
            ).format(x0, _USER_TOP - 6, x1 - x0, _AXIS_TOP - _USER_TOP + 6, f"before what counts: {grey}")
        )
        if x1 - x0 > 58:
            parts.append(Markup('<text class="note" x="{:.1f}" y="12">{}</text>').format(x0 + 2, grey))
    for name, top in (("User", _USER_TOP), ("Agent", _AGENT_TOP)):
        parts.append(Markup('<text class="lane" x="2" y="{}">{}</text>').format(top + 17, name))
        parts.append(
            Markup('<line class="rail" x1="{0}" x2="{1:.1f}" y1="{2}" y2="{2}"/>').format(
                LEFT, at(episode.duration), top + _LANE / 2
            )
        )
    return Markup("").join(parts)


def _block(kind: str, interval: Interval, at, top: float) -> Markup:
    x0, x1 = at(interval.start), at(interval.end)
    return Markup(
        '<rect class="speech {}" x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="2"><title>{}</title></rect>'
    ).format(kind, x0, top, max(1.0, x1 - x0), _LANE, f"{kind} speech, {interval.start:.2f} to {interval.end:.2f} s")


def _events(episode: Episode, at) -> list[Markup]:
    """Pauses, the user's turn end, the true backchannels and the interruption, where the segment has them.

    What lies beyond the end of the episode (a side of a pair may be the shorter one) did not happen in it.
    """
    end = episode.duration + ROUNDING_SECONDS

    def happened(name: str) -> list[Interval]:
        spans = [span for span in episode.event_intervals(name) or [] if span.start < end]
        return [Interval(span.start, min(span.end, end)) for span in spans]

    parts = []
    for pause in happened("pauses"):
        parts.append(
            Markup('<rect class="pause" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>').format(
                at(pause.start),
                _USER_TOP + 4,
                max(1.0, at(pause.end) - at(pause.start)),
                _LANE - 8,
                f"the user's pause, {pause.start:.2f} to {pause.end:.2f} s",
            )
        )
    for true in happened("true_backchannels"):
        parts.append(
            Markup('<rect class="true" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>').format(
                at(true.start),
                _AGENT_TOP - 4,
                max(2.0, at(true.end) - at(true.start)),
                _LANE + 8,
                f"a true backchannel, {true.start:.2f} to {true.end:.2f} s",
            )
        )
    turn_end = episode.event_time("user_turn_end")
    if turn_end is not None and turn_end <= end:
        parts.append(
            Markup('<line class="event" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(
                at(turn_end), _USER_TOP - 6, _AGENT_TOP + _LANE + 6
            )
        )
        parts.append(_text("note", at(turn_end), 12, f"user's turn ends {turn_end:.2f} s", centre=True))
    for barge in happened("interruption")[:1]:
        x0, x1 = at(barge.start), at(barge.end)
        parts.append(Markup('<path class="event" d="M{0:.1f} 20V16H{1:.1f}V20"/>').format(x0, x1))
        parts.append(
            Markup('<line class="event" x1="{0:.1f}" x2="{0:.1f}" y1="20" y2="{1}"/>').format(
                x1, _AGENT_TOP + _LANE + 6
            )
        )
        parts.append(
            _text("note", (x0 + x1) / 2, 12, f"interruption {barge.start:.2f}\u2013{barge.end:.2f} s", centre=True)
        )
    return parts


def _scored_marks(episode: Episode, scores: Mapping[str, Record], at) -> list[Markup]:
    """Brackets under the agent lane: what the segment's axis counted, and the latency that it measured."""
    details = _details(scores, episode.segment.axis)
    marks = [(span, name) for key, name in _MARKS.items() for span in _pairs(details.get(key)) if span.start < span.end]
    waited = _waited(details, episode.duration)
    if waited is not None:
        marks.append(waited)
    parts, free = [], 0.0
    for span, name in sorted(marks):
        x0, x1 = at(span.start), at(span.end)
        y, middle, half = _MARKS_TOP, (x0 + x1) / 2, 2.8 * len(name)
        parts.append(
            Markup('<path class="mark" d="M{0:.1f} {2}V{3}H{1:.1f}V{2}"><title>{4}</title></path>').format(
                x0, x1, y, y + 4, f"{name}, {span.start:.2f} to {span.end:.2f} s"
            )
        )
        if middle - half >= free:  # of labels that would meet, the first is written; the others are in the titles
            parts.append(_text("mark", middle, y + 15, name, centre=True))
            free = middle + half + 3
    return parts


def _waited(details: Record, end: float) -> tuple[Interval, str] | None:
    """From what the user waited for to the agent's answer, or to the `end` of the episode where none was rewarded."""
    latency, response = real(details.get("latency")), _pairs([details.get("response")])
    if "answer" in details:
        interruption, answer = _pairs([details.get("interruption")]), _pairs([details["answer"]])
        if not interruption:
            return None
        begun = interruption[0].end
        if not answer:
            return (Interval(begun, end), "no answer") if begun < end else None
        latency, response = answer[0].start - begun, answer
    if latency is None or not response or latency == 0:
        return None
    begun, ended = sorted((response[0].start, response[0].start - latency))
    return Interval(begun, ended), number(latency, "s")


_MARKS = {"takeovers": "takeover", "matched": "hit", "unmatched": "false alarm"}


def _text(kind: str, x: float, y: float, text: str, centre: bool = False) -> Markup:
    """A label, kept within the picture (5.6 units a character is the width of its font)."""
    half = 2.8 * len(text)
    x = min(max(x, LEFT + half), WIDTH - half) if centre else x
    anchor = "middle" if centre else "start"
    return Markup('<text class="{}" x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, text)


def _words(text: str, top: float) -> Markup:
    """At most two lines of words; what does not fit is cut with an ellipsis (the page has the whole text beside)."""
    lines = _lines(text)
    return Markup("").join(
        Markup('<text class="words" x="{}" y="{}">{}</text>').format(LEFT, top + 12 * index, line)
        for index, line in enumerate(lines)
    )


def _wrapped(text: str) -> list[str]:
    """Lines of at most the picture's width: capitals are half as wide again as small letters, ideographs twice."""
    text = " ".join(text.split())
    wide = sum(2.0 if unicodedata.east_asian_width(c) in "WF" else 1.4 if c.isupper() else 1.0 for c in text)
    return textwrap.wrap(text, max(1, int(_LINE_CHARACTERS * len(text) / wide))) if text else []


def _lines(text: str) -> list[str]:
    lines = _wrapped(text) or ["(no words)"]
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], lines[_LINES - 1][:-1] + "\u2026"]
    return lines


def words_are_cut(text: str) -> bool:
    """Whether the timeline shows only the beginning of a text."""
    return len(_wrapped(text)) > _LINES


def _time_axis(seconds: float, at) -> Markup:
    parts = [
        Markup('<line class="axis" x1="{0}" x2="{1:.1f}" y1="{2}" y2="{2}"/>').format(LEFT, at(seconds), _AXIS_TOP)
    ]
    for tick in nice_ticks(0.0, seconds, 8):
        parts.append(
            Markup(
                '<line class="axis" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
                '<text class="tick" x="{0:.1f}" y="{3}" text-anchor="middle">{4:g}</text>'
            ).format(at(tick), _AXIS_TOP, _AXIS_TOP + 4, _AXIS_TOP + 16, tick)
        )
    parts.append(_text("tick", (LEFT + at(seconds)) / 2, _HEIGHT - 3, "seconds of the episode", centre=True))
    return Markup("").join(parts)


def user_words(episode: Episode) -> str:
    """The user's words that were heard in the episode, from the segment's transcript (empty where there is none)."""
    try:
        (words,) = CorpusWords().words([episode])
    except (TypeError, ValueError):  # another layout: the transcript is optional, the report goes on without
        words = None
    return " ".join(word.text for word in words or [])


def outcome(episode: Episode, scores: Mapping[str, Record]) -> list[str]:
    """What was scored, in words: a sentence an axis, the segment's own axis first."""
    own = episode.segment.axis
    names = sorted(scores, key=lambda name: (name != own, name))
    sentences = []
    for name in names:
        value = real(scores[name].get("value"))
        if value is None:
            continue
        options = scores[name].get("options")
        reasons = [_WHY[name](_details(scores, name))] if name == own else []
        reasons += [with_options(options)] if isinstance(options, Mapping) and options else []
        why = "; ".join(reasons)
        shown = number(value, label(name, "reward").unit)
        sentences.append(f"{axis_title(name)}: reward {shown}{f' ({why})' if why else ''}.")
    return sentences or ["Not scored."]


def _why_pause(details: Record) -> str:
    spans = _pairs(details.get("takeovers"))
    if not spans:
        return "no takeover"
    return "takeover: agent speech of " + ", ".join(f"{span.duration:.2f} s" for span in spans)


def _why_turn(details: Record) -> str:
    latency = real(details.get("latency"))
    if latency is None:
        return "the turn is not taken"
    if details.get("barge_in") is True:
        return f"barge-in {-latency:.2f} s before the user's turn end"
    return f"latency {latency:.2f} s"


def _why_backchannel(details: Record) -> str:
    names = (("true_positives", "hits"), ("false_positives", "false alarms"), ("false_negatives", "missed"))
    counts = [(real(details.get(key)), word) for key, word in names]
    return ", ".join(f"{word} {count:.0f}" for count, word in counts if count is not None)


def _why_interruption(details: Record) -> str:
    latency, response = real(details.get("latency")), _pairs([details.get("response")])
    if latency is None or not response:
        return "no answer"
    interruption, answer = _pairs([details.get("interruption")]), _pairs([details.get("answer")])
    if "answer" not in details or answer == response or not interruption:
        return f"latency {latency:.2f} s"
    if answer:
        what = f"latency {max(0.0, answer[0].start - interruption[0].end):.2f} s"
    else:
        what = f"no answer longer than {real(details.get('answer_seconds')) or 0.0:g} s"
    return f"{what}; first speech after {latency:.2f} s"


_WHY = {
    "pause_handling": _why_pause,
    "turn_taking": _why_turn,
    "backchannel": _why_backchannel,
    "user_interruption": _why_interruption,
}


def _details(scores: Mapping[str, Record], axis: str) -> Record:
    details = scores.get(axis, {}).get("details")
    return details if isinstance(details, Mapping) else {}


def real(value: Any) -> float | None:
    """A finite number, or None."""
    number_like = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number_like and math.isfinite(value) else None


def _pairs(value: Any) -> list[Interval]:
    """The intervals in a details entry; whatever is no pair of times is left out (an axis may put anything there)."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return []
    found = []
    for pair in value:
        if isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2:
            start, end = real(pair[0]), real(pair[1])
            if start is not None and end is not None:
                found.append(Interval(start, end))
    return found


def audio_uri(episode: Episode, max_rate: int = 16000) -> str:
    """The dialogue as a stereo data URI, left user and right agent, each also heard softly on the other side.

    Ogg Opus, a twentieth of the size of WAV; 16-bit WAV where libsndfile was built without it.
    """
    length = max(len(episode.user_audio), len(episode.agent_audio))
    lanes = np.zeros((2, length), dtype=np.float32)
    lanes[0, : len(episode.user_audio)] = episode.user_audio
    lanes[1, : len(episode.agent_audio)] = episode.agent_audio
    stereo = np.stack([lanes[0] + 0.3 * lanes[1], lanes[1] + 0.3 * lanes[0]]) / 1.3
    # Opus knows these rates only; above 16 kHz the page would grow for no gain in judging the timing.
    rate = next((r for r in (8000, 12000, 16000) if r >= min(episode.sample_rate, max_rate)), 16000)
    stereo = np.clip(resample(stereo, episode.sample_rate, rate), -1.0, 1.0).T
    for kind, subtype, mime, options in (
        ("OGG", "OPUS", "audio/ogg", {"compression_level": 0.95}),  # 26 kbit/s for both, half of the default
        ("WAV", "PCM_16", "audio/wav", {}),
    ):
        buffer = io.BytesIO()
        try:
            soundfile.write(buffer, stereo, rate, format=kind, subtype=subtype, **options)
        except (soundfile.LibsndfileError, ValueError):
            continue
        return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return ""
