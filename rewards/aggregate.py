"""Several axes as one reward: which ones, with what weight, and their weighted sum."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from envs.episode import Episode
from envs.errors import InputError
from envs.segments import Segment
from rewards.axis import Figure, LeftOut, Score, check_scores, make_axis


@dataclass(frozen=True)
class RewardSpec:
    """One axis of a `RewardFunction`, as the config writes it.

    Attributes:
        weight: its factor in the sum; 0 scores and logs the axis without training on it.
        target: `module:Class` or a Python file, for an axis that is not registered.
        options: keyword arguments of its constructor.
        advantage_eps: added to the standard deviation that the group's scores of this axis are divided by, in its own
            unit. With 1e-4 (GDPO) a group of answers that differ by hundredths of a second counts as much as one with
            a barge-in among them; with 0.3 it does not.
    """

    weight: float = 1.0
    target: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    advantage_eps: float = 1e-4

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> "RewardSpec":
        """From `{weight: 1.0, target: ..., advantage_eps: 1e-4, <option>: ...}`: all others are options."""
        if config is not None and not isinstance(config, Mapping):
            raise InputError(
                f"a reward axis is configured as {{weight: 1.0, ...}}, found {config!r}: "
                "did you mean rewards.<axis>.weight?"
            )
        options = dict(config or {})
        for key in options:
            if not isinstance(key, str) or key == "name":
                raise InputError(f"a reward axis has no option {key!r}: its name is the key that it stands under")
        own = {key: options.pop(key) for key in ("weight", "target", "advantage_eps") if key in options}
        return cls(options=options, **own)


def check_specs(specs: Mapping[str, RewardSpec]) -> None:
    """What can be known without making an axis.

    Raises:
        InputError: none at all, a weight that is not a finite number, or an `advantage_eps` that is not a positive one.
    """
    if not specs:
        raise InputError("no reward axis is configured: give at least one under `rewards`")
    for name, spec in specs.items():
        if not _is_finite(spec.weight):
            raise InputError(f"reward axis '{name}': `weight` must be a finite number, found {spec.weight!r}")
        if not _is_finite(spec.advantage_eps) or spec.advantage_eps <= 0:
            raise InputError(
                f"reward axis '{name}': `advantage_eps` must be a positive number, found {spec.advantage_eps!r}"
            )


class EarlyScores:
    """Scores of episodes that come in batch by batch: begun at once, waited for at the end.

    Give `add` to `rlhf_duplex.rollout.rollout` as `on_batch`, and a judge is asked while the next batch plays.
    """

    def __init__(self, function: "RewardFunction") -> None:
        self._function = function
        self._begun: list[tuple[list[int], Callable[[], list[dict[str, Score | None]]]]] = []

    def add(self, rows: Sequence[int], episodes: Sequence[Episode]) -> None:
        """Begin to score the episodes, which have the places `rows` among all."""
        self._begun.append((list(rows), self._function.begin(episodes)))

    def finish(self) -> list[dict[str, Score | None]]:
        """The scores of all episodes in their places."""
        found = {row: scores for rows, wait in self._begun for row, scores in zip(rows, wait(), strict=True)}
        return [found[row] for row in range(len(found))]


class RewardFunction:
    """All axes of a run.

    Attributes:
        axes: the axes by the name that the config gives them.
        weights: their factors in the sum, by the same names.
        advantage_eps: what is added to their standard deviations, by the same names.

    Raises:
        InputError: no axis at all, an unknown axis or option, a weight that is not a finite number, or an
            `advantage_eps` that is not a positive one.
    """

    def __init__(self, specs: Mapping[str, RewardSpec]) -> None:
        check_specs(specs)
        self.axes = {name: make_axis(name, spec.target, **spec.options) for name, spec in specs.items()}
        self.weights = {name: float(spec.weight) for name, spec in specs.items()}
        self.advantage_eps = {name: float(spec.advantage_eps) for name, spec in specs.items()}

    def __call__(self, episodes: Sequence[Episode]) -> list[dict[str, Score | None]]:
        """The score of every axis, by name, for each of the B episodes; None where an axis does not apply.

        Raises:
            ValueError: an axis breaks its contract (`rewards.axis.check_scores`).
        """
        return self.begin(episodes)()

    def begin(self, episodes: Sequence[Episode]) -> Callable[[], list[dict[str, Score | None]]]:
        """Begin to score, and give a function that waits for what calling this would have given."""
        waiting = {}
        for name, axis in self.axes.items():
            with _named(name, "begin"):
                waiting[name] = axis.begin(episodes)

        def finish() -> list[dict[str, Score | None]]:
            columns = {}
            for name, wait in waiting.items():
                with _named(name, "score"):
                    scores = wait()
                columns[name] = check_scores(self.axes[name], scores, episodes)
            return [{name: column[index] for name, column in columns.items()} for index in range(len(episodes))]

        return finish

    def prepare(self, segments: Sequence[Segment]) -> None:
        """Let every axis look whether it can score episodes of these segments.

        Raises:
            InputError: one cannot.
        """
        for name, axis in self.axes.items():
            with _named(name, "prepare"):
                axis.prepare(segments)

    def figures(self) -> dict[str, Figure]:
        """Every axis' own figures since the last call, as `axis/figure`; `added_up` makes one of many.

        Raises:
            ValueError: one is neither a number nor a pair (sum, count); names axis and figure.
        """
        found: dict[str, Figure] = {}
        for name, axis in self.axes.items():
            for key, value in axis.metrics().items():
                pair = isinstance(value, tuple) and len(value) == 2
                try:
                    found[f"{name}/{key}"] = (float(value[0]), float(value[1])) if pair else float(value)  # type: ignore
                except (TypeError, ValueError) as error:
                    raise ValueError(
                        f"reward axis '{name}': the figure '{key}' of `metrics` must be a number, or a pair "
                        f"(sum, count) for a mean, found {value!r}"
                    ) from error
        return found

    def metrics(self) -> dict[str, float]:
        """The same as plain numbers."""
        return added_up([self.figures()])

    def left_out(self) -> dict[str, LeftOut]:
        """By axis, what it could not score since the last call; of those that say so."""
        return {name: found for name, axis in self.axes.items() if (found := axis.left_out()) is not None}

    def total(self, scores: Mapping[str, Score | None]) -> float:
        """The weighted sum over the axes that gave a score (0 where none did)."""
        return sum((self.weights[name] * score.value for name, score in scores.items() if score is not None), 0.0)

    def mean_total(self, episodes: Sequence[Episode], scores: Sequence[Mapping[str, Score | None]]) -> float:
        """The mean of `total` over B episodes; where an axis could not judge one, it has the mean of its like.

        Its like are the episodes of the same segment axis that it did score. So a judge that is away for a while moves
        nothing, where in `total` it would be a score of 0. An axis without any score of a segment axis does not apply.
        """
        values, kinds = self.values(scores), np.array([episode.segment.axis for episode in episodes])
        sums = 0.0
        for name, column in values.items():
            for kind in np.unique(kinds):
                scored = column[kinds == kind]
                if not np.isnan(scored).all():
                    sums += self.weights[name] * float(np.nanmean(scored)) * len(scored)
        return sums / len(scores) if scores else 0.0

    def values(self, scores: Sequence[Mapping[str, Score | None]]) -> dict[str, np.ndarray]:
        """The values alone, `(B,)` float64 for each axis, NaN where there is no score.

        Reshaped to `(groups, G)` this is what `rlhf_duplex.algorithms.advantages.combine_advantages` takes.
        """
        return {
            name: np.array([math.nan if (score := row[name]) is None else float(score.value) for row in scores])
            for name in self.axes
        }


def added_up(parts: Sequence[Mapping[str, Figure]]) -> dict[str, float]:
    """Figures of several batches or processes as one: numbers are added up, pairs (sum, count) give their mean.

    A mean over nothing is left out.
    """
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total, count = value if isinstance(value, tuple) else (value, None)
            sums[name] = sums.get(name, 0.0) + total
            if count is not None:
                counts[name] = counts.get(name, 0.0) + count
    means = {name: sums[name] / count for name, count in counts.items() if count}
    return {name: means.get(name, total) for name, total in sums.items() if name in means or name not in counts}


@contextmanager
def _named(name: str, what: str) -> Iterator[None]:
    """Whatever an axis raises says whose it is; an InputError does by itself."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        error.add_note(f"in `{what}` of reward axis '{name}'")
        raise


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
