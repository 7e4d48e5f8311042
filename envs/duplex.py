"""`DuplexDialogueEnv`: one full-duplex dialogue as a gymnasium environment."""

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv

from envs.codec import Codec
from envs.context import ContextSchedule
from envs.dialogues import RewardFunction
from envs.segments import Segment
from envs.speech import SpeechDetector
from envs.vector import DuplexDialogueVectorEnv, frame_spaces


class OneDialogueEnv(gymnasium.Env):
    """A vector environment with one dialogue as a gymnasium environment: one mechanism, tested once.

    Observation `(user_codebooks,)`: the user's codes of this frame. Action `(1 + agent_codebooks,)`: the agent's text
    token and audio codes of this frame. The reward is 0 until the end, then the weighted sum of the reward function,
    with each axis in `info["rewards"]` and the whole `Episode` in `info["episode"]`.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, vector: VectorEnv, codec: Codec) -> None:
        self.vector = vector
        self.observation_space, self.action_space = frame_spaces(codec)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a dialogue.

        Args:
            seed: of the choice of what is played.
            options: those of the vector environment, but `segment`, an id or a `Segment`, for its `segments`.

        Raises:
            InputError: an id that is not there.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        if "segment" in options:
            options["segments"] = [options.pop("segment")]
        observation, infos = self.vector.reset(seed=seed, options=options)
        info = {"segment": infos["segments"][0], "frames": int(infos["frames"][0])}
        return observation[0].cpu().numpy(), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One frame."""
        observation, rewards, terminated, truncated, infos = self.vector.step(torch.as_tensor(np.asarray(action))[None])
        info: dict[str, Any] = {}
        if "episodes" in infos:
            info["episode"] = infos["episodes"][0]
            info["rewards"] = infos.get("rewards", [{}])[0]
        return (
            observation[0].cpu().numpy(),
            float(rewards[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            info,
        )


class DuplexDialogueEnv(OneDialogueEnv):
    """Replays the user of a segment frame by frame while the agent speaks or stays silent.

    Arguments and options as those of `DuplexDialogueVectorEnv`.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        codec: Codec,
        detector: SpeechDetector,
        reward_function: RewardFunction | None = None,
        context: ContextSchedule | None = None,
        lead_in: float = 3.0,
        max_frames: int | None = None,
    ) -> None:
        vector = DuplexDialogueVectorEnv(segments, codec, detector, 1, reward_function, context, lead_in, max_frames)
        super().__init__(vector, codec)
