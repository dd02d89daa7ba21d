"""Ranks: the processes, perhaps on several machines, that train one model together.

Each works on its own rows of every batch; sums and broadcasts are all that passes between them.  `Alone` is the one
process of an ordinary run and costs nothing; `MpiRanks` speaks MPI through mpi4py, which is imported only in a process
that an MPI launcher has started.  Every method but `abort` must be called by all ranks in the same order.
"""

import atexit
import dataclasses
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from .arrays import Floats
from .errors import LoopLMError, UsageError

Result = TypeVar("Result")

# What launchers tell each process, rank and size: those of the MPICH family (also Intel's), and Open MPI.
LAUNCHERS = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))


class SharedError(LoopLMError):
    """An error that all ranks have been told of, each with the same two lines: one of them, the first, shows it."""

    @classmethod
    def of(cls, error: LoopLMError) -> "SharedError":
        shared = cls(str(error), error.hint)
        shared.exit_code, shared.__cause__ = error.exit_code, error
        return shared


class Ranks(Protocol):
    """This process among all."""

    @property
    def rank(self) -> int:
        """Counted from 0; rank 0 alone writes files and speaks to the user."""

    @property
    def size(self) -> int: ...

    @property
    def sharing(self) -> int:
        """How many ranks compute on this rank's processor cores, itself included."""

    def sum_in_place(self, buffer: Floats) -> None:
        """Replace a buffer, of one size everywhere, by its sum over all ranks: the same bits on each."""

    def sum_small(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks of a few numbers, in float64."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value; anything small that can be pickled."""

    def broadcast_in_place(self, buffer: Floats) -> None:
        """Overwrite a buffer with rank 0's."""

    def abort(self, exit_code: int) -> None:
        """End all ranks when this process leaves, which it is about to do once its error is shown."""


@dataclasses.dataclass(frozen=True)
class Alone:
    """The only rank."""

    rank: int = 0
    size: int = 1
    sharing: int = 1

    def sum_in_place(self, buffer: Floats) -> None:
        pass

    def sum_small(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def broadcast(self, value: Any) -> Any:
        return value

    def broadcast_in_place(self, buffer: Floats) -> None:
        pass

    def abort(self, exit_code: int) -> None:
        pass


ALONE = Alone()


class MpiRanks:
    """All processes of one `mpiexec`."""

    def __init__(self, mpi: Any) -> None:
        self._mpi, self._all = mpi, mpi.COMM_WORLD
        self.rank: int = self._all.Get_rank()
        self.size: int = self._all.Get_size()
        machine = self._all.Split_type(mpi.COMM_TYPE_SHARED)
        # launchers may bind ranks to cores: then only those with the same cores share them
        cores = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        self.sharing: int = machine.allgather(cores).count(cores)
        machine.Free()

    def sum_in_place(self, buffer: Floats) -> None:
        self._all.Allreduce(self._mpi.IN_PLACE, buffer)

    def sum_small(self, values: Sequence[float]) -> list[float]:
        sums = np.array(values, np.float64)
        self._all.Allreduce(self._mpi.IN_PLACE, sums)
        return [float(value) for value in sums]

    def broadcast(self, value: Any) -> Any:
        return self._all.bcast(value)

    def broadcast_in_place(self, buffer: Floats) -> None:
        self._all.Bcast(buffer)

    def abort(self, exit_code: int) -> None:
        atexit.register(self._all.Abort, exit_code)  # before mpi4py's own end, which would wait for the others


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Rank and number of ranks as an MPI launcher has set them; None for a process of its own."""
    for rank, size in LAUNCHERS:
        if environment.get(rank, "").isdecimal() and environment.get(size, "").isdecimal():
            found = int(environment[rank]), int(environment[size])
            return found if found[1] > 1 else None
    return None


def connect() -> Ranks:
    """The ranks that this process was started among; `ALONE` if it was not started by an MPI launcher.

    Raises: UsageError if it was and mpi4py is missing, finds no MPI, or belongs to another MPI than the launcher.
    """
    started = launched()
    if started is None:
        return ALONE
    cure = 'pip install "looplm-cpu[mpi]", and start with the mpiexec that this puts beside looplm'
    try:
        # by name, not by an import statement: no plain installation brings it
        mpi = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise UsageError(f"mpiexec has started {started[1]} ranks, but mpi4py does not load: {why}", cure) from error
    ranks = MpiRanks(mpi)
    if ranks.size != started[1]:
        raise UsageError(
            f"mpiexec has started {started[1]} ranks, but mpi4py sees {ranks.size}: it belongs to another MPI", cure
        )
    return ranks


def share(ranks: Ranks, rows: int) -> slice:
    """Which of so many rows are this rank's: consecutive, nearly equal parts, all rows in all."""
    return slice(rows * ranks.rank // ranks.size, rows * (ranks.rank + 1) // ranks.size)


def first_does(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """The result of `work`, done by rank 0 while the others wait, on every rank; it must be small.

    Raises: SharedError on every rank if `work` raises a LoopLMError; alone, that error itself.
    """
    if ranks.size == 1:
        return work()
    outcome: Any = None
    if ranks.rank == 0:
        try:
            outcome = work(), None
        except LoopLMError as error:
            outcome = None, SharedError.of(error)
    result, failure = ranks.broadcast(outcome)
    if failure is not None:
        raise failure
    return result
