"""The two roles of a run, whoever plays them: a rollout worker and a learner. No transport here.

A unit is what a worker plays at once. An episode depends on its own segment, seed and context alone: it does not matter
who plays a unit, nor how often it is begun again after somebody died.
"""

import itertools
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from envs.context import ContextSchedule
from envs.dialogues import UserSides
from envs.episode import Episode
from envs.segments import Segment
from envs.speech import SpeechDetector
from envs.vector import DuplexDialogueVectorEnv
from rewards.aggregate import EarlyScores, RewardFunction, added_up
from rewards.axis import Figure, LeftOut, Score
from rlhf_duplex.batch import Batch
from rlhf_duplex.checkpoint import restore, save_checkpoint
from rlhf_duplex.config import Config
from rlhf_duplex.data.codes import open_cache
from rlhf_duplex.learner import Learner
from rlhf_duplex.live import training_environment
from rlhf_duplex.parallel import Alone
from rlhf_duplex.policy.bundle import Bundle, load_bundle
from rlhf_duplex.policy.codec import first_tokens
from rlhf_duplex.policy.lora import add_lora, merge_into, merged_copy
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.prompt import make_prompt
from rlhf_duplex.policy.sampling import Sampling
from rlhf_duplex.rollout import rollout

Scores = Mapping[str, Score | None]


@dataclass(frozen=True)
class Unit:
    """Episodes that a worker plays at once.

    Attributes:
        places: of the episodes among all that were asked for.
        segments, seeds, contexts: one of each for an episode.
        audio: whether the episodes come back with their audio; an update needs none.
        live: in the live environment rather than the replaying one.
    """

    places: tuple[int, ...]
    segments: tuple[Segment, ...]
    seeds: tuple[int, ...]
    contexts: tuple[float, ...]
    audio: bool = False
    live: bool = False


@dataclass(frozen=True)
class Played:
    """What became of a unit.

    Attributes:
        places: as in the unit.
        episodes, scores: in the same order.
        figures: what the reward axes say of their work since the unit before.
        seconds: that each stage took where it was played: `play`, of it `decode` and `detect`; `judge`, the wait for
            scores.
        left_out: by axis, the episodes that it could not score.
    """

    places: tuple[int, ...]
    episodes: list[Episode]
    scores: list[Scores]
    figures: dict[str, Figure] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, LeftOut] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollouts:
    """The episodes of an update, in the order of groups and members, and their scores.

    Attributes:
        figures: what the reward axes say of their work.
        seconds: by stage.
    """

    episodes: list[Episode]
    scores: list[Scores]
    figures: dict[str, float]
    seconds: dict[str, float]


def make_units(
    segments: Sequence[Segment],
    seeds: Sequence[int],
    contexts: Sequence[float],
    batch_size: int,
    workers: int = 1,
    audio: bool = False,
    live: bool = False,
) -> list[Unit]:
    """Cut what is to be played into units of at most `batch_size` episodes (0: as many as there are workers).

    Long dialogues come first and together, since a batch takes as many frames as its longest; the units that workers
    play side by side are of like lengths. The episodes of one segment go to one worker where that keeps all busy: each
    worker that plays some reads, detects and encodes the user's side.
    """
    lengths = [s.duration + min(context, s.start) for s, context in zip(segments, contexts, strict=True)]
    order = sorted(range(len(segments)), key=lambda i: -lengths[i])
    workers = max(1, workers)
    together = min(len(order), batch_size * workers) if batch_size else len(order)
    units = []
    for start in range(0, len(order), max(1, together)):
        rows = order[start : start + together]
        for own in _dealt(rows, [(segments[i].id, contexts[i]) for i in rows], workers):
            chosen, drawn = tuple(segments[i] for i in own), tuple(seeds[i] for i in own)
            units.append(Unit(tuple(own), chosen, drawn, tuple(contexts[i] for i in own), audio, live))
    return units


