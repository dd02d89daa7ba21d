"""Products of a few rows with weights as they are stored, wherever they lie: each weight is read once.

There is a routine for every format, compiled when a model is first opened that has it.  A row's result does not depend
on the other rows, nor on which rows of the weight are asked for together.

Where there are tile registers, many rows go through them (tile_streams.py) with bfloat16 weights, as exactly as in
float32, and rounded ones with weights of every format.  Few rows do not: one row alone would be slower, and it must
come out the same in any company (LOG.md).  With integers (integers.py) sums are exact on registers and off them, so
rows may go either way, and many go as a few do.
"""

import numpy as np

from ...arrays import lined_up
from .. import amx
from ..addresses import floats_at
from ..integer_lines import SIDE
from ..jit import Routine, njit
from ..streams import BFLOAT16, BLOCK, BLOCK_OF_FOUR, FLOAT32, INT4, INT8, LINE, stream, widen_in_order
from ..vectors import WIDTH, fetch_to_read
from .integers import ASIDE, FEW_ROWS, multiply_integers, prepared_row_size
from .tile_streams import multiply_exact, multiply_pairs, tiled_scratch_size, tiled_size
from .widened import row_bytes, wide_scratch_size

ALWAYS_BY_FOUR = WIDTH == 16  # rows of x, where there are 32 registers; with 16 five and six rows go faster by twos
MANY = 12 if ALWAYS_BY_FOUR else 6  # with more, a block of weights is widened first, and the next one asked for

_FLOATS_OF_FOUR = BLOCK_OF_FOUR[FLOAT32]
_ZERO = np.float32(0.0)
_SPARE = 64  # floats that a prepared row may take beyond its columns


# ---- preparing x


@njit
def copy_columns(at, line, columns):
    """For float32: as it is, then zeros."""
    whole = floats_at(at, columns + WIDTH)
    for i in range(columns):
        whole[i] = line[i]
    for i in range(columns, columns + WIDTH):
        whole[i] = _ZERO


@njit
def sort_columns(at, line, columns):
    """For bfloat16: in each block the even columns, then the odd ones."""
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


# ---- products


@njit(inline="always")
def _many(kind, w, w_step, count, ask, columns, x, x_step, rows, y, y_step, y_gap, scratch):
    """A few weight rows times many rows of x, four of these at a time.

    bfloat16 weights are widened first, once for all.  The rows that follow these are asked for meanwhile, `ask` bytes
    of each, some with every pass: by themselves processors do not fetch so far ahead.
    """
    wide, wide_step, length = w, w_step, columns
    if kind == BFLOAT16:
        length = (columns + 2 * WIDTH - 1) // (2 * WIDTH) * 2 * WIDTH
        wide, wide_step = scratch, 4 * length
        for j in range(count):
            widen_in_order(w + w_step * j, columns, wide + wide_step * j)
    passes = (rows + 3) // 4
    share, asked = (ask + LINE * passes - 1) // (LINE * passes) * LINE, 0
    for m in range(0, rows, 4):
        for at in range(asked, min(ask, asked + share), LINE):
            for j in range(_FLOATS_OF_FOUR):
                fetch_to_read(floats_at(w + w_step * j + ask + at, 1), 0)
        asked += share
        some, into, left = x + m * x_step, y + m * y_step, rows - m
        stream(FLOAT32, _FLOATS_OF_FOUR, 4, wide, wide_step, count, some, x_step, left, into, y_step, y_gap, length)


def _multiply(kind: int) -> Routine:
    """The routine of a format: numbers in its closure, so that what the other formats need is not compiled."""
    block_of_four = BLOCK_OF_FOUR[kind]

    def multiply(codes, scales, columns, first, last, x, x_row, rows, y, y_row, prepared, scratch):
        """y[m, n - first] = row m of x . row n of the weight, first <= n < last.  Rows of x and y in floats.

        x is 0 if it lies in `prepared` already, in the form that this format is multiplied with.  Weight rows that are
        read side by side lie far apart, each followed by its neighbour in the next turn: so many long streams are what
        processors fetch ahead of (rows next to each other ran at half the speed of memory).
        """
        row, step = row_bytes(kind, columns), 4 * (columns + _SPARE)
        by_four = rows > 2 and (ALWAYS_BY_FOUR or rows <= 4)
        block = _FLOATS_OF_FOUR if rows > MANY else block_of_four if by_four else BLOCK
        apart = (last - first + block - 1) // block
        for m in range(rows if x else 0):
            at, line = prepared + m * step, floats_at(x + 4 * x_row * m, columns)
            if kind == BFLOAT16:
                sort_columns(at, line, columns)
            else:
                copy_columns(at, line, columns)
        w_step, y_step, y_gap = apart * row, 4 * y_row, 4 * apart
        for n in range(apart):
            count, m = (last - first - n + apart - 1) // apart, 0
            w, out = codes + (first + n) * row, y + 4 * n
            if rows > MANY:
                ask = row if n + 1 < apart else 0
                _many(kind, w, w_step, count, ask, columns, prepared, step, rows, out, y_step, y_gap, scratch)
                continue
            while m < rows:
                at, into, left = prepared + m * step, out + m * y_step, rows - m
                if by_four and left > 2:  # three rows pass as four
                    stream(kind, block_of_four, 4, w, w_step, count, at, step, left, into, y_step, y_gap, columns)
                    m += 4
                elif left > 1:
                    stream(kind, BLOCK, 2, w, w_step, count, at, step, left, into, y_step, y_gap, columns)
                    m += 2
                else:
                    stream(kind, BLOCK, 1, w, w_step, count, at, step, left, into, y_step, y_gap, columns)
                    m += 1
        return 0

    return Routine(multiply)


multiply = (*map(_multiply, (FLOAT32, BFLOAT16)), *map(multiply_integers, (INT8, INT4)))  # up to FEW_ROWS rows


def multiply_many(kind: int, rounded: bool) -> Routine | None:
    """The routine of a format for many rows, if there is one that takes them prepared, as those of a few are."""
    if kind in (INT8, INT4) and amx.NATIVE_BYTES and not rounded:
        return multiply[kind]
    if not amx.NATIVE:
        return None
    return multiply_pairs[kind] if rounded else multiply_exact if kind == BFLOAT16 else None


def scratch_size(columns: int) -> int:
    """Floats of scratch that a product needs, of few rows or of many, for weights of up to so many columns."""
    tiled = tiled_scratch_size(columns) if amx.NATIVE else 0
    return max(ASIDE, wide_scratch_size(columns), tiled)


def row_size(columns: int) -> int:
    """Floats that a prepared row takes for products with floats."""
    return columns + _SPARE


def prepared_size(columns: int, rows: int) -> int:
    """Floats that prepared rows take, in any format, of up to so many columns."""
    few = min(rows, FEW_ROWS)
    integers = -(-rows // SIDE) * SIDE if amx.NATIVE_BYTES else few
    sizes = few * row_size(columns), integers * prepared_row_size(columns)
    return lined_up(max(*sizes, tiled_size(columns, rows) if amx.NATIVE else 0))
