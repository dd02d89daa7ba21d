"""Products on tile registers (AMX) with weights as they are stored, of any number of rows.

Sixteen weight rows are the left operand, read from where they lie; the right one are rows of x, prepared once: each
takes a column for every bfloat16 part of its numbers (parts.py), so that with three of them a product is as exact as in
float32, and with one it is of rounded numbers.  Columns know nothing of each other, and a sum runs along a row of the
weight from its first number to its last: a row's result does not depend on other rows, on how many there are, or on
which rows of the weight are asked for together.

Up to five rows cost the same, since 16 columns do: few rows take as long as reading the weights.  Many go by a block of
weights, which stays in the second-level cache, in groups of at most three registers of columns.
"""

import numpy as np

from ..addresses import floats_at, pairs_at, words_at
from ..amx import (
    SIDE,
    STATE_SIZE,
    begin_tiles,
    dot_tiles,
    end_tiles,
    load_tile_at,
    store_tile,
    zero_tile,
)
from ..amx import load_tile as reload_tile
from ..jit import Routine, njit
from ..parts import NUMBERS, PARTS, WORDS, add_eight, split
from ..streams import BFLOAT16
from ..vectors import transpose_eight
from .integers import in_whole_runs, widen_run
from .packing import pair_rows
from .widened import eight_rows, row_bytes

GROUP = 3 * SIDE  # columns that pass by the weights together
BLOCK = 128  # weight rows that all groups pass by before the next are read
PAIR = 2 * SIDE  # weight rows that are multiplied together with more than one register of columns
MANY_GROUPS = 16  # at a time: bounds the memory for unfinished sums
DEEP = 16  # registers along a row, after which unfinished sums wait while the other groups pass by

_TILE = 4 * SIDE * WORDS  # bytes of a register
_LINE = 4 * WORDS  # bytes of its rows
_LOW = SIDE * GROUP  # floats from the sums of a register of weight rows to those of the next
_ZERO, _NOTHING, _NONE = np.float32(0.0), np.uint32(0), np.uint16(0)


@njit
def _depth(columns):
    """Registers along a row of so many numbers."""
    return (columns + NUMBERS - 1) // NUMBERS


# ---- preparing x


def _preparing(parts):
    """The function for so many parts: a number in its closure, which intrinsics want literally."""
    most = GROUP // parts

    @njit
    def prepare(ready, x, x_row, rows, columns):
        """Rows of x as right operands: of each group, of each depth, registers of 16 columns.

        Column p * G + m of a group of G rows is part p of row m.  Behind the last group there are lines on their way.
        """
        depth, groups = _depth(columns), (rows + most - 1) // most
        own = ready + 3 * groups * depth * _TILE
        lines, rest = pairs_at(own, GROUP * WORDS), floats_at(own + 4 * GROUP * WORDS, NUMBERS)
        for g in range(groups):
            height = min(most, rows - g * most)
            tiles = (height * parts + SIDE - 1) // SIDE
            lines[height * parts * WORDS :] = _NOTHING
            words = pairs_at(ready + 3 * g * depth * _TILE, tiles * depth * SIDE * WORDS)
            for k in range(depth):
                count = min(NUMBERS, columns - k * NUMBERS)
                for m in range(height):
                    line = floats_at(x + 4 * (x_row * (g * most + m) + k * NUMBERS), count)
                    if count < NUMBERS:
                        rest[:count] = line
                        rest[count:] = _ZERO
                        line = rest
                    split(parts, lines, m * WORDS, height * WORDS, line, 0)
                for c in range(tiles):
                    into, source = (k * tiles + c) * SIDE * WORDS, c * SIDE * WORDS
                    for i in range(0, WORDS, 8):
                        for j in range(0, SIDE, 8):
                            transpose_eight(words, into + i * SIDE + j, SIDE, lines, source + j * WORDS + i, WORDS)

    return prepare


_PREPARE = {parts: _preparing(parts) for parts in (1, PARTS)}


# ---- products


