"""Live dialogues for a policy: users that speak with recorded utterances, hear the agent, and react."""

from collections.abc import Sequence
from typing import Any

from envs.live import DuplexLiveVectorEnv
from envs.scripted_user import ScriptedUser, dialogue_segments, draw_scripts, script_id
from envs.segments import Segment
from envs.speech import SpeechDetector
from envs.utterance_bank import utterance_bank
from rlhf_duplex.config import Config
from rlhf_duplex.policy.codec import MimiCodec
from rlhf_duplex.policy.codec_stream import MimiStream


def live_environment(
    segments: Sequence[Segment],
    codec: MimiCodec,
    detector: SpeechDetector,
    dialogues: int,
    seconds: float,
    lead_in: float,
    seed: int,
) -> tuple[DuplexLiveVectorEnv, list[Segment]]:
    """An environment of scripted users, and its dialogues.

    Args:
        segments: whose users' recorded utterances are spoken, with their events.
        codec, detector: of the policy and the rewards; the detector must be Silero.
        dialogues: how many scripts are drawn.
        seconds: of each dialogue.
        lead_in: seconds of silence before the user's first words.
        seed: of the scripts.

    Raises:
        InputError: the segments hold no turn, or another detector.
    """
    bank = utterance_bank(segments, detector, codec.sample_rate)
    scripts = draw_scripts(bank, dialogues, seed, seconds)
    chosen = dialogue_segments([script.id for script in scripts], seconds)
    user = ScriptedUser(scripts, codec, MimiStream(codec), detector, lead_in)
    return DuplexLiveVectorEnv(chosen, user, codec, detector, lead_in=lead_in), chosen


def training_environment(config: Config, replay: Any, segments: Sequence[Segment]) -> Any:
    """What RL trains in, by `config.env`: the replaying environment, or a live one.

    Args:
        config: of the run.
        replay: the environment of recorded users, with the run's codec and detector.
        segments: of the run; live users speak with the utterances of all of them.

    Raises:
        InputError: as `live_environment`.
    """
    if config.env == "replay":
        return replay
    live = config.live
    env, _ = live_environment(
        segments, replay.codec, replay.detector, live.dialogues, live.seconds, live.lead_in, config.seed
    )
    return env


def training_segments(config: Config, recorded: list[Segment]) -> list[Segment]:
    """What updates draw from, by `config.env`: the `recorded` segments, or the dialogues of the live environment."""
    if config.env == "replay":
        return recorded
    ids = [script_id(config.seed, index) for index in range(config.live.dialogues)]
    return dialogue_segments(ids, config.live.seconds)
