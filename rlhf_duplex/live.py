"""Live dialogues for a policy: users that hear the agent and react, by script with recorded utterances, or a policy."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from envs.errors import InputError
from envs.frames import frames_in
from envs.live import DuplexLiveVectorEnv
from envs.scripted_user import ScriptedUser, dialogue_segments, draw_scripts, script_id
from envs.segments import Segment
from envs.speech import SpeechDetector
from envs.utterance_bank import utterance_bank
from rlhf_duplex.config import Config
from rlhf_duplex.policy.bundle import load_bundle
from rlhf_duplex.policy.codec import MimiCodec
from rlhf_duplex.policy.codec_stream import MimiStream, PolicyUser
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import Sampling


def live_environment(
    segments: Sequence[Segment],
    codec: MimiCodec,
    detector: SpeechDetector,
    dialogues: int,
    seconds: float,
    lead_in: float,
    seed: int,
    second: MoshiPolicy | None = None,
) -> tuple[DuplexLiveVectorEnv, list[Segment]]:
    """An environment of users that hear the agent, and its dialogues.

    Args:
        segments: whose users' recorded utterances are spoken, with their events.
        codec, detector: of the policy and the rewards; the detector must be Silero.
        dialogues: how many scripts are drawn.
        seconds: of each dialogue.
        lead_in: seconds of silence before the user's first words.
        seed: of the scripts.
        second: a policy that plays the user in place of scripts; it has draws of its own in each dialogue.

    Raises:
        InputError: the segments hold no turn, or another detector.
    """
    if second is not None:
        chosen = dialogue_segments([script_id(seed, index) for index in range(dialogues)], seconds)
        frames = frames_in(lead_in, codec.frame_rate) + frames_in(seconds, codec.frame_rate)
        return DuplexLiveVectorEnv(
            chosen, PolicyUser(second, codec, frames, _seed_of), codec, detector, lead_in=lead_in
        ), chosen
    bank = utterance_bank(segments, detector, codec.sample_rate)
    scripts = draw_scripts(bank, dialogues, seed, seconds)
    chosen = dialogue_segments([script.id for script in scripts], seconds)
    user = ScriptedUser(scripts, codec, MimiStream(codec), detector, lead_in)
    return DuplexLiveVectorEnv(chosen, user, codec, detector, lead_in=lead_in), chosen


def _seed_of(dialogue: Segment) -> int:
    return int.from_bytes(hashlib.sha256(f"user {dialogue.id}".encode()).digest()[:6], "big")


def second_policy(config: Config, codec: MimiCodec) -> MoshiPolicy | None:
    """Who plays the user, by `live.user`; None where scripts do.

    Raises:
        InputError: no such checkpoint, or one of another codec.
    """
    if config.live.user == "scripted":
        return None
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    bundle = load_bundle(config.live.user, config.device, dtype)
    own = bundle.codec
    if (own.frame_rate, own.user_codebooks, own.audio_cardinality) != (
        codec.frame_rate,
        codec.user_codebooks,
        codec.audio_cardinality,
    ):
        raise InputError(f"live.user {config.live.user} has another codec than the policy: neither hears the other")
    return MoshiPolicy(bundle.lm, Sampling(**vars(config.sampling)))


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
        segments,
        replay.codec,
        replay.detector,
        live.dialogues,
        live.seconds,
        live.lead_in,
        config.seed,
        second_policy(config, replay.codec),
    )
    return env


def training_segments(config: Config, recorded: list[Segment]) -> list[Segment]:
    """What updates draw from, by `config.env`: the `recorded` segments, or the dialogues of the live environment."""
    if config.env == "replay":
        return recorded
    ids = [script_id(config.seed, index) for index in range(config.live.dialogues)]
    return dialogue_segments(ids, config.live.seconds)
