"""Rounds groups of neighbouring weights to integers times a common scale, the best of several candidates.

Scales, codes and choices are those of the reference to the bit, so errors are added up in float64.
"""

import numpy as np

from .intrinsics import round16, widen16
from .jit import njit

# A later candidate must win by more than rounding can: sums run in another order here than in the reference.
_CLEARLY = 1.0 - 1e-9
_LEAST_SCALE = np.float32(2.0**-126)  # smaller ones would be subnormal, which processors may read as 0


@njit
def _error(values, scale, low, high):
    """Sum of squares of what rounding to multiples of `scale` loses."""
    total, inverse = 0.0, 1.0 / scale
    for i in range(values.size):
        value = np.float64(values[i])
        code = min(max(np.rint(value * inverse), low), high)
        off = value - code * scale
        total += off * off
    return total


@njit
def _best(values, candidates, low, high):
    """The scale (0 is none) that loses least; of those that lose the same, the first."""
    best, least = np.float32(0.0), np.inf
    for c in range(candidates.size):
        scale = np.float64(candidates[c])
        if scale > 0.0:
            error = _error(values, scale, low, high)
            if error < least * _CLEARLY:
                best, least = candidates[c], error
    return best


@njit
def _encode(codes, values, scale, low, high):
    """The nearest multiples; where two are equally near, the even one."""
    inverse = 1.0 / scale
    for i in range(values.size):
        value = np.float64(values[i])
        code = np.rint(value * inverse)
        # value / scale would round ties to even; the product with the inverse may miss a tie by one unit.
        off = value - code * scale
        if abs(off) * 2.0 == scale and np.rint(code * 0.5) * 2.0 != code:
            code += 1.0 if off > 0.0 else -1.0
        codes[i] = np.int8(min(max(code, low), high))


@njit
def quantize_rows_into(codes, scales, weight, divisors, low, high):
    """weight: NK, float32 and finite; divisors: C, float64 -> codes: N x G * group, int8; scales: NG, bfloat16 bits.

    Columns past K count as zeros.
    """
    groups = scales.shape[1]
    size = codes.shape[1] // groups
    values, candidates = np.zeros(size, np.float32), np.zeros(divisors.size, np.float32)
    for row in range(weight.shape[0]):
        for group in range(groups):
            begin = group * size
            there = max(0, min(size, weight.shape[1] - begin))
            largest = np.float32(0.0)
            for i in range(there):
                values[i] = weight[row, begin + i]
                largest = max(largest, abs(values[i]))
            for i in range(there, size):
                values[i] = np.float32(0.0)
            for c in range(divisors.size):
                rounded = widen16(round16(np.float32(np.float64(largest) / divisors[c])))
                candidates[c] = np.float32(0.0) if rounded < _LEAST_SCALE else rounded
            best = candidates[0]
            if candidates.size > 1:
                best = _best(values, candidates, low, high)
            scales[row, group] = round16(best)
            if best > np.float32(0.0):
                _encode(codes[row, begin : begin + size], values, np.float64(best), low, high)
            else:
                codes[row, begin : begin + size] = np.int8(0)
