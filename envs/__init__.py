"""The dialogue world: frames and time, speech and utterances, segments and their manifest, episodes."""

import gymnasium

from envs.codec import Codec
from envs.context import ContextSchedule
from envs.duplex import DuplexDialogueEnv
from envs.episode import Episode, Word, recorded_episode
from envs.errors import InputError
from envs.events import complete_events
from envs.floor import Floor, analyse_floor
from envs.live import DuplexLiveEnv, DuplexLiveVectorEnv
from envs.scripted_user import LiveUser, ScriptedUser, dialogue_segments, draw_scripts
from envs.segments import SEGMENT_AXES, Segment, read_manifest, write_manifest
from envs.speech import EnergyDetector, Interval, SileroDetector, SpeechDetector, make_detector
from envs.utterance_bank import utterance_bank
from envs.utterances import Utterance, inter_pausal_units, utterances
from envs.vector import DuplexDialogueVectorEnv

gymnasium.register(
    "rlhf_duplex/DuplexDialogue-v0",
    entry_point="envs.duplex:DuplexDialogueEnv",
    vector_entry_point="envs.vector:DuplexDialogueVectorEnv",
)
gymnasium.register(
    "rlhf_duplex/DuplexLive-v0",
    entry_point="envs.live:DuplexLiveEnv",
    vector_entry_point="envs.live:DuplexLiveVectorEnv",
)

__all__ = [
    "SEGMENT_AXES",
    "Codec",
    "ContextSchedule",
    "DuplexDialogueEnv",
    "DuplexDialogueVectorEnv",
    "DuplexLiveEnv",
    "DuplexLiveVectorEnv",
    "EnergyDetector",
    "Episode",
    "Floor",
    "InputError",
    "Interval",
    "LiveUser",
    "ScriptedUser",
    "Segment",
    "SileroDetector",
    "SpeechDetector",
    "Utterance",
    "Word",
    "analyse_floor",
    "complete_events",
    "dialogue_segments",
    "draw_scripts",
    "inter_pausal_units",
    "make_detector",
    "read_manifest",
    "recorded_episode",
    "utterance_bank",
    "utterances",
    "write_manifest",
]
