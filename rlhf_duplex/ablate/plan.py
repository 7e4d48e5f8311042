"""What an ablation varies: its YAML file, and the conditions and trials that it makes, each checked before any runs.

    base: configs/quickstart.yaml            # of every trial
    run_dir: runs/ablations/mine
    seeds: [0, 1, 2]
    overrides: {trainer.updates: 20}         # for every trial
    grid:                                    # any key of the configuration; values are crossed
      rewards.backchannel.weight: [0, 1, 2]
    conditions:                              # beside it, or instead: a list, each with a name
      - {name: no_kl, overrides: {trainer.kl_beta: 0}}
    preset: leave_one_axis_out               # beside it, or instead: conditions made from the base

A condition is what differs from the base, a trial is a condition with a seed.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from envs.errors import InputError
from rlhf_duplex.ablate.ray_tune import AshaConfig, RayConfig
from rlhf_duplex.ablate.search import SearchConfig, check_search, kept_points, random_points
from rlhf_duplex.config import Config, load_config
from rlhf_duplex.config_files import load_structured
from rlhf_duplex.evaluation.metrics import check_metric


@dataclass
class BudgetConfig:
    """When to start no further trial; 0 is no limit.

    Attributes:
        trials: so many in all.
        hours: of all that has run in the folder, added up: trials and the evaluations before them, restarts too.
    """

    trials: int = 0
    hours: float = 0.0


@dataclass
class AblationConfig:
    """An ablation's file.

    Attributes:
        base: configuration of every trial (`rlhf-duplex train BASE` would be one).
        run_dir: where everything is written.
        seeds: a list, or how many from 0 on. All conditions are run with one seed before the next.
        overrides: keys of the configuration that all trials share.
        grid: by key of the configuration, its values; all combinations are run.
        conditions: each `{name, overrides}`.
        preset: `leave_one_axis_out`, `reward_weights`, or one with its options, `{name: ..., resolution: 2}`.
        search: conditions drawn from a space, see `rlhf_duplex.ablate.search`.
        baseline: name of the condition that the others are held against; by default the one that changes nothing, else
            the first.
        metrics: of the table of effects, each `axis.metric`; by default those of arXiv 2606.11167's tables,
            `backchannel.f1`, `words.known_pairs`, and the reward of every further axis, as far as they are measured.
        retries: how often a failed trial is started again.
        memory_gb: a trial that takes more fails by itself, instead of whatever else runs; 0: no limit.
        budget: when to stop.
        workers: trials at once, on Ray Tune; 0 runs one after another, without Ray.
        ray, asha: see `rlhf_duplex.ablate.ray_tune`.
    """

    base: str = ""
    run_dir: str = "runs/ablation"
    seeds: Any = field(default_factory=lambda: [0])
    overrides: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    conditions: list[Any] = field(default_factory=list)
    preset: Any = None
    search: SearchConfig | None = None
    baseline: str | None = None
    metrics: list[str] = field(default_factory=list)
    retries: int = 1
    memory_gb: float = 0.0
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    workers: int = 0
    ray: RayConfig = field(default_factory=RayConfig)
    asha: AshaConfig = field(default_factory=AshaConfig)


@dataclass(frozen=True)
class Condition:
    """What differs from the base: its name, and overrides by key of the configuration."""

    name: str
    overrides: dict[str, Any]


@dataclass(frozen=True)
class Skipped:
    """A condition that is not run, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Trial:
    """A run: a condition with a seed.

    Attributes:
        name: of its folder.
        condition, seed: which.
        config: its whole configuration.
    """

    name: str
    condition: Condition
    seed: int
    config: Config


@dataclass(frozen=True)
class Plan:
    """An ablation, checked.

    Attributes:
        config: its file.
        base: the configuration that the conditions change.
        conditions: in their order; skipped: what the preset leaves out with this base.
        trials: all, in the order in which they are run.
        seeds: of every condition; shared: `key=value` of every trial.
    """

    config: AblationConfig
    base: Config
    conditions: tuple[Condition, ...]
    skipped: tuple[Skipped, ...]
    trials: tuple[Trial, ...]
    seeds: tuple[int, ...] = (0,)
    shared: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def baseline(self) -> Condition:
        """The condition that the others are held against."""
        if self.config.baseline is not None:
            return next(c for c in self.conditions if c.name == self.config.baseline)
        same = (c for c in self.conditions if all(base_value(self.base, k) == v for k, v in c.overrides.items()))
        return next(same, self.conditions[0])


