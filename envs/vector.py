"""`DuplexDialogueVectorEnv`: B dialogues stepped at once, tensors staying on the codec's device."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.codec import Codec
from envs.context import ContextSchedule
from envs.dialogues import RewardFunction, UserSide, UserSides, find_segments, finish_dialogues
from envs.episode import Episode
from envs.errors import InputError
from envs.segments import Segment
from envs.speech import SpeechDetector

# On a CPU, so many ended dialogues are finished at once while the others go on.
FINISH_TOGETHER = 8


def frame_spaces(codec: Codec) -> tuple[spaces.MultiDiscrete, spaces.MultiDiscrete]:
    """Observation and action space of one dialogue.

    Observation: the user's codes of this frame. Action: the agent's text token and audio codes of this frame; each has
    one value more than the model has tokens, "nothing yet", for the first frames of a delayed model.
    """
    observation = spaces.MultiDiscrete([codec.audio_cardinality] * codec.user_codebooks)
    action = spaces.MultiDiscrete([codec.text_cardinality + 1] + [codec.audio_cardinality + 1] * codec.agent_codebooks)
    return observation, action


class DuplexDialogueVectorEnv(VectorEnv):
    """B full-duplex dialogues at 12.5 frames a second, each with the replayed user of one segment.

    Observations `(B, user_codebooks)` and actions `(B, 1 + agent_codebooks)` are int64 tensors on the codec's device.
    A dialogue is terminated at the end of its segment and truncated at `max_frames`; afterwards it is stepped along
    with the others and what it does there is dropped. Rewards are given for the whole batch in the step in which the
    last dialogue ends: `infos["episodes"]`, and with a reward function `infos["rewards"]` (a dictionary of axis values
    each) and the rewards `(B,)`; before that all rewards are 0. The audio of dialogues that have ended is decoded and
    its speech detected in another thread: on a CPU while the others go on, and where `reset` was told `later` also
    after the last frame; on a GPU in a stream of its own.
    There is no automatic reset: call `reset`.

    Args:
        segments: to choose from.
        codec, detector: of the model and of the rewards.
        num_envs: B, where `reset` is not told which segments to play.
        reward_function: scores finished episodes; None leaves that to the caller.
        context: how much of the recording precedes a segment.
        lead_in: seconds of silence before everything.
        max_frames: frame limit.
        user_sides: a cache to share with other environments.

    Raises:
        InputError: no segment.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.DISABLED, "render_modes": []}

    def __init__(
        self,
        segments: Sequence[Segment],
        codec: Codec,
        detector: SpeechDetector,
        num_envs: int = 1,
        reward_function: RewardFunction | None = None,
        context: ContextSchedule | None = None,
        lead_in: float = 3.0,
        max_frames: int | None = None,
        user_sides: UserSides | None = None,
    ) -> None:
        if not segments:
            raise InputError("the environment needs at least one segment, found none")
        self.segments = list(segments)
        self.codec, self.detector = codec, detector
        self.reward_function = reward_function
        self.context = context or ContextSchedule(probability=0.0)
        self.max_frames = max_frames
        self.user_sides = user_sides or UserSides(codec, detector, lead_in)
        self.lead_in = self.user_sides.lead_in
        self.seconds: dict[str, float] = {}  # of `decode` and `detect`, summed; whoever reads them clears them
        self.single_observation_space, self.single_action_space = frame_spaces(codec)
        self._set_size(num_envs)

    def _set_size(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(  # tensors where gymnasium has arrays
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Begin B dialogues.

        Args:
            seed: of the choice of segments and context.
            options: `segments`: B ids or `Segment`s (drawn at random where not given; sets B); `context`: seconds
                of context, one number or B (drawn from the schedule where not given); `progress`: of the training,
                0 to 1, for the schedule; `later`: do not wait for the episodes in the last step, which gives
                `infos["later"]` instead, a function that does (there are no rewards then).

        Returns:
            The first observation, and `infos` with the segment ids and the frames of each dialogue.

        Raises:
            InputError: an id that is not there.
        """
        super().reset(seed=seed)
        options = options or {}
        wanted = options.get("segments")
        if wanted is None:
            wanted = [self.segments[i] for i in self.np_random.integers(len(self.segments), size=self.num_envs)]
        chosen = find_segments(self.segments, wanted)
        if len(chosen) != self.num_envs:
            self._set_size(len(chosen))
        context = options.get("context")
        if context is None:
            progress = float(options.get("progress", 1.0))
            context = [self.context.draw(self.np_random, progress) for _ in chosen]
        seconds = np.broadcast_to(np.asarray(context, dtype=float), (len(chosen),)).tolist()
        self._users: list[UserSide] = self.user_sides.get(list(zip(chosen, seconds, strict=True)))
        whole = np.array([user.frames for user in self._users])
        self._frames = np.minimum(whole, self.max_frames or whole.max())
        self._truncated = self._frames < whole
        self._length = int(self._frames.max())
        self._observations = torch.zeros(
            self._length + 1,
            self.num_envs,
            self.codec.user_codebooks,
            dtype=torch.long,
            device=self.codec.device,
        )
        for row, user in enumerate(self._users):
            count = min(user.frames, self._length)
            self._observations[:count, row] = user.codes[:, :count].T
        self._actions = torch.zeros(
            self._length,
            self.num_envs,
            1 + self.codec.agent_codebooks,
            dtype=torch.long,
            device=self.codec.device,
        )
        self._frame = 0
        self._later = bool(options.get("later", False))
        self._ended: list[int] = []  # rows that wait to be finished
        self._finished: list[tuple[list[int], Future[list[Episode]]]] = []
        self._finisher = ThreadPoolExecutor(1)
        return self._observations[0], {"segments": [s.id for s in chosen], "frames": self._frames.copy()}

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One frame of every dialogue. Nothing in here waits for the device until the last frame.

        Raises:
            RuntimeError: all dialogues have ended.
        """
        if self._frame >= self._length:
            raise RuntimeError("all dialogues have ended: call reset")
        self._actions[self._frame] = torch.as_tensor(actions, device=self.codec.device)
        self._frame += 1
        done = self._frames <= self._frame
        self._ended += np.nonzero(self._frames == self._frame)[0].tolist()
        together = FINISH_TOGETHER if self.codec.device.type == "cpu" else self.num_envs
        if len(self._ended) >= together or self._frame == self._length:
            self._finish_later(self._ended)
            self._ended = []
        rewards: np.ndarray = np.zeros(self.num_envs)
        infos: dict[str, Any] = {}
        if self._frame == self._length:
            rewards, infos = self._finish()
        observation = self._observations[self._frame]
        return observation, rewards, done & ~self._truncated, done & self._truncated, infos

    def _finish_later(self, rows: list[int]) -> None:
        """Hand dialogues that have ended to the other thread. Which go together depends on their lengths alone."""
        frames = self._frames[rows].tolist()
        actions = self._actions[: max(frames), rows].transpose(0, 1)
        users = [self._users[row] for row in rows]
        finish = partial(finish_dialogues, users, actions, frames, self.codec, self.detector, self.seconds)
        if actions.device.type == "cuda":
            finish = partial(_beside, finish, actions, torch.cuda.current_stream(actions.device).record_event())
        self._finished.append((rows, self._finisher.submit(finish)))

    def _finish(self) -> tuple[np.ndarray, dict[str, Any]]:
        collect = partial(_collect, self._finished, self._finisher)
        if self._later:
            return np.zeros(self.num_envs), {"later": collect}
        episodes = collect()
        rewards: np.ndarray = np.zeros(self.num_envs)
        infos: dict[str, Any] = {"episodes": episodes}
        if self.reward_function is not None:
            scores = self.reward_function(episodes)
            rewards = np.array([self.reward_function.total(row) for row in scores])
            infos["rewards"] = [
                {axis: score.value for axis, score in row.items() if score is not None} for row in scores
            ]
        return rewards, infos


def _collect(finished: list[tuple[list[int], Future[list[Episode]]]], finisher: ThreadPoolExecutor) -> list[Episode]:
    """All episodes of a batch in the order of its rows, once the other thread is done with them."""
    found: dict[int, Episode] = {}
    for rows, future in finished:
        found.update(zip(rows, future.result(), strict=True))
    finisher.shutdown()
    return [found[row] for row in sorted(found)]


_beside_streams: dict[torch.device, torch.cuda.Stream] = {}  # one a device: what is freed on it serves the next batch


def _beside(finish: Callable[[], list[Episode]], actions: torch.Tensor, made: torch.cuda.Event) -> list[Episode]:
    """Call a function on a CUDA stream of its own, once its actions are there."""
    if actions.device not in _beside_streams:
        _beside_streams[actions.device] = torch.cuda.Stream(actions.device)
    stream = _beside_streams[actions.device]
    with torch.cuda.stream(stream):
        made.wait(stream)
        actions.record_stream(stream)
        return finish()
