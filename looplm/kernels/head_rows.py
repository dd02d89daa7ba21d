"""What attention does with rows of one head, in either precision: copies, and what lies around the softmax."""

import numpy as np

from .jit import njit
from .softmax import LOG2_E, ROWS
from .vectors import scale_eight, scale_one

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@njit
def cut(buffer, size):
    """The first elements of a buffer, and what is left of it."""
    return buffer[:size], buffer[size:]


@njit
def scale_row(into, into_at, source, source_at, count, factor):
    """`count` numbers times `factor`.  Plain loops would ask at every row whether the two overlap: 10 ns each."""
    for c in range(0, count - 7, 8):
        scale_eight(into, into_at + c, source, source_at + c, factor)
    for c in range(count // 8 * 8, count):
        scale_one(into, into_at + c, source, source_at + c, factor)


@njit
def unpack_rows(x, rows, width):
    """x: rows x K from `rows` of `width`."""
    step = x.strides[0] // 4
    for i in range(x.shape[0]):
        scale_row(x, i * step, rows, i * width, x.shape[1], _ONE)


@njit
def unpack_scaled(x, rows, width, factor):
    """The same, each row times a factor of its own."""
    step = x.strides[0] // 4
    for i in range(x.shape[0]):
        scale_row(x, i * step, rows, i * width, x.shape[1], factor[i])


@njit(inline="always")
def finish_rows(lse, divisor, stats, at, i, first_key, last):
    """What `weigh` left in stats from `at` on, of rows i to i + ROWS, as far as there are so many, the first of which
    sees the keys up to `last`: the log of their sum of exponentials, and what divides them.  0 where nothing is seen.
    """
    for row in range(min(ROWS, lse.size - i)):
        highest, total, blind = stats[at + row], stats[at + ROWS + row], last + row < first_key
        lse[i + row] = _ZERO if blind else highest / LOG2_E + np.log(total)
        divisor[i + row] = _ZERO if blind else _ONE / total


@njit(inline="always")
def shift_rows(shifts, dots, lse, dy, y):
    """What `differentiate` subtracts, of rows x K: lse in powers of two, and dy . y."""
    for i in range(dy.shape[0]):
        dot = _ZERO
        for c in range(dy.shape[1]):
            dot += dy[i, c] * y[i, c]
        shifts[i], dots[i] = lse[i] * LOG2_E, dot