def load_plan(path: Path, arguments: Sequence[str] = ()) -> Plan:
    """Read an ablation's file, and make all its trials.

    Args:
        path: the YAML file.
        arguments: `key=value`, of the ablation (`seeds=[0]`, `run_dir=...`) or of the configuration of every trial
            (`trainer.updates=5`).

    Raises:
        InputError: the file or any trial's configuration is not what it must be.
    """
    own = {f.name for f in fields(AblationConfig)}
    mine = [a for a in arguments if a.partition("=")[0].partition(".")[0] in own or "=" not in a]
    rest = [a for a in arguments if a not in mine]
    config: AblationConfig = load_structured(AblationConfig, path, mine)
    _check(path, config)
    shared = [*as_arguments(flatten(config.overrides)), *rest]
    base = load_config(Path(config.base), shared)
    conditions, skipped = _conditions(path, config, base)
    seeds = list(range(config.seeds)) if isinstance(config.seeds, int) else list(config.seeds)
    trials = []
    made: set[str] = set()
    for seed in seeds:
        for condition in conditions:
            try:
                trials.append(make_trial(config, shared, condition, seed, made))
            except InputError as error:
                raise InputError(f"{path}: condition '{condition.name}': {error}") from error
    twice = _first_twice([trial.name for trial in trials])
    if twice is not None:
        raise InputError(f"{path}: two trials would be called '{twice}': give conditions other names")
    if config.baseline is not None and config.baseline not in [c.name for c in conditions]:
        raise InputError(f"{path}: baseline '{config.baseline}' is none of {', '.join(c.name for c in conditions)}")
    return Plan(config, base, tuple(conditions), tuple(skipped), tuple(trials), tuple(seeds), tuple(shared))


def trial_name(condition: Condition, seed: int) -> str:
    """Of a trial, its folder and its record."""
    return f"{slug(condition.name)}_seed{seed}"


def make_trial(
    config: AblationConfig, shared: Sequence[str], condition: Condition, seed: int, made: set[str] | None = None
) -> Trial:
    """A condition with a seed. In `made` are the axes that other trials were checked with, and now this one's.

    Raises:
        InputError: its configuration is not what it must be.
    """
    name = trial_name(condition, seed)
    loaded = load_config(Path(config.base), [*shared, *as_arguments(condition.overrides), f"seed={seed}"])
    _check_trial(loaded, set() if made is None else made)
    loaded.run_dir = str(Path(config.run_dir) / "trials" / name)
    loaded.resume = False
    loaded.checkpointing.keep = 1  # there are many trials
    return Trial(name, condition, seed, loaded)


def _check(path: Path, config: AblationConfig) -> None:
    if not config.base:
        raise InputError(f"{path} needs `base`, the configuration that is varied, such as configs/quickstart.yaml")
    seeds = config.seeds
    if isinstance(seeds, bool) or not (
        (isinstance(seeds, int) and seeds > 0)
        or (isinstance(seeds, list) and seeds and all(isinstance(s, int) and s >= 0 for s in seeds))
    ):
        raise InputError(f"{path}: `seeds` must be a list of numbers or how many, found {seeds!r}")
    if isinstance(seeds, list) and _first_twice(seeds) is not None:
        raise InputError(f"{path}: seed {_first_twice(seeds)} is given twice")
    limits = {"retries": config.retries, "memory_gb": config.memory_gb, "workers": config.workers}
    for key, value in {**limits, **vars(config.budget)}.items():
        if value < 0:
            raise InputError(f"{path}: `{key}` must be at least 0, found {value}")
    if config.asha.metric and (config.workers < 1 or config.asha.grace < 1 or config.asha.reduction < 2):
        raise InputError(f"{path}: asha needs workers and grace of at least 1 and reduction of at least 2")
    for metric in config.metrics:
        if not re.fullmatch(r"[^.]+\.[^.]+", metric):
            raise InputError(f"{path}: a metric is written axis.metric, such as turn_taking.latency, found {metric!r}")
        try:
            check_metric(*metric.split("."))
        except InputError as error:
            raise InputError(f"{path}: `metrics`: {error}") from None


