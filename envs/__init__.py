"""The dialogue world: frames and time, speech and utterances, segments and their manifest, episodes."""

import gymnasium

from envs.codec import Codec
from envs.context import ContextSchedule
from envs.duplex import DuplexDialogueEnv
from envs.episode import Episode, Word, recorded_episode
from envs.errors import InputError
from envs.events import complete_events
from envs.segments import SEGMENT_AXES, Segment, read_manifest, write_manifest
from envs.speech import EnergyDetector, Interval, SileroDetector, SpeechDetector, make_detector
from envs.utterances import Utterance, inter_pausal_units, utterances
from envs.vector import DuplexDialogueVectorEnv

gymnasium.register(
    "rlhf_duplex/DuplexDialogue-v0",
    entry_point="envs.duplex:DuplexDialogueEnv",
    vector_entry_point="envs.vector:DuplexDialogueVectorEnv",
)

__all__ = [
    "SEGMENT_AXES",
    "Codec",
    "ContextSchedule",
    "DuplexDialogueEnv",
    "DuplexDialogueVectorEnv",
    "EnergyDetector",
    "Episode",
    "InputError",
    "Interval",
    "Segment",
    "SileroDetector",
    "SpeechDetector",
    "Utterance",
    "Word",
    "complete_events",
    "inter_pausal_units",
    "make_detector",
    "read_manifest",
    "recorded_episode",
    "utterances",
    "write_manifest",
]
