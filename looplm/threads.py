"""Threads: rows of a batch are shared out to Python threads; inside one, everything is serial.

Compiled kernels and BLAS release the interpreter lock, so the shards run side by side.  BLAS is held to one thread
meanwhile: two thread pools taking turns cost more than they bring (a 28 microsecond kernel took 3.9 ms right after a
threaded product).
"""

import concurrent.futures
import functools
import itertools
import os
from collections.abc import Callable
from typing import TypeVar

from .kernels.product.blas import limit_blas_threads

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_threads() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(threads, "looplm")


def shards(rows: int, threads: int) -> list[slice]:
    """Consecutive, nearly equal parts of `rows`, at most one per thread."""
    parts = max(1, min(rows, threads))
    borders = [rows * part // parts for part in range(parts + 1)]
    return [slice(begin, end) for begin, end in itertools.pairwise(borders)]


def run_all(work: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """`work` of every item, side by side; results in the order of the items."""
    limit_blas_threads()
    if len(items) == 1:
        return [work(items[0])]
    return list(_pool(len(items)).map(work, items))
