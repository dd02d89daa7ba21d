"""Ctrl-C and SIGTERM as a request that the running job answers at its next safe place."""

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A job stopped as asked, with everything saved; the command ends with exit code 130."""


@dataclasses.dataclass
class StopRequest:
    """`requested` turns true at the first signal; a second one stops at once."""

    requested: bool = False


@contextlib.contextmanager
def interruptible() -> Iterator[StopRequest]:
    """Within the block, SIGINT and SIGTERM set the request instead of killing."""
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        if request.requested:
            raise KeyboardInterrupt
        request.requested = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