def _dealt(rows: Sequence[int], sides: Sequence[Hashable], workers: int) -> list[list[int]]:
    """The rows of each worker that gets any, as many for each (or one more).

    Neighbours with the same user's side are a group. As many whole groups as all workers get alike are dealt like
    cards; what is left is cut into equal parts.
    """
    keyed = zip(sides, rows, strict=True)
    groups = [[row for _, row in group] for _, group in itertools.groupby(keyed, key=lambda pair: pair[0])]
    alike = len({len(group) for group in groups}) == 1
    whole = len(groups) // workers * workers if alike else 0
    rest = [row for group in groups[whole:] for row in group]
    own = []
    for worker in range(workers):
        dealt = [row for group in groups[worker:whole:workers] for row in group]
        own.append(dealt + rest[worker * len(rest) // workers : (worker + 1) * len(rest) // workers])
    return [part for part in own if part]


def in_order(played: Sequence[Played], count: int) -> Rollouts:
    """All that was played, every episode once, in its place.

    Raises:
        RuntimeError: one is there twice, or missing.
    """
    places = [place for unit in played for place in unit.places]
    if sorted(places) != list(range(count)):
        raise RuntimeError(f"{count} episodes were asked for and {len(places)} came, {len(set(places))} different ones")
    episodes = {place: e for unit in played for place, e in zip(unit.places, unit.episodes, strict=True)}
    scores = {place: s for unit in played for place, s in zip(unit.places, unit.scores, strict=True)}
    figures = added_up([unit.figures for unit in played])
    order = range(count)
    return Rollouts([episodes[i] for i in order], [scores[i] for i in order], figures, {})


def all_left_out(played: Sequence[Played]) -> dict[str, LeftOut]:
    """By axis, the episodes of all units that it could not score."""
    found: dict[str, LeftOut] = {}
    for unit in played:
        for name, left in unit.left_out.items():
            found[name] = found[name] + left if name in found else left
    return found


def load_policy(config: Config, device: str = "", number_type: str = "") -> tuple[Bundle, MoshiPolicy]:
    """The bundle of a run with its adapters, and the policy that acts with it; on another device or in another number
    type than the configuration's, if given."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[number_type or config.dtype]
    bundle = load_bundle(config.checkpoint, device or config.device, dtype)
    if config.lora.rank:
        add_lora(bundle.lm, seed=config.seed, **vars(config.lora))
    prompt = make_prompt(bundle, config.prompt)
    return bundle, MoshiPolicy(bundle.lm, Sampling(**vars(config.sampling)), prompt)


class RolloutRole:
    """A policy, a vector environment, and the scores of what they play."""

    def __init__(
        self,
        config: Config,
        segments: Sequence[Segment],
        detector: SpeechDetector,
        reward_function: RewardFunction,
        policy: MoshiPolicy,
        bundle: Bundle,
    ) -> None:
        self.policy, self.reward_function = policy, reward_function
        self.actor = policy  # a copy with the adapters in the weights plays faster, and takes as much memory again
        if config.lora.rank and config.rollout.merged:
            self.actor = MoshiPolicy(merged_copy(policy.lm), policy.sampling, policy.prompt)
        self.batch_size = config.rollout.batch_size
        self.version = 0
        context = config.context
        schedule = ContextSchedule(context.probability, context.max_seconds, context.schedule)
        codec = bundle.codec
        users = UserSides(codec, detector, context.lead_in, store=open_cache(config.codes_cache, codec))
        self.env = DuplexDialogueVectorEnv(list(segments), codec, detector, context=schedule, user_sides=users)
        self.training_env = training_environment(config, self.env, segments)
        self._begun: list[tuple[Unit, list[Episode], EarlyScores, dict[str, float]]] = []

    def load_weights(self, version: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Take over the learner's weights, those that training changes.

        Raises:
            KeyError: one is not of this model.
        """
        own = self.policy.lm.state_dict()
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)
        self.version = version

    def play(self, unit: Unit, on_frame: Callable[[int], None] | None = None) -> None:
        """Play a unit and begin to score it; `collect` gives both."""
        # Whatever draws from a global generator (an axis of the user's own) draws the same wherever the unit is played.
        random.seed(unit.seeds[0])
        np.random.seed(unit.seeds[0])
        torch.manual_seed(unit.seeds[0])
        started = time.perf_counter()
        env, early = self.training_env if unit.live else self.env, EarlyScores(self.reward_function)
        env.seconds.clear()
        if self.actor is not self.policy:
            merge_into(self.actor.lm, self.policy.lm)
        episodes = rollout(
            self.actor,
            env,
            unit.segments,
            unit.seeds,
            unit.contexts,
            self.version,
            self.batch_size,
            on_frame,
            on_batch=early.add,
        )
        seconds = {"play": time.perf_counter() - started, **env.seconds}
        self._begun.append((unit, episodes, early, seconds))

    def collect(self) -> list[Played]:
        """All units that were played since the last call, scored."""
        found = []
        for unit, episodes, early, seconds in self._begun:
            started = time.perf_counter()
            scores: list[Scores] = list(early.finish())
            seconds["judge"] = time.perf_counter() - started
            left = self.reward_function.left_out()
            kept = episodes if unit.audio else [_without_audio(episode) for episode in episodes]
            found.append(Played(unit.places, kept, scores, self.reward_function.figures(), seconds, left))
        self._begun = []
        return found


def _without_audio(episode: Episode) -> Episode:
    nothing = np.zeros(0, dtype=np.float32)
    return replace(episode, user_audio=nothing, agent_audio=nothing)


class LearnerRole:
    """A policy that is trained, alone or as a member of a group."""

    def __init__(self, config: Config, policy: MoshiPolicy, bundle: Bundle, parallel: Alone | None = None) -> None:
        self.bundle = bundle
        apart = first_tokens(bundle.tokenizer, config.trainer.onset_words)
        self.learner = Learner(policy, config.trainer, config.optimiser, config.seed, config.ppo, parallel, apart)

    def learn(self, batch: Batch, update: int) -> dict[str, float]:
        """One update; see `Learner.update`."""
        return self.learner.update(batch.to(self.learner.policy.device), update)

    def save(self, run_dir: Path, update: int) -> Path:
        """A checkpoint of now."""
        return save_checkpoint(run_dir, update, self.bundle, self.learner)

    def restore(self, folder: Path) -> int:
        """Go back to a checkpoint; gives its update."""
        return restore(folder, self.bundle, self.learner)