@njit
def _four_by_one(state, sums, w, w_step, right, depth, more):
    """sums: 64 x GROUP, the first 16 columns (+)= four registers of weight rows times one of columns."""
    if more:
        reload_tile(state, 0, sums, 0, GROUP)
        reload_tile(state, 1, sums, _LOW, GROUP)
        reload_tile(state, 2, sums, 2 * _LOW, GROUP)
        reload_tile(state, 3, sums, 3 * _LOW, GROUP)
    else:
        zero_tile(state, 0)
        zero_tile(state, 1)
        zero_tile(state, 2)
        zero_tile(state, 3)
    for k in range(depth):
        at = k * _LINE
        load_tile_at(state, 7, right + k * _TILE, _LINE)
        load_tile_at(state, 4, w[0] + at, w_step)
        dot_tiles(state, 0, 4, 7)
        load_tile_at(state, 5, w[1] + at, w_step)
        dot_tiles(state, 1, 5, 7)
        load_tile_at(state, 6, w[2] + at, w_step)
        dot_tiles(state, 2, 6, 7)
        load_tile_at(state, 4, w[3] + at, w_step)
        dot_tiles(state, 3, 4, 7)
    store_tile(state, 0, sums, 0, GROUP)
    store_tile(state, 1, sums, _LOW, GROUP)
    store_tile(state, 2, sums, 2 * _LOW, GROUP)
    store_tile(state, 3, sums, 3 * _LOW, GROUP)


@njit
def _two_by_one(state, sums, w, w_step, right, depth, more):
    """The same of two registers of weight rows."""
    if more:
        reload_tile(state, 0, sums, 0, GROUP)
        reload_tile(state, 1, sums, _LOW, GROUP)
    else:
        zero_tile(state, 0)
        zero_tile(state, 1)
    for k in range(depth):
        at = k * _LINE
        load_tile_at(state, 7, right + k * _TILE, _LINE)
        load_tile_at(state, 4, w[0] + at, w_step)
        dot_tiles(state, 0, 4, 7)
        load_tile_at(state, 5, w[1] + at, w_step)
        dot_tiles(state, 1, 5, 7)
    store_tile(state, 0, sums, 0, GROUP)
    store_tile(state, 1, sums, _LOW, GROUP)


@njit
def _two_by_two(state, sums, w, w_step, right, depth, more):
    """sums: 32 x GROUP, the first 32 columns (+)= two registers of weight rows times two of columns."""
    if more:
        reload_tile(state, 0, sums, 0, GROUP)
        reload_tile(state, 1, sums, SIDE, GROUP)
        reload_tile(state, 2, sums, _LOW, GROUP)
        reload_tile(state, 3, sums, _LOW + SIDE, GROUP)
    else:
        zero_tile(state, 0)
        zero_tile(state, 1)
        zero_tile(state, 2)
        zero_tile(state, 3)
    for k in range(depth):
        at, columns = k * _LINE, right + 2 * k * _TILE
        load_tile_at(state, 4, w[0] + at, w_step)
        load_tile_at(state, 6, columns, _LINE)
        dot_tiles(state, 0, 4, 6)
        load_tile_at(state, 7, columns + _TILE, _LINE)
        dot_tiles(state, 1, 4, 7)
        load_tile_at(state, 5, w[1] + at, w_step)
        dot_tiles(state, 2, 5, 6)
        dot_tiles(state, 3, 5, 7)
    store_tile(state, 0, sums, 0, GROUP)
    store_tile(state, 1, sums, SIDE, GROUP)
    store_tile(state, 2, sums, _LOW, GROUP)
    store_tile(state, 3, sums, _LOW + SIDE, GROUP)


@njit
def _two_by_three(state, sums, w, w_step, right, depth, more):
    """sums: 32 x GROUP (+)= two registers of weight rows times three of columns."""
    if more:
        reload_tile(state, 0, sums, 0, GROUP)
        reload_tile(state, 1, sums, SIDE, GROUP)
        reload_tile(state, 2, sums, 2 * SIDE, GROUP)
        reload_tile(state, 3, sums, _LOW, GROUP)
        reload_tile(state, 4, sums, _LOW + SIDE, GROUP)
        reload_tile(state, 5, sums, _LOW + 2 * SIDE, GROUP)
    else:
        zero_tile(state, 0)
        zero_tile(state, 1)
        zero_tile(state, 2)
        zero_tile(state, 3)
        zero_tile(state, 4)
        zero_tile(state, 5)
    for k in range(depth):
        at, columns = k * _LINE, right + 3 * k * _TILE
        load_tile_at(state, 6, w[0] + at, w_step)
        load_tile_at(state, 7, columns, _LINE)
        dot_tiles(state, 0, 6, 7)
        load_tile_at(state, 7, columns + _TILE, _LINE)
        dot_tiles(state, 1, 6, 7)
        load_tile_at(state, 7, columns + 2 * _TILE, _LINE)
        dot_tiles(state, 2, 6, 7)
        load_tile_at(state, 6, w[1] + at, w_step)
        dot_tiles(state, 5, 6, 7)
        load_tile_at(state, 7, columns + _TILE, _LINE)
        dot_tiles(state, 4, 6, 7)
        load_tile_at(state, 7, columns, _LINE)
        dot_tiles(state, 3, 6, 7)
    store_tile(state, 0, sums, 0, GROUP)
    store_tile(state, 1, sums, SIDE, GROUP)
    store_tile(state, 2, sums, 2 * SIDE, GROUP)
    store_tile(state, 3, sums, _LOW, GROUP)
    store_tile(state, 4, sums, _LOW + SIDE, GROUP)
    store_tile(state, 5, sums, _LOW + 2 * SIDE, GROUP)


