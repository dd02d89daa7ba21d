"""The array types of the engine's signatures, and memory that starts on a cache line."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

LINE = 16  # float32 elements on a cache line

_WITHOUT_MEMORY = contextvars.ContextVar("without_memory", default=False)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """In the block, `aligned_empty` gives arrays that have shape and `nbytes` but all share one element, read-only.

    The code that would allocate can so be asked how much it would.
    """
    token = _WITHOUT_MEMORY.set(True)
    try:
        yield
    finally:
        _WITHOUT_MEMORY.reset(token)


def lined_up(elements: int) -> int:
    """The next multiple of a cache line's float32 elements."""
    return -(-elements // LINE) * LINE


def aligned_empty(shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> Array:
    """An uninitialised array whose first byte is a multiple of 64 (np.empty gives 0 or 16 modulo 64)."""
    if _WITHOUT_MEMORY.get():
        return np.broadcast_to(dtype(0), shape)
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)
