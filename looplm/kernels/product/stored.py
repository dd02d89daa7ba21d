"""Products of a few rows with weights as they are stored, wherever they lie: each weight is read once.

There is a routine for every format, compiled when a model is first opened that has it.  A row's result does not depend
on the other rows, nor on which rows of the weight are asked for together.
"""

import numpy as np

from ..addresses import floats_at, shorts_at
from ..intrinsics import round32
from ..jit import Routine, njit
from ..streams import BFLOAT16, BLOCK, INT4, INT8, PRODUCTS, TOGETHER, stream
from ..vectors import WIDTH
from .widened import padded, wide_scratch_size

FEW_ROWS = 24  # up to so many rows, weights are multiplied as they lie in memory

_ZERO, _MOST = np.float32(0.0), np.float32(32767.0)


# ---- preparing x


@njit
def _copy_columns(at, line, columns):
    whole = floats_at(at, columns + WIDTH)
    for i in range(columns):
        whole[i] = line[i]
    for i in range(columns, columns + WIDTH):
        whole[i] = _ZERO


@njit
def _sort_columns(at, line, columns):
    block = 2 * WIDTH
    whole = columns // block
    for b in range(whole):
        source, out = line[b * block : (b + 1) * block], floats_at(at + 4 * b * block, block)
        for i in range(WIDTH):
            out[i] = source[2 * i]
            out[WIDTH + i] = source[2 * i + 1]
    out = floats_at(at + 4 * whole * block, block)
    for i in range(block):
        out[i] = _ZERO
    for i in range(columns - whole * block):
        out[i // 2 + WIDTH * (i % 2)] = line[whole * block + i]


@njit
def _round_columns(group, at, line, columns):
    """Integers of 16 bits, and the scale of each group."""
    stored = padded(columns)
    groups = stored // group
    codes, scales = shorts_at(at, stored), floats_at(at + 2 * stored, groups)
    for g in range(groups):
        first = g * group
        count = max(0, min(group, columns - first))
        highest, poison = _ZERO, _ZERO
        for i in range(first, first + count):
            highest = max(highest, abs(line[i]))
            poison += line[i] * _ZERO  # integers have no NaN: the scale carries it on
        inverse = _MOST / highest if highest > _ZERO else _ZERO
        scales[g] = highest / _MOST + poison
        for i in range(first, first + count):
            codes[i] = np.int16(round32(line[i] * inverse))
        for i in range(first + count, first + group):
            codes[i] = 0


# ---- products


def _multiply(kind: int) -> Routine:
    """The routine of a format: numbers in its closure, so that what the other formats need is not compiled."""
    bits, integers, group = (32, 16, 8, 4)[kind], kind in (INT8, INT4), 64 if kind == INT8 else 32
    together = TOGETHER[kind]

    def multiply(codes, scales, columns, first, last, x, x_row, rows, y, y_row, prepared, scratch):
        """y[m, n - first] = row m of x . row n of the weight, first <= n < last.  Rows of x and y in floats.

        x is 0 if it lies in `prepared` already, in the form that this format is multiplied with.  Weight rows that are
        read side by side lie far apart, each followed by its neighbour in the next turn: so many long streams are what
        processors fetch ahead of (rows next to each other ran at half the speed of memory).
        """
        stored, s_step = columns, 0
        if integers:
            stored = padded(columns)
            s_step = 2 * (stored // group)
        row, step, apart = (stored * bits) // 8, 4 * (padded(columns) + 16), (last - first + BLOCK - 1) // BLOCK
        for m in range(rows if x else 0):
            at, line = prepared + m * step, floats_at(x + 4 * x_row * m, columns)
            if integers:
                _round_columns(group, at, line, columns)
            elif kind == BFLOAT16:
                _sort_columns(at, line, columns)
            else:
                _copy_columns(at, line, columns)
        w_step, y_step, y_gap = apart * row, 4 * y_row, 4 * apart
        for n in range(apart):
            count = (last - first - n + apart - 1) // apart
            w, s, out = codes + (first + n) * row, scales + (first + n) * s_step, y + 4 * n
            for m in range(0, rows - 1, together):
                at, into, several = prepared + m * step, out + m * y_step, min(together, rows - m)
                stream(
                    kind,
                    together,
                    w,
                    w_step,
                    count,
                    at,
                    step,
                    several,
                    s,
                    apart * s_step,
                    scratch,
                    into,
                    y_step,
                    y_gap,
                    stored,
                )
            if rows % together == 1:
                at, into = prepared + (rows - 1) * step, out + (rows - 1) * y_step
                stream(kind, 1, w, w_step, count, at, step, 1, s, apart * s_step, scratch, into, y_step, y_gap, stored)
        return 0

    return Routine(multiply)


multiply = tuple(_multiply(kind) for kind in range(4))


def scratch_size(columns: int) -> int:
    """Floats of scratch that a product needs, of few rows or of many, for weights of up to so many columns."""
    return max(PRODUCTS, wide_scratch_size(columns))


def prepared_size(columns: int) -> int:
    """Floats that FEW_ROWS prepared rows take, in any format, of up to so many columns."""
    return FEW_ROWS * (columns + 80)
