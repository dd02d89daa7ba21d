"""The array types of the engine's signatures, and memory that starts on a cache line."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def aligned_empty(shape: tuple[int, ...]) -> Floats:
    """An uninitialised float32 array whose first byte is a multiple of 64 (np.empty gives 0 or 16 modulo 64)."""
    size = int(np.prod(shape, dtype=np.int64))
    raw = np.empty(size * 4 + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size * 4].view(np.float32).reshape(shape)
