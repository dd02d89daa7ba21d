"""How many floating-point numbers of some memory are none: NaN or infinite.  One pass, at the speed of memory."""

import numpy as np

from ..arrays import Array
from .jit import njit

_EXPONENT = {2: np.uint16(0x7F80), 4: np.uint32(0x7F80_0000)}  # all ones in NaN and infinity, by bytes of a number


@njit
def _count(bits, exponent):
    total = 0
    for i in range(bits.size):
        total += 1 if bits[i] & exponent == exponent else 0
    return total


def count_not_finite(values: Array) -> int:
    """values: float32, or bfloat16 as its bits in uint16; any shape, contiguous."""
    size = values.itemsize
    return int(_count(values.reshape(-1).view(f"u{size}"), _EXPONENT[size]))
