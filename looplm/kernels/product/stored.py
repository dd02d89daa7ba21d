"""Products with weights as they are stored, wherever they lie.

A few rows are multiplied with the weights as they lie in memory, each read once.  For many, a block of weight rows is
widened to float32 and packed into panels for the register tile.  Within either way a row's result does not depend on
the other rows, nor on which rows of the weight are asked for together.
"""

import numpy as np

from ..addresses import caller, floats_at, shorts_at, signed_bytes_at, words_at
from ..intrinsics import round32, widen16
from ..jit import Routine, njit
from ..streams import (
    BFLOAT16,
    BLOCK,
    FLOAT32,
    INT4,
    INT8,
    stream_bfloat16,
    stream_bfloat16_two,
    stream_float32,
    stream_float32_two,
    stream_int4,
    stream_int4_two,
    stream_int8,
    stream_int8_two,
)
from ..vectors import TILE_COLUMNS, WIDTH, transpose_eight
from .panels import DEPTH, rows_times_panel

FEW_ROWS = 24  # up to so many rows, weights are multiplied as they lie in memory
PANEL_BLOCK = 8  # panels that are widened at a time
WIDE_BLOCK = 84  # rows that stay in the second-level cache for such a run

_ZERO, _MOST = np.float32(0.0), np.float32(32767.0)


@njit
def _padded(columns):
    return (columns + 63) // 64 * 64


@njit
def row_bytes(kind, columns):
    """Bytes of a stored row of so many columns."""
    if kind == FLOAT32:
        return 4 * columns
    if kind == BFLOAT16:
        return 2 * columns
    return _padded(columns) if kind == INT8 else _padded(columns) // 2


@njit
def _group(kind):
    return 64 if kind == INT8 else 32


# ---- preparing x


