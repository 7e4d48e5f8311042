"""Rewards: one file an axis, found by name, and their weighted sum. Importing this registers the built-in axes."""

from rewards.aggregate import EarlyScores, RewardFunction, RewardSpec
from rewards.axis import (
    LeftOut,
    RewardAxis,
    Score,
    checked_scores,
    find_axis,
    make_axis,
    register_axis,
    registered_axes,
)
from rewards.backchannel import Backchannel
from rewards.content import Content, JudgedAxis
from rewards.fluency import Fluency
from rewards.overlap import Overlap
from rewards.pause_handling import PauseHandling
from rewards.repetition import Repetition
from rewards.safety import Safety
from rewards.turn_taking import TurnTaking
from rewards.user_interruption import UserInterruption

__all__ = [
    "Backchannel",
    "Content",
    "EarlyScores",
    "Fluency",
    "JudgedAxis",
    "LeftOut",
    "Overlap",
    "PauseHandling",
    "Repetition",
    "RewardAxis",
    "RewardFunction",
    "RewardSpec",
    "Safety",
    "Score",
    "TurnTaking",
    "UserInterruption",
    "checked_scores",
    "find_axis",
    "make_axis",
    "register_axis",
    "registered_axes",
]