@njit
def _add_products(state, tiles, sums, w, w_step, right, depth, more):
    """Those of `depth` registers along the rows."""
    if tiles == 1 and w[2] == w[1]:  # there are no more rows
        _two_by_one(state, sums, w, w_step, right, depth, more)
    elif tiles == 1:
        _four_by_one(state, sums, w, w_step, right, depth, more)
    elif tiles == 2:
        _two_by_two(state, sums, w, w_step, right, depth, more)
    else:
        _two_by_three(state, sums, w, w_step, right, depth, more)


@njit
def _hand_out(y, y_at, y_row, outputs, height, parts, sums, added):
    """y[m, n] = the sum of weight row n with row m, its parts added up.  sums: PAIR x GROUP, outputs of them wanted."""
    if parts == PARTS and 3 * height <= SIDE:  # turned first: so few lines are added faster than so many columns
        for n in range(0, PAIR, 8):
            for c in range(0, 3 * height, 8):
                transpose_eight(added, c * PAIR + n, PAIR, sums, n * GROUP + c, GROUP)
        for m in range(height):
            high, middle, low = m * PAIR, (height + m) * PAIR, (2 * height + m) * PAIR
            for n in range(0, outputs, 8):
                if n + 8 <= outputs:
                    add_eight(y, y_at + m * y_row + n, added, high + n, middle + n, low + n)
                else:
                    add_eight(added, high + n, added, high + n, middle + n, low + n)
                    for j in range(n, outputs):
                        y[y_at + m * y_row + j] = added[high + j]
        return
    source, step = sums, GROUP
    if parts == PARTS:
        source, step = added, SIDE
        for n in range(outputs):
            for m in range(0, height, 8):
                high = n * GROUP + m
                add_eight(added, n * SIDE + m, sums, high, high + height, high + 2 * height)
    whole, eights = outputs // 8 * 8, height // 8 * 8
    for m in range(0, eights, 8):
        for n in range(0, whole, 8):
            transpose_eight(y, y_at + m * y_row + n, y_row, source, n * step + m, step)
    for m in range(height):
        for n in range(whole if m < eights else 0, outputs):
            y[y_at + m * y_row + n] = source[n * step + m]


