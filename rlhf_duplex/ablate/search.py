"""A search space: conditions drawn from it at random, or proposed by Optuna from what the earlier ones gave.

    search:
      space:
        rewards.backchannel.weight: {uniform: [0.0, 2.0]}
        optimiser.learning_rate: {log_uniform: [1.0e-4, 1.0e-3]}
        trainer.passes: {choice: [1, 2]}
      points: 12
      sampler: random          # or optuna, on Ray (`workers` of at least 1)
      metric: turn_taking.latency
      mode: min

Random points depend on `seed` and their number alone. Optuna's are kept in the ablation's folder, under `points/`, so
that the ablation goes on from them.
"""

import hashlib
import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from envs.errors import InputError

SAMPLERS = ("random", "optuna")


@dataclass
class SearchConfig:
    """A search space.

    Attributes:
        space: by key of the configuration, `{uniform: [low, high]}`, `{log_uniform: [low, high]}` or `{choice: [...]}`.
        points: conditions to draw, beside the base; each is run with all seeds.
        sampler: `random` or `optuna`.
        seed: of the draws.
        metric, mode: what Optuna improves, `axis.metric` of the held-out evaluation (mean over seeds), `min` or `max`.
    """

    space: dict[str, Any] = field(default_factory=dict)
    points: int = 12
    sampler: str = "random"
    seed: int = 0
    metric: str = ""
    mode: str = "max"


def check_search(path: Path, search: SearchConfig, workers: int) -> None:
    """Hold a search against what can be.

    Raises:
        InputError: the first thing that is wrong.
    """
    for key, domain in search.space.items():
        _check_domain(path, key, domain)
    if search.points < 1 or search.sampler not in SAMPLERS or search.mode not in ("min", "max"):
        raise InputError(
            f"{path}: search needs points of at least 1, a sampler ({' or '.join(SAMPLERS)}) and a mode (min or max), "
            f"found {search.points}, {search.sampler!r}, {search.mode!r}"
        )
    if search.sampler == "optuna":
        if not search.metric.count(".") == 1:
            raise InputError(f"{path}: search.metric must be axis.metric, such as turn_taking.latency")
        if workers < 1:
            raise InputError(f"{path}: search.sampler optuna runs on Ray: set workers to at least 1")
        if importlib.util.find_spec("optuna") is None:
            raise InputError(f"{path}: search.sampler optuna is not installed: pip install optuna")


def _check_domain(path: Path, key: str, domain: Any) -> None:
    where = f"{path}: search.space: {key}"
    if not isinstance(domain, Mapping) or len(domain) != 1:
        raise InputError(f"{where} must be one of uniform, log_uniform, choice with its values, found {domain!r}")
    (kind, values), *_ = domain.items()
    if kind == "choice":
        if not isinstance(values, list) or not values:
            raise InputError(f"{where}: choice needs a list of values, found {values!r}")
        return
    real = isinstance(values, list) and len(values) == 2 and all(isinstance(v, int | float) for v in values)
    if kind not in ("uniform", "log_uniform") or not real or not values[0] < values[1]:
        raise InputError(f"{where} needs {{uniform or log_uniform: [low, high]}}, low < high, found {domain!r}")
    if kind == "log_uniform" and values[0] <= 0:
        raise InputError(f"{where}: log_uniform needs values above 0, found {values}")


def random_points(search: SearchConfig) -> list[dict[str, Any]]:
    """Overrides of each point; the first n of more points are those of n."""
    points = []
    for number in range(search.points):
        rng = np.random.default_rng((search.seed, number))
        points.append({key: _draw(rng, domain) for key, domain in search.space.items()})
    return points


def _draw(rng: np.random.Generator, domain: Mapping[str, Any]) -> Any:
    (kind, values), *_ = domain.items()
    if kind == "choice":
        return values[int(rng.integers(len(values)))]
    if kind == "log_uniform":
        return round_off(math.exp(rng.uniform(math.log(values[0]), math.log(values[1]))))
    return round_off(float(rng.uniform(*values)))


def round_off(value: Any) -> Any:
    """Four significant digits: what a table shows is what was run."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def point_name(overrides: Mapping[str, Any]) -> str:
    """A short name of a proposed point, the same for the same point."""
    return hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:8]


def kept_points(root: Path) -> list[dict[str, Any]]:
    """Points that Optuna has proposed before, in the order in which it did.

    Raises:
        InputError: one is damaged.
    """
    found = []
    for path in (root / "points").glob("*.json"):
        try:
            record = json.loads(path.read_text())
            found.append((record["number"], path.stem, record["overrides"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}): remove it") from error
    return [overrides for _, _, overrides in sorted(found, key=lambda row: row[:2])]
