"""The reward axis: what it is, how one is found by name, and the checks on what it returns.

To add an axis, write a class like this one in a file of your own and name it in the config::

    @register_axis
    class Loudness(RewardAxis):
        \"\"\"Minus how far the agent's level is from the user's, in decibels.\"\"\"

        name = "loudness"
        applies_to = ("turn_taking", "user_interruption")

        def score_episode(self, episode):
            user, agent = (20 * np.log10(audio.std() + 1e-4) for audio in (episode.user_audio, episode.agent_audio))
            return Score(-abs(user - agent), {"user_db": float(user), "agent_db": float(agent)})

and in the config `rewards: {loudness: {weight: 1.0, target: my_axes.py}}`. Options of the constructor are written next
to `weight`. `rewards/README.md` goes from here to a trained ablation.
"""

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from envs.episode import Episode
from envs.errors import InputError
from envs.segments import SEGMENT_AXES, Segment
from rewards.details import plain_details

Figure = float | tuple[float, float]
ENTRY_POINT_GROUP = "rlhf_duplex.rewards"
WARN_SHARE = 0.03


@dataclass(frozen=True)
class Score:
    """What an axis says of an episode.

    Attributes:
        value: the reward; higher is better.
        details: what it was made of, by name (seconds, counts, intervals as `[start, end]`), for logs and timelines;
            None where there is no such number.
    """

    value: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LeftOut:
    """Episodes that an axis could not score although it applies to them.

    Attributes:
        count: of them; total: of the episodes that it applies to.
        reasons: why, each once, without any secret.
    """

    count: int
    total: int
    reasons: tuple[str, ...] = ()

    def __add__(self, other: "LeftOut") -> "LeftOut":
        reasons = dict.fromkeys([*self.reasons, *other.reasons])
        return LeftOut(self.count + other.count, self.total + other.total, tuple(reasons))

    @property
    def many(self) -> bool:
        """Whether somebody should be told."""
        return self.count > WARN_SHARE * self.total

    def __str__(self) -> str:
        why = f" ({'; '.join(self.reasons[:3])})" if self.reasons else ""
        return f"{self.count} of {self.total} episodes could not be judged and are left out{why}"


class RewardAxis:
    """One reason to prefer one episode to another.

    Class attributes:
        name: by which config, logs and reports know it.
        applies_to: axes of the segments that it scores.
    """

    name: ClassVar[str]
    applies_to: ClassVar[tuple[str, ...]] = SEGMENT_AXES

    def score(self, episodes: Sequence[Episode]) -> list[Score | None]:
        """A score for each episode, in order; None where the axis does not apply or could not judge.

        Override this one where a batch can be scored faster than one by one (a model, a judge over the network).
        """
        return [self.score_episode(e) if e.segment.axis in self.applies_to else None for e in episodes]

    def score_episode(self, episode: Episode) -> Score | None:
        """The score of one episode of a segment that the axis applies to."""
        raise TypeError(f"reward axis '{self.name}' defines neither score nor score_episode: define one of them")

    # The rest matters to axes that wait for something else than this processor; the others leave it as it is.

    def prepare(self, segments: Sequence[Segment]) -> None:
        """Called once, with all segments of the run, before a model is loaded: look whether `score` can work.

        Raises:
            InputError: it cannot; the run does not begin.
        """

    def begin(self, episodes: Sequence[Episode]) -> Callable[[], Sequence[Score | None]]:
        """Begin to score, and give a function that waits for what `score` would have given.

        Episodes are handed over as soon as they are played, batch by batch, and their scores asked for when all are: a
        judge over the network is asked while the next batch plays.
        """
        return lambda: self.score(episodes)

    def metrics(self) -> Mapping[str, Figure]:
        """Figures for the log since the last call, by name (calls, tokens, failures); none by default.

        Those of all batches and all processes become one. A number is added up; a mean, a share or a rate is given as
        `(sum, count)`, `{"latency": (seconds, calls)}`, and becomes the sum of all sums over that of all counts.
        """
        return {}

    def left_out(self) -> LeftOut | None:
        """What it could not score since the last call, for who collects from many processes; None by default."""
        return None


