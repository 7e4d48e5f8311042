"""What a score is made of, as JSON can hold it: numbers of numpy as plain ones, and where one is not finite."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def plain_details(details: Any) -> Any:
    """Details that can be saved: as they are, or with the numbers of numpy in them as plain ones.

    An array is not taken for a list: it may be the audio of an episode, a megabyte of text.

    Raises:
        TypeError, ValueError: they are no mapping, or hold what JSON cannot.
    """
    if not isinstance(details, Mapping):
        raise TypeError(f"they must be a dictionary, found {type(details).__name__}")
    try:
        json.dumps(details)
        return details
    except (TypeError, ValueError):
        try:
            found = _plain(details)
            json.dumps(found)
            return found
        except RecursionError:
            raise ValueError("they hold themselves") from None


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def not_finite(value: Any, where: str = "") -> str:
    """Where the first number is that JSON has no word for (NaN, infinity), such as `pauses[2]`; nothing if none is."""
    if isinstance(value, float) and not math.isfinite(value):
        return where or "details"
    rows: Any = ()
    if isinstance(value, Mapping):
        if odd := next((key for key in value if isinstance(key, float) and not math.isfinite(key)), None):
            return f"the key {odd} of {where or 'details'}"
        rows = ((item, f"{where}.{key}" if where else str(key)) for key, item in value.items())
    elif isinstance(value, list | tuple):
        rows = ((item, f"{where}[{index}]") for index, item in enumerate(value))
    return next((found for item, place in rows if (found := not_finite(item, place))), "")


def finite(value: Any) -> Any:
    """The same with None where a number is not finite: what browsers and other languages read is JSON alone."""
    if isinstance(value, Mapping):
        return {str(key) if isinstance(key, float) else key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
