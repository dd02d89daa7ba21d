"""Rounds groups of neighbouring weights to integers times a common scale, the best of several candidates.

All arithmetic is float64, so that codes and choices are those of the reference to the bit: a group is small, and its
candidates run at the speed of memory anyway.
"""

import numpy as np

from .jit import njit

# A later candidate must win by more than rounding can: sums run in another order here than in the reference.
_CLEARLY = 1.0 - 1e-9


@njit
def _error(values, scale, low, high):
    """Sum of squares of what rounding to multiples of `scale` loses."""
    total, inverse = 0.0, 1.0 / scale
    for i in range(values.size):
        code = min(max(np.rint(values[i] * inverse), low), high)
        off = values[i] - code * scale
        total += off * off
    return total


@njit
def _encode(codes, values, scale, low, high):
    """The nearest multiples; where two are equally near, the even one."""
    inverse = 1.0 / scale
    for i in range(values.size):
        code = np.rint(values[i] * inverse)
        # values / scale would round ties to even; the product with the inverse may miss a tie by one unit.
        off = values[i] - code * scale
        if abs(off) * 2.0 == scale and np.rint(code * 0.5) * 2.0 != code:
            code += 1.0 if off > 0.0 else -1.0
        codes[i] = np.int8(min(max(code, low), high))


@njit
def quantize_rows_into(codes, scale, weight, candidates, low, high):
    """weight: NK; candidates: C N G, float32 and never negative -> codes: N x G * group, int8; scale: N G.

    Columns past K count as zeros.
    """
    groups = scale.shape[1]
    size = codes.shape[1] // groups
    values = np.zeros(size, np.float64)
    for row in range(weight.shape[0]):
        for group in range(groups):
            begin = group * size
            there = max(0, min(size, weight.shape[1] - begin))
            for i in range(there):
                values[i] = weight[row, begin + i]
            for i in range(there, size):
                values[i] = 0.0
            best, least = candidates[0, row, group], np.inf
            if candidates.shape[0] > 1:
                for c in range(candidates.shape[0]):
                    if candidates[c, row, group] > 0.0:
                        error = _error(values, np.float64(candidates[c, row, group]), low, high)
                        if error < least * _CLEARLY:
                            best, least = candidates[c, row, group], error
            scale[row, group] = best
            if best > 0.0:
                _encode(codes[row, begin : begin + size], values, np.float64(best), low, high)
            else:
                codes[row, begin : begin + size] = np.int8(0)
