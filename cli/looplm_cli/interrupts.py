"""How a job ends early: Ctrl-C and SIGTERM as a request that it answers at its next safe place; and, where several
ranks work together, all of them ended by what ends one, and told of once.
"""

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from looplm.ranks import Ranks


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


@contextlib.contextmanager
def ranks_as_one() -> Iterator["Ranks"]:
    """The ranks that this process was started among (itself alone, without an MPI launcher), ending together.

    What all ranks meet at once, rank 0 tells and the others leave in silence with exit code 0, so that the launcher's
    code is rank 0's.  What one rank meets, it tells, and then ends all.
    """
    from looplm.errors import LoopLMError, TrainingError
    from looplm.ranks import SharedError, connect, launched

    try:
        ranks = connect()
    except LoopLMError:
        if (launched() or (0, 1))[0] > 0:
            raise typer.Exit from None
        raise
    try:
        yield ranks
    except (SharedError, TrainingError, Interrupted, typer.Exit):
        if ranks.rank > 0:
            raise typer.Exit from None
        raise
    except BaseException as error:
        known = error.exit_code if isinstance(error, LoopLMError) else None
        ranks.abort(known or (130 if isinstance(error, KeyboardInterrupt) else 1))
        raise
