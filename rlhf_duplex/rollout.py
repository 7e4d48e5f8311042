"""The policy meets the environment: groups of episodes, and a policy-free way to score them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from envs.cores import one_core_operations
from envs.episode import Episode
from envs.frames import frames_in
from envs.segments import Segment
from envs.vector import DuplexDialogueVectorEnv
from rlhf_duplex.policy.memory import dialogues_that_fit
from rlhf_duplex.policy.moshi import MoshiPolicy


def episode_seed(*key: int) -> int:
    """A seed from a tuple of counters (run seed, update, group, member): no state to save.

    Tuples of one length have streams of their own. A shorter one is that with zeros after it: with equal run seeds the
    held-out suite's (place, sample) shares its noise with (update, group) of member 0, on other segments.
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def rollout(
    policy: MoshiPolicy,
    env: DuplexDialogueVectorEnv,
    segments: Sequence[Segment],
    seeds: Sequence[int],
    contexts: Sequence[float],
    policy_version: int = 0,
    batch_size: int = 256,
    on_frame: Callable[[int], None] | None = None,
    on_batch: Callable[[list[int], list[Episode]], None] | None = None,
) -> list[Episode]:
    """One episode for each (segment, seed, context), in the order given.

    Args:
        policy: acts.
        env: plays the user; how it scores is not used.
        segments, seeds, contexts: one of each for an episode; what an episode becomes depends on its own three only,
            not on what is played beside it.
        policy_version: written into the episodes.
        batch_size: dialogues that are played at once, at most; 0: as many as memory is free for on a GPU.
        on_frame: called with the number of dialogues after each frame, for a progress bar.
        on_batch: called with the places and episodes of each batch. Audio is decoded and speech detected while the next
            batch is played.
    """
    # Long dialogues together: a batch takes as many frames as its longest. Those of a group are equally long.
    lengths = [s.duration + min(context, s.start) for s, context in zip(segments, contexts, strict=True)]
    order = sorted(range(len(segments)), key=lambda i: -lengths[i])
    if not batch_size:
        longest = frames_in(env.lead_in + max(lengths, default=0.0), env.codec.frame_rate) + 1
        batch_size = dialogues_that_fit(policy, longest)
    episodes: dict[int, Episode] = {}

    def collect(rows: list[int], played: Callable[[], list[Episode]]) -> None:
        found = [replace(episode, policy_version=policy_version) for episode in played()]
        episodes.update(zip(rows, found, strict=True))
        if on_batch is not None:
            on_batch(rows, found)

    before: tuple[list[int], Callable[[], list[Episode]]] | None = None
    with one_core_operations(policy.device):
        try:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                chosen = [segments[i] for i in rows]
                played = _play(policy, env, chosen, [seeds[i] for i in rows], [contexts[i] for i in rows], on_frame)
                if before is not None:
                    collect(*before)
                before = rows, played
        finally:
            policy.end()
        if before is not None:
            collect(*before)
    return [episodes[i] for i in range(len(segments))]


def _play(
    policy: MoshiPolicy,
    env: DuplexDialogueVectorEnv,
    segments: list[Segment],
    seeds: list[int],
    contexts: list[float],
    on_frame: Callable[[int], None] | None,
) -> Callable[[], list[Episode]]:
    """Play a batch; gives a function that waits for its episodes."""
    observation, infos = env.reset(options={"segments": segments, "context": contexts, "later": True})
    frames = infos["frames"]
    policy.begin(seeds, frames.tolist())
    try:
        ended = np.zeros(len(segments), dtype=bool)
        while not ended.all():
            observation, _, terminated, truncated, infos = env.step(policy.act(observation))
            ended = terminated | truncated
            if on_frame is not None:
                on_frame(len(segments))
        trajectory = policy.trajectory()
    finally:
        policy.end(keep=policy.fixed)
    codes, log_probs = trajectory.codes.cpu().numpy(), trajectory.log_probs.cpu().numpy()
    later = infos["later"]

    # An episode that ended earlier played on beside the longer ones; what is cut off here was never heard. Its last
    # frame keeps no code that was drawn or came in later, as if it had been played alone.
    def finished() -> list[Episode]:
        return [
            replace(
                episode,
                text_tokens=codes[row, 0, :count].copy(),
                audio_tokens=_cut(
                    codes[row, 1:], count, policy.lm.delays[1:], policy.lm.zero_token_id, policy.agent_codebooks
                ),
                log_probs=log_probs[row, :count].copy(),
            )
            for row, (episode, count) in enumerate(zip(later(), frames.tolist(), strict=True))
        ]

    return finished


def _cut(codes: np.ndarray, frames: int, delays: Sequence[int], missing: int, agent_codebooks: int) -> np.ndarray:
    """The first `frames` columns, without the codes that came to be only afterwards (delayed ones, and the user's)."""
    cut = codes[:, :frames].copy()
    for stream, delay in enumerate(delays):
        late = delay if stream < agent_codebooks else max(delay, 1)
        if late:
            cut[stream, -late:] = missing
    return cut
