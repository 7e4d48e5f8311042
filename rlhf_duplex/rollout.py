"""The policy meets the environment: groups of episodes, and a policy-free way to score them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from queue import Queue

import numpy as np
import torch

from envs.episode import Episode
from envs.segments import Segment
from envs.vector import DuplexDialogueVectorEnv
from rlhf_duplex.policy.moshi import MoshiPolicy

MIN_BATCH = 32


def episode_seed(*key: int) -> int:
    """A seed from a tuple of counters (run seed, update, group, member): independent streams, no state to save."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@dataclass
class Stage:
    """Where dialogues are played: a policy, an environment, and twins of both for every further thread.

    On a CPU the operations of a small model are too short to be split over cores by OpenMP, whose threads wait for one
    another thousands of times a second (on a busy machine that made rollouts ten times slower). Dialogues do not
    depend on one another, so the batch is split instead, a part for each thread, and each operation runs on one core.

    Attributes:
        policy, env: of the first thread.
        threads: how many play side by side; 1 on a GPU.
    """

    policy: MoshiPolicy
    env: DuplexDialogueVectorEnv
    threads: int = 1
    _pairs: list[tuple[MoshiPolicy, DuplexDialogueVectorEnv]] = field(init=False)

    def __post_init__(self) -> None:
        twins = [(self.policy.twin(), self.env.twin()) for _ in range(self.threads - 1)]
        self._pairs = [(self.policy, self.env), *twins]

    def rollout(
        self,
        segments: Sequence[Segment],
        seeds: Sequence[int],
        contexts: Sequence[float],
        policy_version: int = 0,
        batch_size: int = 256,
        on_frame: Callable[[int], None] | None = None,
    ) -> list[Episode]:
        """One episode for each (segment, seed, context), in the order given.

        Args:
            segments, seeds, contexts: one of each for an episode; what an episode becomes depends on its own three
                only, not on what is played beside it.
            policy_version: written into the episodes.
            batch_size: dialogues that a thread plays at once, at most.
            on_frame: called with the number of dialogues after each frame, for a progress bar.
        """
        lengths = [s.duration + min(context, s.start) for s, context in zip(segments, contexts, strict=True)]
        # Long dialogues together: a batch takes as many frames as its longest. Two batches a thread, so that whoever
        # had the short ones takes more, but none so small that it costs more than it saves.
        order = sorted(range(len(segments)), key=lambda i: -lengths[i])
        size = min(batch_size, max(MIN_BATCH, -(-len(order) // (2 * self.threads))))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        free: Queue[tuple[MoshiPolicy, DuplexDialogueVectorEnv]] = Queue()
        for pair in self._pairs:
            free.put(pair)

        def play(rows: list[int]) -> list[Episode]:
            policy, env = free.get_nowait()  # as many pairs as threads: there always is one
            try:
                chosen = [segments[i] for i in rows]
                return _play(policy, env, chosen, [seeds[i] for i in rows], [contexts[i] for i in rows], on_frame)
            finally:
                free.put((policy, env))

        # What the user says is read and encoded once, before the threads ask for it.
        self.env.user_sides.get(list(zip(segments, contexts, strict=True)))
        with single_threaded_operations(self.threads), ThreadPoolExecutor(self.threads) as pool:
            played = list(pool.map(play, batches))
        episodes = {i: e for rows, found in zip(batches, played, strict=True) for i, e in zip(rows, found, strict=True)}
        return [replace(episodes[i], policy_version=policy_version) for i in range(len(segments))]


@contextmanager
def single_threaded_operations(threads: int) -> Iterator[None]:
    """One core for each operation while several threads run them."""
    if threads == 1:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _play(
    policy: MoshiPolicy,
    env: DuplexDialogueVectorEnv,
    segments: list[Segment],
    seeds: list[int],
    contexts: list[float],
    on_frame: Callable[[int], None] | None,
) -> list[Episode]:
    observation, infos = env.reset(options={"segments": segments, "context": contexts})
    frames = infos["frames"]
    policy.begin(seeds, int(frames.max()))
    try:
        ended = np.zeros(len(segments), dtype=bool)
        while not ended.all():
            observation, _, terminated, truncated, infos = env.step(policy.act(observation))
            ended = terminated | truncated
            if on_frame is not None:
                on_frame(len(segments))
        trajectory = policy.trajectory()
    finally:
        policy.end()
    codes, log_probs = trajectory.codes.cpu().numpy(), trajectory.log_probs.cpu().numpy()
    # An episode that ended earlier played on beside the longer ones; what is cut off here was never heard. Its last
    # frame keeps no code that was drawn or came in later, as if it had been played alone.
    return [
        replace(
            episode,
            text_tokens=codes[row, 0, :count].copy(),
            audio_tokens=_cut(
                codes[row, 1:], count, policy.lm.delays[1:], policy.lm.zero_token_id, policy.agent_codebooks
            ),
            log_probs=log_probs[row, :count].copy(),
        )
        for row, (episode, count) in enumerate(zip(infos["episodes"], frames.tolist(), strict=True))
    ]


def _cut(codes: np.ndarray, frames: int, delays: Sequence[int], missing: int, agent_codebooks: int) -> np.ndarray:
    """The first `frames` columns, without the codes that came to be only afterwards (delayed ones, and the user's)."""
    cut = codes[:, :frames].copy()
    for stream, delay in enumerate(delays):
        late = delay if stream < agent_codebooks else max(delay, 1)
        if late:
            cut[stream, -late:] = missing
    return cut
