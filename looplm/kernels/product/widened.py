"""Stored weights as float32: a row of them, and products with many rows.

A block of weight rows is widened to float32 and packed into panels for the register tile, which many rows share; or,
where the products may be of bfloat16 numbers, packed as pairs of these, and the rows of x with them.  What a row of x
gets does not depend on the other rows, nor on which rows of the weight are asked for together.
"""

import numpy as np

from ..addresses import floats_at, pairs_at, words_at
from ..integer_lines import SIDE
from ..intrinsics import widen16
from ..jit import Routine, njit
from ..streams import BFLOAT16, FLOAT32
from ..vectors import TILE_COLUMNS, transpose_eight
from .integers import in_whole_runs, widen_integers, widen_run
from .packing import pair_rows
from .panels import DEPTH, rows_times_panel

PANEL_BLOCK = 8  # panels that are widened at a time
WIDE_BLOCK = 84  # rows that stay in the second-level cache for such a run

_ZERO = np.float32(0.0)


@njit
def row_bytes(kind, columns):
    """Bytes of a stored row of so many floats."""
    return 4 * columns if kind == FLOAT32 else 2 * columns


@njit
def widen_row(kind, codes, scales, columns, n, out):
    """Row n of a stored matrix as float32 numbers.  out: an array of `columns`."""
    at = codes + n * row_bytes(kind, columns)
    if kind == FLOAT32:
        line = floats_at(at, columns)
        for i in range(columns):
            out[i] = line[i]
    elif kind == BFLOAT16:
        words = words_at(at, columns)
        for i in range(columns):
            out[i] = widen16(words[i])
    else:
        widen_integers(kind, codes, scales, columns, n, out)


@njit
def eight_rows(lines, kind, codes, scales, columns, n, last):
    """lines: 8 x columns, rows n and on; zeros from the last on."""
    for j in range(8):
        line = lines[j * columns : (j + 1) * columns]
        if n + j < last:
            widen_row(kind, codes, scales, columns, n + j, line)
        else:
            line[:] = _ZERO


