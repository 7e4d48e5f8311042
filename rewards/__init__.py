"""Rewards: one file an axis, found by name, and their weighted sum. Importing this registers the built-in axes."""

from rewards.aggregate import RewardFunction, RewardSpec
from rewards.axis import (
    RewardAxis,
    Score,
    checked_scores,
    find_axis,
    make_axis,
    register_axis,
    registered_axes,
)
from rewards.backchannel import Backchannel
from rewards.pause_handling import PauseHandling
from rewards.turn_taking import TurnTaking
from rewards.user_interruption import UserInterruption

__all__ = [
    "Backchannel",
    "PauseHandling",
    "RewardAxis",
    "RewardFunction",
    "RewardSpec",
    "Score",
    "TurnTaking",
    "UserInterruption",
    "checked_scores",
    "find_axis",
    "make_axis",
    "register_axis",
    "registered_axes",
]
