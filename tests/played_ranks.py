"""Ranks played by threads of the test's own process."""

import concurrent.futures
import dataclasses
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

from looplm.arrays import Floats
from looplm.ranks import Ranks


@dataclasses.dataclass
class Meeting:
    """Where threads that play ranks hand each other values."""

    size: int

    def __post_init__(self) -> None:
        self.barrier, self.values = threading.Barrier(self.size, timeout=60.0), [None] * self.size


@dataclasses.dataclass
class Player:
    """A rank played by a thread."""

    rank: int
    meeting: Meeting
    sharing: int = 1
    aborted: int | None = None

    @property
    def size(self) -> int:
        return self.meeting.size

    def exchange(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        values = list(self.meeting.values)
        self.meeting.barrier.wait()
        return values

    def sum_in_place(self, buffer: Floats) -> None:
        buffer[...] = sum(self.exchange(buffer.copy()))

    def sum_small(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.exchange(list(values)), strict=True)]

    def broadcast(self, value: Any) -> Any:
        return pickle.loads(self.exchange(pickle.dumps(value))[0])  # nothing is one object in two ranks

    def broadcast_in_place(self, buffer: Floats) -> None:
        buffer[...] = self.exchange(buffer.copy())[0]

    def abort(self, exit_code: int) -> None:
        self.aborted = exit_code


def play(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """`work` of every rank, side by side: what each returns, or the exception that it raises."""
    meeting = Meeting(size)

    def one(rank: int) -> Any:
        try:
            return work(Player(rank, meeting))
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