Axis = TypeVar("Axis", bound=type[RewardAxis])
_REGISTRY: dict[str, type[RewardAxis]] = {}


def register_axis(cls: Axis) -> Axis:
    """Class decorator: makes an axis known by its `name`.

    Raises:
        InputError: no name, or another class has it already.
    """
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name:
        raise InputError(f"reward axis {cls.__module__}.{cls.__qualname__} has no `name`: give it one")
    known = _REGISTRY.get(name)
    # The same file read twice (a path in the config, a notebook cell run again) defines the same class anew.
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise InputError(
            f"reward axis '{name}' is defined twice, by {known.__module__}.{known.__qualname__} and "
            f"{cls.__module__}.{cls.__qualname__}: rename one"
        )
    _REGISTRY[name] = cls
    return cls


def registered_axes() -> dict[str, type[RewardAxis]]:
    """All axes known by name: the built-in ones, and those of installed packages (entry points) that can be loaded."""
    broken_axes()
    return dict(_REGISTRY)


def broken_axes() -> dict[str, str]:
    """Axes that installed packages promise and that cannot be loaded, by name with the reason; loads the others."""
    import rewards  # registers the built-in axes

    del rewards
    broken = {}
    for name in _promised():
        try:
            _installed(name)
        except InputError as error:
            broken[name] = str(error).removeprefix(f"reward axis '{name}': ")
    return broken


