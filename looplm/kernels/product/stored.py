"""Products of a few rows with weights as they are stored, wherever they lie: each weight is read once.

There is a routine for every format, compiled when a model is first opened that has it.  A row's result does not depend
on the other rows, nor on which rows of the weight are asked for together.

Where there are tile registers, many rows go through them (tile_streams.py) with bfloat16 weights, as exactly as in
float32, and rounded ones with weights of every format.  Few rows do not: one row alone would be slower, and it must
come out the same in any company (LOG.md).
"""

import numpy as np

from ...arrays import lined_up
from .. import amx
from ..addresses import floats_at, ints_at, shorts_at, signed_bytes_at
from ..intrinsics import round32
from ..jit import Routine, njit
from ..plain_streams import INT4_BLOCK
from ..streams import BFLOAT16, BLOCK, INT4, INT8, PRODUCTS, TOGETHER, stream
from ..vectors import LANES, WIDTH
from .tile_streams import multiply_exact, multiply_pairs, tiled_scratch_size, tiled_size
from .widened import group_size, padded, row_bytes, wide_scratch_size

FEW_ROWS = 24  # up to so many rows, weights are multiplied as they lie in memory

_ZERO, _MOST = np.float32(0.0), np.float32(127 * 256 + 127)  # whose high byte is one, too
_ZERO_POINT = np.int32(8)
_SPARE = 64  # floats that a prepared row takes beyond its columns: int4 rounds a block there


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


@njit
def _round_group(codes, line):
    """codes: 16-bit integers, zeros after the line's end -> what one of them is worth."""
    highest, poison = _ZERO, _ZERO
    for i in range(line.size):
        highest = max(highest, abs(line[i]))
        poison += line[i] * _ZERO  # integers have no NaN: the scale carries it on
    inverse = _MOST / highest if highest > _ZERO else _ZERO
    for i in range(line.size):
        codes[i] = np.int16(round32(line[i] * inverse))
    for i in range(line.size, codes.size):
        codes[i] = 0
    return highest / _MOST + poison


@njit
def _round_columns(at, line, columns):
    """For int8: the integers, then the scale of each group."""
    stored = padded(INT8, columns)
    codes, scales = shorts_at(at, stored), floats_at(at + 2 * stored, stored // 64)
    for g in range(scales.size):
        scales[g] = _round_group(codes[64 * g : 64 * (g + 1)], line[64 * g : min(columns, 64 * (g + 1))])


@njit
def _split_columns(at, line, columns):
    """For int4: each integer in two bytes, 256 high + low, in the order of the codes they are multiplied with.

    A block of 128 columns is the high bytes, the low ones, and what the sum of each lane begins with: codes are 8 above
    their values.
    """
    blocks = padded(INT4, columns) // 128
    scales = floats_at(at + INT4_BLOCK * blocks, 4 * blocks)
    codes = shorts_at(at + (INT4_BLOCK + 16) * blocks, 128)
    for b in range(blocks):
        place = at + INT4_BLOCK * b
        high, low, starts = signed_bytes_at(place, 128), signed_bytes_at(place + 128, 128), ints_at(place + 256, 16)
        for g in range(4):
            first = min(columns, 128 * b + 32 * g)
            scales[4 * b + g] = _round_group(codes[32 * g : 32 * (g + 1)], line[first : min(columns, first + 32)])
        for i in range(16):
            starts[i] = 0
        for i in range(32):  # four columns of a group: first halves of the groups, by turns, then second halves
            source, total = i % 4 * 32 + i // 4 * 4, np.int32(0)
            for j in range(4):
                code = np.int32(codes[source + j])
                upper = (code + np.int32(128)) >> np.int32(8)
                high[4 * i + j], low[4 * i + j] = upper, code - (upper << np.int32(8))
                total += code
            starts[i % LANES] -= total * _ZERO_POINT


# ---- products


def _multiply(kind: int) -> Routine:
    """The routine of a format: numbers in its closure, so that what the other formats need is not compiled."""
    integers, together = kind in (INT8, INT4), TOGETHER[kind]

    def multiply(codes, scales, columns, first, last, x, x_row, rows, y, y_row, prepared, scratch):
        """y[m, n - first] = row m of x . row n of the weight, first <= n < last.  Rows of x and y in floats.

        x is 0 if it lies in `prepared` already, in the form that this format is multiplied with.  Weight rows that are
        read side by side lie far apart, each followed by its neighbour in the next turn: so many long streams are what
        processors fetch ahead of (rows next to each other ran at half the speed of memory).
        """
        stored, s_step = columns, 0
        if integers:
            stored = padded(kind, columns)
            s_step = 2 * (stored // group_size(kind))
        row, step = row_bytes(kind, columns), 4 * (padded(INT4, columns) + _SPARE)
        apart = (last - first + BLOCK - 1) // BLOCK
        for m in range(rows if x else 0):
            at, line = prepared + m * step, floats_at(x + 4 * x_row * m, columns)
            if kind == INT8:
                _round_columns(at, line, columns)
            elif kind == INT4:
                _split_columns(at, line, columns)
            elif kind == BFLOAT16:
                sort_columns(at, line, columns)
            else:
                copy_columns(at, line, columns)
        w_step, y_step, y_gap = apart * row, 4 * y_row, 4 * apart
        for n in range(apart):
            count = (last - first - n + apart - 1) // apart
            w, s, out = codes + (first + n) * row, scales + (first + n) * s_step, y + 4 * n
            s_gap, m = apart * s_step, 0
            while rows - m >= min(together, 3):  # three rows pass as four; two have a kernel of their own
                at, into, several = prepared + m * step, out + m * y_step, min(together, rows - m)
                stream(
                    kind, together, w, w_step, count, at, step, several, s, s_gap, scratch, into, y_step, y_gap, stored
                )
                m += together
            at, into = prepared + m * step, out + m * y_step
            if together > 2 and rows - m == 2:
                stream(kind, 2, w, w_step, count, at, step, 2, s, s_gap, scratch, into, y_step, y_gap, stored)
            elif rows - m == 1:
                stream(kind, 1, w, w_step, count, at, step, 1, s, s_gap, scratch, into, y_step, y_gap, stored)
        return 0

    return Routine(multiply)


multiply = tuple(_multiply(kind) for kind in range(4))  # up to FEW_ROWS rows


def multiply_many(kind: int, rounded: bool) -> Routine | None:
    """The routine of a format for many rows, if there is one that takes them prepared, as those of a few are."""
    if not amx.NATIVE:
        return None
    return multiply_pairs[kind] if rounded else multiply_exact if kind == BFLOAT16 else None


def scratch_size(columns: int) -> int:
    """Floats of scratch that a product needs, of few rows or of many, for weights of up to so many columns."""
    tiled = tiled_scratch_size(columns) if amx.NATIVE else 0
    return max(PRODUCTS, wide_scratch_size(columns), tiled)


def row_size(columns: int) -> int:
    """Floats that a prepared row takes, in any format, for products of a few rows by themselves."""
    return columns + 127 + _SPARE  # padded to 128 columns at most


def prepared_size(columns: int, rows: int) -> int:
    """Floats that prepared rows take, in any format, of up to so many columns."""
    return lined_up(max(min(rows, FEW_ROWS) * row_size(columns), tiled_size(columns, rows) if amx.NATIVE else 0))