@njit
def _prepare(kind, into, step, x, x_step, rows, columns):
    """Rows of x in the form that weights of this kind are multiplied with.  Steps in bytes."""
    for row in range(rows):
        line, at = floats_at(x + row * x_step, columns), into + row * step
        if kind == FLOAT32:
            whole = floats_at(at, columns + WIDTH)
            whole[:columns] = line
            whole[columns:] = _ZERO
        elif kind == BFLOAT16:
            _sort_columns(at, line, columns)
        else:
            _round_columns(kind, at, line, columns)


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
    out[:] = _ZERO
    for i in range(columns - whole * block):
        out[i // 2 + WIDTH * (i % 2)] = line[whole * block + i]


@njit
def _round_columns(kind, at, line, columns):
    """Integers of 16 bits, and of each group the scale and eight times their sum: what the zero point of int4 adds."""
    padded, group = _padded(columns), _group(kind)
    groups = padded // group
    codes, scales, sums = shorts_at(at, padded), floats_at(at + 2 * padded, groups), floats_at(at + 3 * padded, groups)
    for g in range(groups):
        first = g * group
        count = max(0, min(group, columns - first))
        numbers, out = line[first : first + count], codes[first : first + group]
        highest, poison = _ZERO, _ZERO
        for i in range(count):
            highest = max(highest, abs(numbers[i]))
            poison += numbers[i] * _ZERO  # integers have no NaN: the scale carries it on
        inverse = _MOST / highest if highest > _ZERO else _ZERO
        scales[g] = highest / _MOST + poison
        for i in range(count):
            out[i] = np.int16(round32(numbers[i] * inverse))
        for i in range(count, group):
            out[i] = 0
        total = np.int32(0)
        for i in range(group):
            total += int(out[i])
        sums[g] = np.float32(8 * total)


# ---- products


@njit
def _multiply_scales(into, weight_scales, x, padded, count):
    """into: scales of a row of x times those of a weight row -> what the zero point of int4 adds to the sum."""
    products, left = floats_at(into, count), words_at(weight_scales, count)
    right, sums, zero = floats_at(x + 2 * padded, count), floats_at(x + 3 * padded, count), _ZERO
    for g in range(count):
        product = right[g] * widen16(left[g])
        products[g] = product
        zero += product * sums[g]
    return zero


@njit
def _stream(kind, codes, scales, columns, first, last, prepared, step, rows, y, y_step, products):
    """y[m, n - first] = row m of x . row n of the weight, first <= n < last.  All addresses; steps in bytes.

    The rows that are read side by side lie far apart, each followed by its neighbour in the next turn: so many long
    streams are what processors fetch ahead of (rows next to each other ran at half the speed of memory).
    """
    row = row_bytes(kind, columns)
    integers = kind in (INT8, INT4)
    padded = _padded(columns) if integers else columns
    groups = padded // _group(kind) if integers else 0
    block, together = (BLOCK, 1) if rows == 1 else (BLOCK // 2, 2)
    apart, s_step, zeros = (last - first + block - 1) // block, 4 * groups, floats_at(products + 4 * padded, 8)
    w_step, gap = apart * row, 4 * apart
    for n in range(apart):
        count = (last - first - n + apart - 1) // apart
        w, out = codes + (first + n) * row, y + 4 * n
        for m in range(0, rows, together):
            x, into, several = prepared + m * step, out + m * y_step, min(together, rows - m)
            for i in range(several if integers else 0):
                for j in range(count):
                    at, scale = products + (i * block + j) * s_step, scales + 2 * groups * (first + n + j * apart)
                    zeros[i * block + j] = _multiply_scales(at, scale, x + i * step, padded, groups)
            if rows == 1:
                if kind == FLOAT32:
                    stream_float32(w, w_step, count, x, step, 1, 0, 0, into, y_step, gap, columns)
                elif kind == BFLOAT16:
                    stream_bfloat16(w, w_step, count, x, step, 1, 0, 0, into, y_step, gap, columns)
                elif kind == INT8:
                    stream_int8(w, w_step, count, x, step, 1, products, s_step, into, y_step, gap, padded)
                else:
                    stream_int4(w, w_step, count, x, step, 1, products, s_step, into, y_step, gap, padded)
            elif kind == FLOAT32:
                stream_float32_two(w, w_step, count, x, step, several, 0, 0, into, y_step, gap, columns)
            elif kind == BFLOAT16:
                stream_bfloat16_two(w, w_step, count, x, step, several, 0, 0, into, y_step, gap, columns)
            elif kind == INT8:
                stream_int8_two(w, w_step, count, x, step, several, products, s_step, into, y_step, gap, padded)
            else:
                stream_int4_two(w, w_step, count, x, step, several, products, s_step, into, y_step, gap, padded)
            if kind == INT4:
                for i in range(several):
                    for j in range(count):
                        floats_at(into + i * y_step + j * gap, 1)[0] -= zeros[i * block + j]


@njit
def widen_row(kind, codes, scales, columns, n, out):
    """Row n of a stored matrix as float32 numbers.  out: an array of `columns`."""
    at = codes + n * row_bytes(kind, columns)
    if kind == FLOAT32:
        out[:] = floats_at(at, columns)
        return
    if kind == BFLOAT16:
        words = words_at(at, columns)
        for i in range(columns):
            out[i] = widen16(words[i])
        return
    padded, group = _padded(columns), _group(kind)
    groups = padded // group
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
                line[:] = _ZERO
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
def multiply(kind, codes, scales, columns, first, last, x, x_row, rows, y, y_row, scratch, ready):
    """Rows first to last of a stored matrix times rows of x; y: address of the first output.  Rows of x, y in floats.

    `ready` is the kind that x lies prepared for in `scratch` already, else -1 -> the kind it is prepared for now.
    """
    if rows > FEW_ROWS:
        size = PANEL_BLOCK * TILE_COLUMNS * columns
        panels, lines = floats_at(scratch, size), floats_at(scratch + 4 * size, 8 * columns)
        edge = floats_at(scratch + 4 * (size + 8 * columns), WIDE_BLOCK * TILE_COLUMNS)
        _tiled(kind, codes, scales, columns, first, last, x, x_row, rows, y, y_row, panels, lines, edge)
        return -1
    step = 4 * (_padded(columns) + 16)
    if ready != kind:
        _prepare(kind, scratch, step, x, 4 * x_row, rows, columns)
    _stream(kind, codes, scales, columns, first, last, scratch, step, rows, y, 4 * y_row, scratch + step * FEW_ROWS)
    return kind


call_multiply = caller(multiply)


def scratch_size(columns: int) -> int:
    """Floats of scratch that `multiply` needs for weights of up to so many columns."""
    few = FEW_ROWS * (columns + 80) + columns + 128
    return max(few, (PANEL_BLOCK * TILE_COLUMNS + 8) * columns + WIDE_BLOCK * TILE_COLUMNS)


@njit
def multiply_into(routine, y, x, kind, codes, scales, first, last, scratch):
    """Columns first to last of y: MN, from x: MK and a stored matrix N x K, of which codes and scales are addresses."""
    rows, columns = x.shape
    out, place = y.ctypes.data + 4 * first, scratch.ctypes.data
    arguments = (kind, codes, scales, columns, first, last, x.ctypes.data, columns, rows, out, y.shape[1], place, -1)
    call_multiply(routine, arguments)