def _check_trial(config: Config, made: set[str]) -> None:
    """What can be known of a trial without its recordings: reward axes and their options, and the checkpoint.

    An axis is made once with the same options: one may load a model, and there are many trials.
    """
    from rewards.aggregate import RewardSpec, check_specs
    from rewards.axis import make_axis
    from rlhf_duplex.policy.bundle import find_bundle

    specs = {name: RewardSpec.from_config(options) for name, options in config.rewards.items()}
    check_specs(specs)
    for name, spec in specs.items():
        key = json.dumps([name, spec.target, spec.options], sort_keys=True, default=str)
        if key not in made:
            make_axis(name, spec.target, **spec.options)
            made.add(key)
    find_bundle(config.checkpoint)


def _conditions(path: Path, config: AblationConfig, base: Config) -> tuple[list[Condition], list[Skipped]]:
    from rlhf_duplex.ablate.presets import preset_conditions

    found, skipped = ([], []) if config.preset is None else preset_conditions(config.preset, base)
    for number, row in enumerate(config.conditions, 1):
        named = isinstance(row, dict) and isinstance(row.get("name"), str) and not set(row) - {"name", "overrides"}
        if not named or not isinstance(row.get("overrides") or {}, dict):
            raise InputError(
                f"{path}: condition {number} must be {{name: ..., overrides: {{key: value}}}}, found {row}"
            )
        found.append(Condition(row["name"], flatten(row.get("overrides") or {})))
    grid = flatten(config.grid)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{path}: grid: {key} needs a list of values, found {values!r}")
    if grid:
        for values in itertools.product(*grid.values()):
            overrides = dict(zip(grid, values, strict=True))
            found.append(Condition(describe(overrides), overrides))
    if config.search is not None:
        check_search(path, config.search, config.workers)
        optuna = config.search.sampler == "optuna"
        points = kept_points(Path(config.run_dir)) if optuna else random_points(config.search)
        found += [Condition("base", {}), *(Condition(describe(point), point) for point in points)]
    if not found:
        raise InputError(f"{path}: nothing varies: give `grid`, `conditions`, `search` or `preset`")
    for condition in found:
        taken = sorted({"seed", "run_dir", "resume"} & set(condition.overrides))
        if taken:
            raise InputError(f"{path}: condition '{condition.name}': `{taken[0]}` cannot vary (use `seeds`)")
    twice = _first_twice([c.name for c in found])
    if twice is not None:
        raise InputError(f"{path}: two conditions are called '{twice}'")
    return found, skipped


def condition_values(plan: Plan) -> dict[str, dict[str, Any]]:
    """By condition, the value of every key that any condition changes."""
    keys = list(dict.fromkeys(key for condition in plan.conditions for key in condition.overrides))
    return {c.name: {key: c.overrides.get(key, base_value(plan.base, key)) for key in keys} for c in plan.conditions}


def base_value(base: Config, key: str) -> Any:
    """A key's value in a configuration; None where it has none."""
    value: Any = base
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    if value is None and key.endswith(".weight") and key.split(".")[1] in base.rewards:
        return 1.0
    return value


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"trainer": {"updates": 5}}` and `{"trainer.updates": 5}` alike as the latter; a later key wins."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        found |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def as_arguments(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as `key=value` arguments (a value in JSON, which is YAML)."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def describe(overrides: Mapping[str, Any]) -> str:
    """Overrides in short, as the name of a condition: `backchannel.weight 2, kl_beta 0.01`."""
    short = {key: re.sub(r"^(rewards|trainer|optimiser|evaluation)\.", "", key) for key in overrides}
    return ", ".join(f"{short[key]} {_shown(value)}" for key, value in overrides.items()) or "base"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def slug(name: str) -> str:
    """A name as that of a folder."""
    text = re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_.")
    if len(text) > 100:  # what is cut off may be what tells it from another
        text = f"{text[:91]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return text or "condition"


def _first_twice(values: Sequence[Any]) -> Any:
    return next((value for index, value in enumerate(values) if value in values[:index]), None)