def _promised() -> dict[str, EntryPoint]:
    """Entry points of installed packages, by name; none is loaded."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _installed(name: str) -> type[RewardAxis] | None:
    """An axis by its registered name, or from the entry point of that name, of which no other is loaded."""
    import rewards  # registers the built-in axes

    del rewards
    if name in _REGISTRY:  # before the entry points: to look for those reads every package that is installed
        return _REGISTRY[name]
    promised = _promised()
    if name not in promised:
        return None
    where = f"entry point '{name} = {promised[name].value}'"
    try:
        cls = promised[name].load()
    except Exception as error:  # whatever somebody's package does
        raise InputError(
            f"reward axis '{name}': {where} cannot be imported ({type(error).__name__}: {error}): mend its package"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, RewardAxis)):
        raise InputError(f"reward axis '{name}': {where} is not a subclass of rewards.RewardAxis")
    if getattr(cls, "name", name) != name:
        raise InputError(
            f"reward axis '{name}': {where} is a class whose name is '{cls.name}': give both the same name"
        )
    return register_axis(cls)


def find_axis(name: str, target: str | None = None) -> type[RewardAxis]:
    """The class of an axis: by its registered name, or from `target`.

    Args:
        name: as in the config.
        target: `module:Class`, or the path of a Python file that defines the axis of that name.

    Raises:
        InputError: nothing of that name, or the target cannot be imported or is no axis.
    """
    if target is None:
        known = _installed(name)
        if known is None:
            names = sorted({*_REGISTRY, *_promised()})
            raise InputError(
                f"unknown reward axis '{name}': the known ones are {', '.join(names)}; "
                "give `target: module:Class` or a file for one of your own"
            )
        return known
    try:
        if target.endswith(".py"):
            cls = _from_file(name, Path(target))
        else:
            module, _, attribute = target.partition(":")
            if not attribute:
                raise InputError(f"reward axis '{name}': target '{target}' is neither module:Class nor a .py file")
            # A console script, unlike `python -m`, does not look for modules in the working directory.
            if str(Path.cwd()) not in sys.path:
                sys.path.append(str(Path.cwd()))
            cls = getattr(importlib.import_module(module), attribute)
    except InputError:
        raise
    except (ImportError, AttributeError, OSError, SyntaxError, TypeError, ValueError) as error:
        raise InputError(f"reward axis '{name}': target '{target}' cannot be imported ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, RewardAxis)):
        raise InputError(f"reward axis '{name}': target '{target}' is not a subclass of rewards.RewardAxis")
    return cls


def _from_file(name: str, path: Path) -> Any:
    try:
        found = axes_in_file(path)
    except InputError as error:
        raise InputError(f"reward axis '{name}': {error}") from error
    if name not in found:
        raise InputError(f"reward axis '{name}': {path} defines no RewardAxis of that name, only {', '.join(found)}")
    return found[name]


def axes_in_file(path: Path) -> dict[str, type[RewardAxis]]:
    """The axes that a Python file defines, by name. The file is run.

    Raises:
        InputError: no such file, it cannot be run, or no axis in it.
    """
    if not path.is_file():
        raise InputError(f"file {path} does not exist: give the Python file of a reward axis")
    spec = importlib.util.spec_from_file_location(f"rewards_of_user_{path.stem}", path)
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    # Its neighbours can be imported, as under `python FILE`; last, so that none takes the place of what is installed.
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file does
        raise InputError(f"{path} cannot be run ({type(error).__name__}: {error})") from error
    classes = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, RewardAxis)]
    found = {cls.name: cls for cls in classes if cls.__module__ == spec.name and hasattr(cls, "name")}
    if not found:
        raise InputError(f"{path} defines no RewardAxis with a name: write a class with `name = ...` in it")
    return found


def make_axis(name: str, target: str | None = None, **options: Any) -> RewardAxis:
    """An axis with its options.

    Raises:
        InputError: as `find_axis`, an option that the axis does not take, or an `applies_to` that names no axis of
            segments.
    """
    cls: Callable[..., RewardAxis] = find_axis(name, target)
    known = inspect.signature(cls).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    unknown = sorted(set(options) - set(known))
    if unknown and not open_ended:  # without its value, which may be a key
        raise InputError(
            f"reward axis '{name}': unknown option `{unknown[0]}`: the options are {', '.join(known) or 'none'}"
        )
    axis = construct(cls, name, options)
    applies = axis.applies_to
    if not isinstance(applies, tuple) or not set(applies) <= set(SEGMENT_AXES):
        raise InputError(
            f"reward axis '{name}': `applies_to` must be a tuple of {', '.join(SEGMENT_AXES)}, found {applies!r}"
        )
    return axis


def construct(cls: Callable[..., RewardAxis], name: str, options: Mapping[str, Any]) -> RewardAxis:
    """An axis of a class.

    Raises:
        InputError: the constructor refuses an option (by a TypeError or ValueError).
    """
    try:
        return cls(**options)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"reward axis '{name}': {error}") from error


def checked_scores(axis: RewardAxis, episodes: Sequence[Episode]) -> list[Score | None]:
    """`axis.score`, with what it returns held against the contract.

    Raises:
        ValueError: a wrong length, a type that is no Score, a value that is not finite, or details that cannot be
            saved; names axis and episode.
    """
    return check_scores(axis, axis.score(episodes), episodes)


def check_scores(axis: RewardAxis, scores: Any, episodes: Sequence[Episode]) -> list[Score | None]:
    """What an axis gave for the episodes, held against the contract; raises as `checked_scores`.

    Numbers of whatever kind (numpy's, fractions) come back as plain ones: they are saved after a whole evaluation.
    """
    if not isinstance(scores, list | tuple):
        raise ValueError(f"reward axis '{axis.name}': score must return a list, found {type(scores).__name__}")
    if len(scores) != len(episodes):
        raise ValueError(f"reward axis '{axis.name}' gave {len(scores)} scores for {len(episodes)} episodes")
    found = []
    for score, episode in zip(scores, episodes, strict=True):
        try:
            found.append(None if score is None else _plain_score(score))
        except ValueError as error:
            raise ValueError(
                f"reward axis '{axis.name}', episode of segment '{episode.segment.id}': {error}"
            ) from error
    return found


def _plain_score(score: Any) -> Score:
    if not isinstance(score, Score):
        raise ValueError(f"expected a Score or None, found {type(score).__name__}")
    if not isinstance(score.value, Real):
        raise ValueError(f"the value must be a number, found {type(score.value).__name__}")
    try:
        value = float(score.value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"the value {value} is not finite; return None where an episode cannot be judged")
    try:
        return Score(value, plain_details(score.details))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"details cannot be saved as JSON ({error}): use numbers, strings, lists and dictionaries "
            "(`x.tolist()` for an array)"
        ) from error
