"""From rollouts to pairs: G episodes of a segment, the best against the worst by the reward axes."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs.episode import Episode
from envs.frames import frame_at
from envs.segments import Segment
from envs.vector import DuplexDialogueVectorEnv
from rewards.aggregate import RewardFunction
from rewards.axis import Score
from rewards.details import finite
from rlhf_duplex.data.pair import Pair
from rlhf_duplex.data.pair_options import PairOptions
from rlhf_duplex.data.parts import Part
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.rollout import episode_seed, rollout


def rollout_parts(
    policy: MoshiPolicy,
    env: DuplexDialogueVectorEnv,
    rewards: RewardFunction,
    segments: Sequence[Segment],
    options: PairOptions,
    folder: Path,
    on_frame: Callable[[int], None] | None = None,
) -> list[Part]:
    """A part for each segment, with up to `segment_pairs` pairs of its G episodes: the best against the worst, the
    second best against the second worst and so on, each where the two lie `margin` or more apart.

    An episode's seed comes from the segment's id, so that its pair does not depend on what else is played.
    `folder` is the manifest's.
    """
    size = options.group_size
    keys = [int.from_bytes(hashlib.sha256(s.id.encode()).digest()[:4], "big") for s in segments]
    seeds = [episode_seed(options.seed, key, member) for key in keys for member in range(size)]
    repeated = [segment for segment in segments for _ in range(size)]
    episodes = rollout(
        policy, env, repeated, seeds, [0.0] * len(repeated), batch_size=options.batch_size, on_frame=on_frame
    )
    scores = rewards(episodes)
    parts = []
    for index, segment in enumerate(segments):
        group = slice(index * size, (index + 1) * size)
        parts.append(_part(segment, episodes[group], scores[group], seeds[group], rewards, options, folder))
    return parts


def _part(
    segment: Segment,
    episodes: Sequence[Episode],
    scores: Sequence[Mapping[str, Score | None]],
    seeds: Sequence[int],
    rewards: RewardFunction,
    options: PairOptions,
    folder: Path,
) -> Part:
    counts = Counter({"segments": 1, f"segments: {segment.axis}": 1, "episodes": len(episodes)})
    judged = [i for i, row in enumerate(scores) if any(score is not None for score in row.values())]
    totals = {i: rewards.total(scores[i]) for i in judged}
    if len(judged) < 2:
        counts["dropped: no reward axis scores its episodes"] += 1
        return Part((), counts)
    ranked = sorted(judged, key=totals.__getitem__)
    pairs = []
    for rank in range(min(options.segment_pairs, len(ranked) // 2)):
        best, worst = ranked[-1 - rank], ranked[rank]
        if totals[best] - totals[worst] < max(options.margin, 1e-9):
            if rank == 0:
                counts[f"dropped: {segment.axis}, best and worst within the margin"] += 1
            break
        if np.array_equal(episodes[best].text_tokens, episodes[worst].text_tokens):  # type: ignore[arg-type]
            counts["dropped: best and worst have the same text stream"] += 1
            continue
        identifier = segment.id if rank == 0 else f"{segment.id}#{rank + 1}"
        pairs.append(_pair(identifier, segment, (best, worst), episodes, scores, totals, seeds, folder))
    return Part(tuple(pairs), counts)


def _pair(
    identifier: str,
    segment: Segment,
    chosen_rejected: tuple[int, int],
    episodes: Sequence[Episode],
    scores: Sequence[Mapping[str, Score | None]],
    totals: Mapping[int, float],
    seeds: Sequence[int],
    folder: Path,
) -> Pair:
    best, worst = chosen_rejected
    won, lost = _columns(episodes[best]), _columns(episodes[worst])
    shared = int((won != lost).any(dim=0).nonzero()[0])  # what both have in common is context
    episode = episodes[best]
    first = frame_at(_decided_from(episode), won.shape[1] / episode.duration)
    span = (max(0, first - shared), won.shape[1] - shared)
    provenance: dict[str, Any] = {
        "source": "rollouts",
        "dialogue": dialogue_of(segment, folder),
        "recording": str(segment.recording),
        "segment": segment.id,
        "axis": segment.axis,
        "events": segment.events,
        "transcript": list(segment.transcript),
        "start": segment.start - episode.scored_from,  # of the context, in seconds of the recording (minus: lead-in)
        "rewards": [totals.get(i) for i in range(len(episodes))],
        "chosen": _told(scores[best], episodes[best], seeds[best]),
        "rejected": _told(scores[worst], episodes[worst], seeds[worst]),
    }
    return Pair(
        id=identifier,
        kind=segment.axis,
        split="train",
        context=won[:, :shared],
        chosen=won[:, shared:],
        rejected=lost[:, shared:],
        chosen_span=span,
        rejected_span=span,
        provenance=provenance,
    )


def _decided_from(episode: Episode) -> float:
    """Episode time from which the reward of its axis looks: what both did before tells nothing of which is better."""
    interruption = episode.event_intervals("interruption") if episode.segment.axis == "user_interruption" else None
    return max(episode.scored_from, interruption[0].start) if interruption else episode.scored_from


def dialogue_of(segment: Segment, folder: Path) -> str:
    """What a segment's pair is split by: its recording (relative to the manifest's folder), whoever is the agent."""
    return Path(os.path.relpath(segment.recording, folder)).as_posix()


def _columns(episode: Episode) -> torch.Tensor:
    """The episode's tokens `(K, T)` as the model has them."""
    assert episode.text_tokens is not None
    assert episode.audio_tokens is not None
    return torch.from_numpy(np.concatenate([episode.text_tokens[None], episode.audio_tokens]))


def _told(scores: Mapping[str, Score | None], episode: Episode, seed: int) -> dict[str, Any]:
    return {
        "scores": {
            name: {"value": score.value, "details": finite(score.details)}
            for name, score in scores.items()
            if score is not None
        },
        "text": episode.text,
        "seed": seed,
    }