@njit
def _copy_block(into, step, source, source_step, rows, count):
    """`count` bytes of each of some rows, beside zeros up to `step` bytes, and as many rows as fill registers."""
    for row in range((rows + SIDE - 1) // SIDE * SIDE):
        some = count if row < rows else 0
        line, given = words_at(into + row * step, step // 2), words_at(source + row * source_step, some // 2)
        for i in range(given.size):
            line[i] = given[i]
        for i in range(given.size, line.size):
            line[i] = _NONE


@njit
def _multiply_block(parts, w, w_step, columns, outputs, y, y_at, y_row, rows, ready, scratch):
    """Up to BLOCK weight rows with rows of x, up to MANY_GROUPS prepared groups of them, which begin at `ready`.

    Weights are copied on their way if they do not lie on cache lines, since a register then takes six times as long to
    load (20 ns, not 3), or if they do not fill registers, since nothing is read beyond a row's end or the last row.
    """
    depth, most, last = _depth(columns), GROUP // parts, (outputs - 1) // SIDE
    groups = (rows + most - 1) // most
    direct = (w | w_step) % _LINE == 0 and columns % NUMBERS == 0 and outputs % SIDE == 0
    run = depth if direct and groups == 1 else min(depth, DEEP)
    state, added = pairs_at(scratch, STATE_SIZE), floats_at(scratch + 4 * STATE_SIZE, PAIR * SIDE)
    every = floats_at(scratch + 4 * (STATE_SIZE + PAIR * SIDE), BLOCK * GROUP * groups)
    copied = scratch + 4 * (STATE_SIZE + PAIR * SIDE + every.size)
    for k in range(0, depth, run):
        length = min(run, depth - k)
        left, step = w + k * _LINE, w_step
        if not direct:
            _copy_block(copied, length * _LINE, left, w_step, outputs, min(length * _LINE, 2 * columns - k * _LINE))
            left, step = copied, length * _LINE
        for g in range(groups):
            height = min(most, rows - g * most)
            tiles = (height * parts + SIDE - 1) // SIDE
            together, first = (4 if tiles == 1 else 2) * SIDE, g * BLOCK if run < depth else 0
            right = ready + (3 * g * depth + tiles * k) * _TILE
            for n in range(0, outputs + together, together):
                if n < outputs:
                    at = (
                        left + n * step,
                        left + min(n // SIDE + 1, last) * SIDE * step,
                        left + min(n // SIDE + 2, last) * SIDE * step,
                        left + min(n // SIDE + 3, last) * SIDE * step,
                    )
                    _add_products(state, tiles, every[(first + n) * GROUP :], at, step, right, length, k > 0)
                # Those before, while memory is waited for: what has just been stored is slow to read, too.
                for done in range(max(0, n - together), min(n, outputs) if k + length == depth else 0, PAIR):
                    into, sums = y_at + g * most * y_row + done, every[(first + done) * GROUP :]
                    _hand_out(y, into, y_row, min(PAIR, outputs - done), height, parts, sums, added)


@njit
def _widen_pairs(words, lines, kind, codes, scales, columns, first, last):
    """Rows first to last as words, whole registers along a row."""
    depth = _depth(columns) * WORDS
    if in_whole_runs(kind, columns, first):
        turned = pairs_at(lines.ctypes.data, lines.size)
        for n in range(first, last, SIDE):
            widen_run(kind, True, codes, scales, columns, n, lines.ctypes.data, 4 * SIDE)
            for row in (0, 8):
                for k in range(0, depth, 8):
                    into = (n - first + row) * depth + k
                    transpose_eight(words, into, depth, turned, k * SIDE + row, SIDE)
        return
    for n in range(first, last, 8):
        eight_rows(lines, kind, codes, scales, columns, n, last)
        pair_rows(words[(n - first) * depth :], lines.reshape((8, columns)), 0, min(8, last - n), depth)


def _multiply(kind: int, parts: int) -> Routine:
    """The routine of a format: numbers in its closure, so that what the other formats need is not compiled."""
    prepare = _PREPARE[parts]

    def multiply(codes, scales, columns, first, last, x, x_row, rows, y, y_row, prepared, scratch):
        """y[m, n - first] = row m of x . row n of the weight, first <= n < last.  Rows of x and y in floats.

        x is 0 if it lies in `prepared` already, in the form that this format is multiplied with.
        """
        if x:
            prepare(prepared, x, x_row, rows, columns)
        row, depth, most = row_bytes(kind, columns), _depth(columns), GROUP // parts
        size = BLOCK * depth * WORDS if kind != BFLOAT16 else 0
        words, lines = pairs_at(scratch, size), floats_at(scratch + 4 * size, 8 * columns if size else 0)
        own = scratch + 4 * (size + (8 * columns + WORDS - 1) // WORDS * WORDS)
        into = floats_at(y, rows * y_row)
        state = pairs_at(own, STATE_SIZE)
        begin_tiles(state)
        for n in range(first, last, BLOCK):
            count = min(BLOCK, last - n)
            if size:
                _widen_pairs(words, lines, kind, codes, scales, columns, n, n + count)
            w, step = (scratch, depth * _LINE) if size else (codes + n * row, row)
            for m in range(0, rows, MANY_GROUPS * most):
                some, y_at = min(MANY_GROUPS * most, rows - m), m * y_row + n - first
                ready = prepared + 3 * (m // most) * depth * _TILE
                wide = depth * NUMBERS if size else columns
                _multiply_block(parts, w, step, wide, count, into, y_at, y_row, some, ready, own)
        end_tiles(state)
        return 0

    return Routine(multiply)


multiply_exact = _multiply(BFLOAT16, PARTS)  # as float32 would
multiply_pairs = tuple(_multiply(kind, 1) for kind in range(4))  # of rounded numbers


def tiled_size(columns: int, rows: int) -> int:
    """Floats that prepared rows take, whatever they are rounded to."""
    depth, groups = -(-columns // NUMBERS), -(-rows // (GROUP // PARTS))
    return GROUP * WORDS * (groups * depth + 1) + NUMBERS


def tiled_scratch_size(columns: int) -> int:
    """Floats of scratch that a product needs for weights of up to so many columns."""
    words = -(-columns // NUMBERS) * WORDS
    widened = BLOCK * words + 8 * columns + WORDS
    return widened + STATE_SIZE + PAIR * SIDE + BLOCK * GROUP * MANY_GROUPS + BLOCK * DEEP * WORDS
