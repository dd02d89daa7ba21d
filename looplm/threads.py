"""Threads: rows of a batch are shared out to Python threads; inside one, everything is serial.

Compiled kernels and BLAS release the interpreter lock, so the shards run side by side.  BLAS is held to one thread
meanwhile: two thread pools taking turns cost more than they bring (a 28 microsecond kernel took 3.9 ms right after a
threaded product).
"""

import concurrent.futures
import functools
import itertools
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from .arrays import Array
from .kernels import team as kernel
from .kernels.jit import JIT_DISABLED
from .kernels.product.blas import limit_blas_threads

WAKEFUL = 20_000  # looks at the next command before a helper sleeps: about a millisecond

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_threads() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(threads, "looplm")


def shards(rows: int, threads: int, together: int = 1) -> list[slice]:
    """Consecutive, nearly equal parts of `rows`, at most one per thread; each begins at a multiple of `together`."""
    runs = -(-rows // together)
    parts = max(1, min(runs, threads))
    borders = [min(rows, runs * part // parts * together) for part in range(parts + 1)]
    return [slice(begin, end) for begin, end in itertools.pairwise(borders)]


def even_shares(sizes: dict[str, int], threads: int) -> list[list[str]]:
    """Names shared out so that each thread has about the same of their sizes: the largest first, to whom has least."""
    found: list[list[str]] = [[] for _ in range(threads)]
    loads = [0] * threads
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        least = loads.index(min(loads))
        found[least].append(name)
        loads[least] += sizes[name]
    return found


def run_all(work: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """`work` of every item, side by side; results in the order of the items."""
    limit_blas_threads()
    if len(items) == 1:
        return [work(items[0])]
    return list(_pool(len(items)).map(work, items))


class Team:
    """Threads that work on one plan together (kernels/team.py): the caller's, and helpers that wait for it.

    A helper looks for the next command for about a millisecond, then sleeps until it is woken.
    """

    def __init__(self, threads: int) -> None:
        self.threads = 1 if JIT_DISABLED else threads
        self._control = kernel.control_words(self.threads)
        self._at = self._control.ctypes.data
        self._lock = threading.Lock()
        self._wake = [threading.Event() for _ in range(1, self.threads)]
        for part, event in enumerate(self._wake, 1):
            threading.Thread(target=self._help, args=(part, event), name=f"looplm-{part}", daemon=True).start()

    def run(self, plan: Array) -> None:
        """Do what the plan says; one caller at a time."""
        with self._lock:
            for part, event in enumerate(self._wake, 1):
                if kernel.asleep(self._control, part):
                    event.set()
            kernel.command.call(self._at, plan.ctypes.data, plan.size)  # one call: an interrupt comes before or after

    def _help(self, part: int, event: threading.Event) -> None:
        while True:
            event.wait()
            event.clear()
            kernel.help_out.call(self._at, part, WAKEFUL)


@functools.cache
def team(threads: int) -> Team:
    """The process's team of that many threads."""
    return Team(threads)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=team.cache_clear)  # helpers do not live on in a forked process
