"""Exits told in advance: one loop per new token, from a file, whatever the model's gate says.

For measuring what exits cost apart from which they are: a model with random weights can decode with the exits of a
trained one.
"""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from .arrays import Array, Floats
from .errors import DataError

EXAMPLE = "write one number per line, or a JSON list such as [2, 4, 1]"


class ExitTrace:
    """The first new token is read after the first number's loop, and so on; of one text of one row."""

    def __init__(self, exits: Sequence[int]) -> None:
        """exits: loops counted from 1, one per new token; what follows them is read after all loops."""
        self.exits = tuple(exits)
        self._token = 0

    def __str__(self) -> str:
        return f"trace of {len(self.exits)} exits"

    def deepest(self, loops: int) -> int:
        return max((loops, *self.exits))

    def stops(self, hidden: Floats, gate_logit: Floats) -> Array:
        loops, rows = gate_logit.shape
        return np.full(rows, self._token < len(self.exits) and loops >= self.exits[self._token])

    def count(self, loops_run: int) -> None:
        """One token more has stopped."""
        self._token += 1


def read_exit_trace(path: pathlib.Path, tokens: int) -> ExitTrace:
    """The trace in a file, for so many new tokens: a JSON list, or a number per line.

    Raises: DataError if it cannot be read, holds something else than loops, or is too short.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"the exit trace {path} cannot be read: {reason}", EXAMPLE) from error
    try:
        found = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"the exit trace {path} is not a list of numbers: {error}", EXAMPLE) from error
    for number, value in enumerate(found, 1):
        if type(value) is not int or value < 1:
            raise DataError(f"exit {number} of {path} is {value!r}, not a loop", f"loops count from 1: {EXAMPLE}")
    if len(found) < tokens:
        raise DataError(
            f"the exit trace {path} has {len(found)} exits, fewer than the {tokens} tokens that may be written",
            f"add exits, or write -n {max(1, len(found))}",
        )
    return ExitTrace(found)
