"""`DuplexLiveEnv` and its vector form: dialogues with a user that hears the agent and reacts, frame by frame.

The spaces, the reward at the end and the episodes are those of `DuplexDialogueEnv`; only the user is another: not
replayed from a recording but played by a `LiveUser` (a script that listens, or a second policy).
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.codec import Codec
from envs.dialogues import RewardFunction, UserSide, find_segments, finish_dialogues
from envs.duplex import OneDialogueEnv
from envs.episode import Episode
from envs.errors import InputError
from envs.frames import frames_in
from envs.scripted_user import LiveUser
from envs.segments import Segment
from envs.speech import SpeechDetector
from envs.vector import frame_spaces


class DuplexLiveVectorEnv(VectorEnv):
    """B live dialogues stepped at once; see `DuplexDialogueVectorEnv` for observations, actions and infos.

    Args:
        dialogues: to choose from; each is a segment that has a length and an id that the user knows
            (`envs.scripted_user.dialogue_segments`). All have the same length.
        user: the user's side; it is this environment's alone.
        codec, detector: of the model and of the rewards.
        num_envs: B, where `reset` is not told which dialogues to play.
        reward_function: scores finished episodes; None leaves that to the caller.
        lead_in: seconds of silence before everything; not scored.
        max_frames: frame limit.

    Raises:
        InputError: no dialogue, or dialogues of different lengths.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.DISABLED, "render_modes": []}

    def __init__(
        self,
        dialogues: Sequence[Segment],
        user: LiveUser,
        codec: Codec,
        detector: SpeechDetector,
        num_envs: int = 1,
        reward_function: RewardFunction | None = None,
        lead_in: float = 1.0,
        max_frames: int | None = None,
    ) -> None:
        if not dialogues:
            raise InputError("the live environment needs at least one dialogue, found none")
        if len({dialogue.duration for dialogue in dialogues}) > 1:
            raise InputError("the dialogues of a live environment must have the same length")
        self.segments = list(dialogues)
        self.user, self.codec, self.detector = user, codec, detector
        self.reward_function = reward_function
        self.lead_in, self.lead_in_frames = lead_in, frames_in(lead_in, codec.frame_rate)
        whole = self.lead_in_frames + frames_in(dialogues[0].duration, codec.frame_rate)
        self._length = min(whole, max_frames or whole)
        self._truncates = self._length < whole
        self.single_observation_space, self.single_action_space = frame_spaces(codec)
        self._set_size(num_envs)
        self._frame = self._length
        self.seconds: dict[str, float] = {}  # of `decode` and `detect`, summed; whoever reads them clears them

    def _set_size(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Begin B dialogues.

        Args:
            seed: of the choice of dialogues.
            options: `segments`: B ids or `Segment`s (drawn at random where not given; sets B); `later`: decode and
                detect when `infos["later"]` of the last step is called (there are no rewards then), not in that step.
                Other options of `DuplexDialogueVectorEnv` (there is no context) are taken and not used.

        Raises:
            InputError: an id that is not there.
        """
        super().reset(seed=seed)
        wanted = (options or {}).get("segments")
        if wanted is None:
            wanted = [self.segments[i] for i in self.np_random.integers(len(self.segments), size=self.num_envs)]
        self._chosen = find_segments(self.segments, wanted)
        if len(self._chosen) != self.num_envs:
            self._set_size(len(self._chosen))
        self._actions: list[torch.Tensor] = []
        self._frame = 0
        self._later = bool((options or {}).get("later", False))
        self._observations = [self.user.begin(self._chosen)]
        frames = np.full(self.num_envs, self._length)
        return self._observations[0], {"segments": [s.id for s in self._chosen], "frames": frames}

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One frame of every dialogue: the user hears the agent's and answers with its next.

        Raises:
            RuntimeError: all dialogues have ended.
        """
        if self._frame >= self._length:
            raise RuntimeError("all dialogues have ended: call reset")
        actions = torch.as_tensor(actions, device=self.codec.device)
        self._actions.append(actions.clone())
        self._observations.append(self.user.hear(actions))
        self._frame += 1
        ended = self._frame == self._length
        rewards: np.ndarray = np.zeros(self.num_envs)
        infos: dict[str, Any] = {}
        if ended and self._later:
            infos["later"] = self._finisher()
        elif ended:
            episodes = self._finisher()()
            infos["episodes"] = episodes
            if self.reward_function is not None:
                scores = self.reward_function(episodes)
                rewards = np.array([self.reward_function.total(row) for row in scores])
                infos["rewards"] = [{axis: s.value for axis, s in row.items() if s is not None} for row in scores]
        terminated: np.ndarray = np.full(self.num_envs, ended and not self._truncates)
        truncated: np.ndarray = np.full(self.num_envs, ended and self._truncates)
        return self._observations[-1], rewards, terminated, truncated, infos

    def _finisher(self) -> Callable[[], list[Episode]]:
        """What makes the episodes, both sides' speech detected in the whole audio, as the rewards and metrics want it.

        It has all that it needs: other dialogues may have begun when it is called.
        """
        codes = torch.stack(self._observations[: self._length], dim=-1)
        sides = [(clip[: self._length * self.codec.frame_samples], segment) for clip, segment in self.user.sides()]
        actions = torch.stack(self._actions, dim=1)
        frames = [self._length] * self.num_envs

        def finish() -> list[Episode]:
            speech = self.detector.detect([clip for clip, _ in sides], self.codec.sample_rate)
            scored_from = self.lead_in_frames / self.codec.frame_rate
            users = [
                UserSide(segment, clip, row, intervals, scored_from)
                for (clip, segment), row, intervals in zip(sides, codes, speech, strict=True)
            ]
            return finish_dialogues(users, actions, frames, self.codec, self.detector, self.seconds)

        return finish


class DuplexLiveEnv(OneDialogueEnv):
    """One live dialogue as a gymnasium environment. Arguments and options as those of `DuplexLiveVectorEnv`."""

    def __init__(
        self,
        dialogues: Sequence[Segment],
        user: LiveUser,
        codec: Codec,
        detector: SpeechDetector,
        reward_function: RewardFunction | None = None,
        lead_in: float = 1.0,
        max_frames: int | None = None,
    ) -> None:
        vector = DuplexLiveVectorEnv(dialogues, user, codec, detector, 1, reward_function, lead_in, max_frames)
        super().__init__(vector, codec)
