"""Stored weights as float32: a row of them, and products with many rows.

A block of weight rows is widened to float32 and packed into panels for the register tile, which many rows share.  What
a row of x gets does not depend on the other rows, nor on which rows of the weight are asked for together.
"""

import numpy as np

from ..addresses import floats_at, signed_bytes_at, words_at
from ..intrinsics import widen16
from ..jit import Routine, njit
from ..streams import BFLOAT16, FLOAT32, INT8
from ..vectors import TILE_COLUMNS, transpose_eight
from .panels import DEPTH, rows_times_panel

PANEL_BLOCK = 8  # panels that are widened at a time
WIDE_BLOCK = 84  # rows that stay in the second-level cache for such a run

_ZERO = np.float32(0.0)


@njit
def padded(columns):
    return (columns + 63) // 64 * 64


@njit
def row_bytes(kind, columns):
    """Bytes of a stored row of so many columns."""
    if kind == FLOAT32:
        return 4 * columns
    if kind == BFLOAT16:
        return 2 * columns
    return padded(columns) if kind == INT8 else padded(columns) // 2


@njit
def group_size(kind):
    return 64 if kind == INT8 else 32


@njit
def widen_row(kind, codes, scales, columns, n, out):
    """Row n of a stored matrix as float32 numbers.  out: an array of `columns`."""
    at = codes + n * row_bytes(kind, columns)
    if kind == FLOAT32:
        line = floats_at(at, columns)
        for i in range(columns):
            out[i] = line[i]
        return
    if kind == BFLOAT16:
        words = words_at(at, columns)
        for i in range(columns):
            out[i] = widen16(words[i])
        return
    group = group_size(kind)
    groups = padded(columns) // group
    row_scales = words_at(scales + 2 * groups * n, groups)
    for g in range(groups):
        scale = widen16(row_scales[g])
        first, last = g * group, min(columns, (g + 1) * group)
        if kind == INT8:
            source, line = signed_bytes_at(at + first, group), out[first:last]
            for i in range(line.size):
                line[i] = scale * np.float32(source[i])
        else:
            words = words_at(at + g // 2 * 32, 16)
            for half in (0, 1):
                shift = np.int32(4 * (2 * (g % 2) + half))
                line = out[first + 16 * half : min(last, first + 16 * half + 16)]
                for i in range(line.size):
                    line[i] = scale * np.float32((np.int32(words[i]) >> shift & np.int32(15)) - np.int32(8))


@njit
def _widen_panel(panels, at, lines, kind, codes, scales, columns, n, last):
    """Rows n and on, TILE_COLUMNS of them, as a panel: columns x TILE_COLUMNS; zeros beyond the last."""
    for eight in range(0, TILE_COLUMNS, 8):
        for j in range(8):
            line = lines[j * columns : (j + 1) * columns]
            if n + eight + j < last:
                widen_row(kind, codes, scales, columns, n + eight + j, line)
            else:
                for i in range(columns):
                    line[i] = _ZERO
        for k in range(0, columns - 7, 8):
            transpose_eight(panels, at + k * TILE_COLUMNS + eight, TILE_COLUMNS, lines, k, columns)
        for k in range(columns // 8 * 8, columns):
            for j in range(8):
                panels[at + k * TILE_COLUMNS + eight + j] = lines[j * columns + k]


@njit
def _tiled(kind, codes, scales, columns, first, last, x, x_row, rows, y, y_row, panels, lines, edge):
    """The same for many rows: x and y are addresses of floats, their rows steps of floats."""
    x_flat, y_flat = floats_at(x, rows * x_row), floats_at(y, rows * y_row)
    run = min(columns, DEPTH)
    for n in range(first, last, PANEL_BLOCK * TILE_COLUMNS):
        count = min(PANEL_BLOCK, (last - n + TILE_COLUMNS - 1) // TILE_COLUMNS)
        for p in range(count):
            at = p * columns * TILE_COLUMNS
            _widen_panel(panels, at, lines, kind, codes, scales, columns, n + p * TILE_COLUMNS, last)
        for begin in range(0, rows, WIDE_BLOCK):
            height = min(WIDE_BLOCK, rows - begin)
            for k in range(0, columns, run):
                depth, x_at, more = min(run, columns - k), begin * x_row + k, 1 if k else 0
                for p in range(count):
                    column, panel_at = n + p * TILE_COLUMNS, (p * columns + k) * TILE_COLUMNS
                    if column + TILE_COLUMNS <= last:
                        y_at = begin * y_row + column - first
                        rows_times_panel(
                            y_flat, y_at, y_row, x_flat, x_at, x_row, height, panels, panel_at, depth, more
                        )
                    else:
                        rows_times_panel(
                            edge, 0, TILE_COLUMNS, x_flat, x_at, x_row, height, panels, panel_at, depth, more
                        )
            rest = (last - n) % TILE_COLUMNS if n + PANEL_BLOCK * TILE_COLUMNS > last else 0
            for i in range(height if rest else 0):
                for j in range(rest):
                    y_flat[(begin + i) * y_row + last - rest - first + j] = edge[i * TILE_COLUMNS + j]


@Routine
def multiply_wide(kind, codes, scales, columns, first, last, x, x_row, rows, y, y_row, scratch):
    """y[m, n - first] = row m of x . row n of the weight, first <= n < last.  Rows of x and y in floats."""
    size = PANEL_BLOCK * TILE_COLUMNS * columns
    panels, lines = floats_at(scratch, size), floats_at(scratch + 4 * size, 8 * columns)
    edge = floats_at(scratch + 4 * (size + 8 * columns), WIDE_BLOCK * TILE_COLUMNS)
    _tiled(kind, codes, scales, columns, first, last, x, x_row, rows, y, y_row, panels, lines, edge)
    return 0


def wide_scratch_size(columns: int) -> int:
    """Floats of scratch that `multiply_wide` needs for weights of up to so many columns."""
    return (PANEL_BLOCK * TILE_COLUMNS + 8) * columns + WIDE_BLOCK * TILE_COLUMNS