@njit
def _turn(panel, at, lines, line_step, depth):
    """panel[k, j] = element k of line j, eight lines; the panel begins at `at` and is TILE_COLUMNS wide."""
    for k in range(0, depth - 7, 8):
        transpose_eight(panel, at + k * TILE_COLUMNS, TILE_COLUMNS, lines, k, line_step)
    for k in range(depth // 8 * 8, depth):
        for j in range(8):
            panel[at + k * TILE_COLUMNS + j] = lines[j * line_step + k]


@njit
def _widen_panel(panels, at, lines, kind, codes, scales, columns, n, last):
    """Rows n and on, TILE_COLUMNS of them, as a panel: columns x TILE_COLUMNS; zeros beyond the last."""
    if TILE_COLUMNS % SIDE == 0 and in_whole_runs(kind, columns, n):
        if last - n <= TILE_COLUMNS - SIDE:
            panels[at : at + columns * TILE_COLUMNS] = _ZERO
        for row in range(0, min(TILE_COLUMNS, last - n), SIDE):
            into = panels[at + row :].ctypes.data
            widen_run(kind, False, codes, scales, columns, n + row, into, 4 * TILE_COLUMNS)
        return
    for eight in range(0, TILE_COLUMNS, 8):
        eight_rows(lines, kind, codes, scales, columns, n + eight, last)
        _turn(panels, at + eight, lines, columns, columns)


@njit
def _pair_panel(panels, at, words, lines, kind, codes, scales, columns, n, last):
    """The same in words of two bfloat16 numbers: half as deep."""
    depth = (columns + 1) // 2
    if TILE_COLUMNS % SIDE == 0 and in_whole_runs(kind, columns, n):
        if last - n <= TILE_COLUMNS - SIDE:
            panels[at : at + depth * TILE_COLUMNS] = np.uint32(0)
        for row in range(0, min(TILE_COLUMNS, last - n), SIDE):
            into = panels[at + row :].ctypes.data
            widen_run(kind, True, codes, scales, columns, n + row, into, 4 * TILE_COLUMNS)
        return
    for eight in range(0, TILE_COLUMNS, 8):
        if kind == BFLOAT16 and columns % 2 == 0 and n + eight + 8 <= last:  # they are such words where they lie
            _turn(panels, at + eight, pairs_at(codes + 2 * columns * (n + eight), 8 * depth), depth, depth)
        else:
            eight_rows(lines, kind, codes, scales, columns, n + eight, last)
            pair_rows(words, lines.reshape((8, columns)), 0, 8, depth)
            _turn(panels, at + eight, words, depth, depth)


@njit
def _rows_times_block(y, y_at, y_row, x, x_at, x_row, rows, panels, count, depth, outputs, edge):
    """y (rows x outputs) = x (rows x depth) times `count` panels, the last of which may be wider than is wanted."""
    run = min(depth, DEPTH)
    for k in range(0, depth, run):
        length, left, more = min(run, depth - k), x_at + k, 1 if k else 0
        for p in range(count):
            column, panel_at = p * TILE_COLUMNS, (p * depth + k) * TILE_COLUMNS
            if column + TILE_COLUMNS <= outputs:
                rows_times_panel(y, y_at + column, y_row, x, left, x_row, rows, panels, panel_at, length, more)
            else:
                rows_times_panel(edge, 0, TILE_COLUMNS, x, left, x_row, rows, panels, panel_at, length, more)
    rest = outputs % TILE_COLUMNS
    for i in range(rows if rest else 0):
        for j in range(rest):
            y[y_at + i * y_row + outputs - rest + j] = edge[i * TILE_COLUMNS + j]


@Routine
def multiply_wide(kind, codes, scales, columns, first, last, x, x_row, rows, y, y_row, scratch):
    """y[m, n - first] = row m of x . row n of the weight, first <= n < last.  Rows of x and y in floats."""
    size = PANEL_BLOCK * TILE_COLUMNS * columns
    panels, lines = floats_at(scratch, size), floats_at(scratch + 4 * size, 8 * columns)
    edge = floats_at(scratch + 4 * (size + 8 * columns), WIDE_BLOCK * TILE_COLUMNS)
    left, into = floats_at(x, rows * x_row), floats_at(y, rows * y_row)
    for n in range(first, last, PANEL_BLOCK * TILE_COLUMNS):
        outputs = min(PANEL_BLOCK * TILE_COLUMNS, last - n)
        count = (outputs + TILE_COLUMNS - 1) // TILE_COLUMNS
        for p in range(count):
            at, row = p * columns * TILE_COLUMNS, n + p * TILE_COLUMNS
            _widen_panel(panels, at, lines, kind, codes, scales, columns, row, last)
        for begin in range(0, rows, WIDE_BLOCK):
            y_at, x_at, height = begin * y_row + n - first, begin * x_row, min(WIDE_BLOCK, rows - begin)
            _rows_times_block(into, y_at, y_row, left, x_at, x_row, height, panels, count, columns, outputs, edge)
    return 0


@Routine
def multiply_wide_pairs(kind, codes, scales, columns, first, last, x, x_row, rows, y, y_row, scratch):
    """The same of numbers rounded to bfloat16, with float32 sums: through the processor's dot product if it has one."""
    depth = (columns + 1) // 2
    size, own = PANEL_BLOCK * TILE_COLUMNS * depth, WIDE_BLOCK * depth
    panels, words = pairs_at(scratch, size), pairs_at(scratch + 4 * size, own + 8 * depth)
    lines = floats_at(scratch + 4 * (size + own + 8 * depth), 8 * columns)
    edge = floats_at(scratch + 4 * (size + own + 8 * depth + 8 * columns), WIDE_BLOCK * TILE_COLUMNS)
    into = floats_at(y, rows * y_row)
    for n in range(first, last, PANEL_BLOCK * TILE_COLUMNS):
        outputs = min(PANEL_BLOCK * TILE_COLUMNS, last - n)
        count = (outputs + TILE_COLUMNS - 1) // TILE_COLUMNS
        for p in range(count):
            at, row = p * depth * TILE_COLUMNS, n + p * TILE_COLUMNS
            _pair_panel(panels, at, words[own:], lines, kind, codes, scales, columns, row, last)
        for begin in range(0, rows, WIDE_BLOCK):
            y_at, height = begin * y_row + n - first, min(WIDE_BLOCK, rows - begin)
            for row in range(height):
                line = floats_at(x + 4 * x_row * (begin + row), columns)
                pair_rows(words[row * depth : (row + 1) * depth], line.reshape((1, columns)), 0, 1, depth)
            _rows_times_block(into, y_at, y_row, words, 0, depth, height, panels, count, depth, outputs, edge)
    return 0


def wide_scratch_size(columns: int) -> int:
    """Floats of scratch that either product needs for weights of up to so many columns."""
    depth = (columns + 1) // 2
    widened, paired = PANEL_BLOCK * TILE_COLUMNS * columns, (PANEL_BLOCK * TILE_COLUMNS + WIDE_BLOCK + 8) * depth
    return max(widened, paired) + 8 * columns + WIDE_BLOCK * TILE_COLUMNS
