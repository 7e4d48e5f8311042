"""A page of preference pairs to look at and listen to: chosen beside rejected, audio decoded from their own tokens."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader

from envs.episode import Episode
from envs.files import write_text
from envs.segments import SEGMENT_AXES, Segment
from envs.speech import SileroDetector, SpeechDetector
from rlhf_duplex.data.pair import KINDS, Pair
from rlhf_duplex.data.streams import Streams
from rlhf_duplex.report.labels import axis_title
from rlhf_duplex.report.timeline import audio_uri, outcome, timeline_svg, words_are_cut

_TITLES = {"interruption": "Interruption", "unresponsive": "Unresponsive", "content": "Content"}
_SIDES = ("chosen", "rejected")


def build_pairs_page(path: Path, pairs: Sequence[Pair], streams: Streams, per_kind: int) -> Path:
    """Write the page beside a file of pairs (`pairs.html` for `pairs.jsonl`).

    Args:
        path: of the pairs.
        pairs: all of them; `per_kind` of each kind are shown, drawn by a hash of their ids.
        streams: of the bundle that they were made with.
        per_kind: how many.
    """
    counts = Counter(pair.kind for pair in pairs)
    shown = {kind: sorted((p for p in pairs if p.kind == kind), key=_order)[:per_kind] for kind in KINDS}
    detector = SileroDetector()
    number = 0
    kinds = []
    for kind, chosen in shown.items():
        examples = []
        for pair in chosen:
            examples.append(_example(pair, streams, detector, f"p{number}"))
            number += 1
        if examples:
            title = _TITLES.get(kind) or axis_title(kind)
            kinds.append(
                {"title": title, "count": f"{counts[kind]} pair{'s' * (counts[kind] != 1)}", "examples": examples}
            )
    held = sum(pair.split == "heldout" for pair in pairs)
    environment = Environment(
        loader=PackageLoader("rlhf_duplex.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("pairs.html").render(
        name=path.name,
        summary=f"{len(pairs)} pairs, {held} of them held out.",
        choice=f"Up to {per_kind} pairs of each kind, drawn at random.",
        kinds=kinds,
    )
    out = path.with_suffix(".html")
    write_text(out, page)
    return out


def _order(pair: Pair) -> bytes:
    return hashlib.sha256(pair.id.encode(errors="replace")).digest()


def pair_episodes(pair: Pair, streams: Streams, detector: SpeechDetector) -> tuple[Episode, Episode]:
    """Chosen and rejected as episodes: both sides' audio decoded from the tokens, their speech detected in it.

    Time 0 is the beginning of the context; what the loss covers is the scored window.
    """
    columns = [torch.cat([pair.context, getattr(pair, side)], dim=1) for side in _SIDES]
    audio = []
    for tokens in columns:
        count = streams.agent_frames(tokens).shape[1]
        for codes in (streams.agent_frames(tokens), streams.user_frames(tokens)[:, :count]):
            audio.append(streams.codec.decode(codes[None].to(streams.codec.device))[0].float().cpu().numpy())
    rate = streams.codec.sample_rate
    speech = detector.detect(audio, rate)
    return (
        _episode(pair, columns[0], pair.chosen_span[0], audio[:2], speech[:2], streams),
        _episode(pair, columns[1], pair.rejected_span[0], audio[2:], speech[2:], streams),
    )


def _episode(
    pair: Pair, columns: torch.Tensor, first: int, audio: Sequence[Any], speech: Sequence[Any], streams: Streams
) -> Episode:
    provenance = pair.provenance
    duration = len(audio[0]) / streams.codec.sample_rate
    scored_from = (pair.context.shape[1] + first + streams.max_delay) / streams.frame_rate
    start = _number(provenance.get("start"))
    events: dict[str, Any] = {}
    if pair.kind in SEGMENT_AXES and isinstance(provenance.get("events"), dict):
        events = provenance["events"]
    elif provenance.get("user_end") is not None:
        events = {"user_turn_end": _number(provenance["user_end"])}
    transcript = provenance.get("transcript") or []
    segment = Segment(
        pair.id,
        pair.kind if pair.kind in SEGMENT_AXES else "turn_taking",
        Path(str(provenance.get("recording", ""))),
        1,
        start + scored_from,
        start + duration,
        events,
        tuple(tuple(word) for word in transcript if isinstance(word, list | tuple)),
    )
    return Episode(
        segment,
        audio[1],
        audio[0],
        streams.codec.sample_rate,
        speech[1],
        speech[0],
        duration,
        scored_from,
        streams.codec.decode_text(columns[0].tolist()),
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _example(pair: Pair, streams: Streams, detector: SpeechDetector, identifier: str) -> dict[str, Any]:
    episodes = pair_episodes(pair, streams, detector)
    seconds = max(episode.duration for episode in episodes)
    sides = []
    for name, episode in zip(_SIDES, episodes, strict=True):
        told = pair.provenance.get(name)
        scores: Mapping[str, Any] = told.get("scores", {}) if isinstance(told, Mapping) else {}
        sides.append(
            {
                "name": name.capitalize(),
                "outcome": outcome(episode, scores) if scores else [_says(pair, name)],
                "svg": timeline_svg(episode, scores, seconds, f"{identifier}{name[0]}", "not in the loss"),
                "audio": audio_uri(episode),
                "words": episode.text if words_are_cut(episode.text) else "",
            }
        )
    judge = pair.provenance.get("judge")
    marks, why = "", ""
    if isinstance(judge, Mapping):
        marks = ", ".join(f"{axis} {mark}" for axis, mark in judge.get("scores", {}).items())
        why = f"The judge: {judge.get('reason', '')}"
    return {"id": pair.id, "split": pair.split, "why": why, "marks": marks, "sides": sides}


def _says(pair: Pair, side: str) -> str:
    """What one side of a pair from conversations is."""
    facts = pair.provenance
    if pair.kind == "interruption":
        moved = _number(facts.get("moved_by"))
        return (
            f"The same reply, {moved:.2f} s later." if side == "chosen" else "The reply begins while the user speaks."
        )
    if pair.kind == "unresponsive":
        latency = _number(facts.get("latency"))
        return f"A reply after {latency:.2f} s." if side == "chosen" else "The turn is left unanswered."
    return "The judge's rewrite." if side == "chosen" else "The reply as it was."
