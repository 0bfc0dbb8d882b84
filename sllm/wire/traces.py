"""Exceptions for the log of a process that computes what others have sent."""

from __future__ import annotations

import traceback
from pathlib import Path

__all__ = ["raised_at"]

_FRAMES = 8


def raised_at(error: BaseException) -> str:
    """The kind of an exception and where it was raised, innermost first, without its message: that may repeat
    what a client has sent, and the log of a worker holds none of it.

    Examples:
        >>> try:
        ...     {}["what somebody wrote"]
        ... except KeyError as error:
        ...     text = raised_at(error)
        >>> text.startswith("KeyError at "), "somebody" in text
        (True, False)

    """
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames)]
    kind = type(error).__name__
    return f"{kind} at {' < '.join(places)}" if places else kind
