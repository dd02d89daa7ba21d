"""Products of bfloat16 numbers with float32 sums: both operands rounded to bfloat16 on their way into the packing.

Two neighbours along the summed axis lie in one 32-bit word, as the dot-product instructions of AVX-512 BF16 want them.
Where the processor lacks these, the same words are widened and multiplied as float32: the same numbers, no faster.
Master weights, results and everything between the products stay float32.  Blocks as in panels.py.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ...arrays import Array, Floats, aligned_empty
from ..jit import njit
from ..vectors import (
    TILE_COLUMNS,
    TILE_ROWS,
    pair_eight,
    pair_neighbours,
    pair_one,
    pair_tile,
    pair_tile_of_one_row,
    transpose_eight,
)
from .panels import DEPTH, LEFT_TILES, MAX_ROWS, OUTER_DEPTH, ROW_BLOCK, panel_count

SPARE = 8  # words that a block of packed tiles may spill over

_ZERO, _LOWER = np.uint32(0), np.uint32(0xFFFF)


def _words(count: int) -> Array:
    return aligned_empty((count,)).view(np.uint32)


@dataclasses.dataclass(frozen=True)
class PackedPairs:
    """One weight matrix, N x K, in both arrangements; two neighbours along the summed axis in one word."""

    shape: tuple[int, int]
    plain: Array  # K/TILE_COLUMNS x N/2 x TILE_COLUMNS
    transposed: Array  # N/TILE_COLUMNS x K/2 x TILE_COLUMNS
    lines: Array  # eight rows of the weight on their way into `transposed`

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> "PackedPairs":
        n, k = shape
        plain = _words(panel_count(k) * -(-n // 2) * TILE_COLUMNS)
        transposed = _words(panel_count(n) * -(-k // 2) * TILE_COLUMNS)
        return cls(shape, plain, transposed, _words(8 * -(-k // 2)))

    def fill(self, weight: Floats) -> None:
        _pack_right(self.plain, weight, 0, weight.shape[0])
        _pack_transposed(self.transposed, weight, self.lines)


class PairProducts:
    """One thread's products with weights of these shapes (N, K)."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        half, columns, longest = OUTER_DEPTH // 2, max(k for _, k in shapes), max(max(shape) for shape in shapes)
        self._edge = aligned_empty((MAX_ROWS * TILE_COLUMNS,))
        self._rows = _words(max(2 * ROW_BLOCK, TILE_ROWS * ((longest + 1) // 2)))
        self._tiles = _words(LEFT_TILES * (half * TILE_ROWS + SPARE))
        self._panels = _words(half * panel_count(columns) * TILE_COLUMNS)

    def forward_into(self, y: Floats, x: Floats, weight: PackedPairs) -> None:
        """y: MN from x: MK."""
        _multiply(y, x, weight.transposed, self._rows, self._edge)

    def dx_into(self, dx: Floats, dy: Floats, weight: PackedPairs) -> None:
        """dx: MK from dy: MN."""
        _multiply(dx, dy, weight.plain, self._rows, self._edge)

    def accumulate_dweight(self, dweight: Floats, dy: Floats, x: Floats) -> None:
        """dweight: NK grows by dy: MN transposed times x: MK."""
        _accumulate_outer(dweight, dy, x, self._tiles, self._panels, self._edge)


@njit
def _pair_lines(words, at, source, first_at, second_at, count, alone):
    """`count` words of two lines; `alone`: there is no second line, its half is zero."""
    for j in range(0, count - 7, 8):
        pair_eight(words, at + j, source, first_at + j, second_at + j)
    for j in range(count // 8 * 8, count):
        pair_one(words, at + j, source, first_at + j, second_at + j)
    if alone:
        for j in range(count):
            words[at + j] &= _LOWER


@njit
def _pack_right(panels, x, first_row, rows):
    """panels: rows/2 x TILE_COLUMNS words, one after the other: panel p holds columns p * TILE_COLUMNS and on."""
    flat, width = x.reshape(-1), x.shape[1]
    half = (rows + 1) // 2
    for first in range(0, width, TILE_COLUMNS):
        count = min(TILE_COLUMNS, width - first)
        for m in range(half):
            at, source = first * half + m * TILE_COLUMNS, (first_row + 2 * m) * width + first
            alone = 2 * m + 1 == rows
            _pair_lines(panels, at, flat, source, source if alone else source + width, count, alone)
            panels[at + count : at + TILE_COLUMNS] = _ZERO


@njit
def _pack_left(tiles, dy, first_row, rows, first_column, columns):
    """tiles: rows/2 x TILE_ROWS words and SPARE after the other: tile i holds columns i * TILE_ROWS and on."""
    flat, width = dy.reshape(-1), dy.shape[1]
    half = (rows + 1) // 2
    for first in range(0, columns, TILE_ROWS):
        block = first // TILE_ROWS * (half * TILE_ROWS + SPARE)
        count = min(TILE_ROWS, columns - first)
        spill = 8 if first_column + first + 8 <= width else count  # the next row overwrites what is too much
        for m in range(half):
            at, source = block + m * TILE_ROWS, (first_row + 2 * m) * width + first_column + first
            alone = 2 * m + 1 == rows
            _pair_lines(tiles, at, flat, source, source if alone else source + width, spill, alone)
            if count < TILE_ROWS:
                tiles[at + count : at + TILE_ROWS] = _ZERO


@njit
def _pair_rows(words, x, begin, rows):
    """words: rows x K/2 from rows of x: MK; the last word's upper half is zero where K is odd."""
    flat, depth = x.reshape(-1), x.shape[1]
    half = (depth + 1) // 2
    for row in range(rows):
        at, source = row * half, (begin + row) * depth
        whole = depth // 16 * 8
        for k in range(0, whole, 8):
            pair_neighbours(words, at + k, flat, source + 2 * k)
        for k in range(whole, half):
            alone = 2 * k + 1 == depth
            _pair_lines(words, at + k, flat, source + 2 * k, source + 2 * k + (0 if alone else 1), 1, alone)


@njit
def _pack_transposed(panels, weight, lines):
    """panels[p, k, j] = word k of weight[p * TILE_COLUMNS + j]; zero beyond the last row."""
    n, depth = weight.shape[0], (weight.shape[1] + 1) // 2
    for first in range(0, (n + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS, 8):
        at = first // TILE_COLUMNS * depth * TILE_COLUMNS + first % TILE_COLUMNS
        rows = max(0, min(8, n - first))
        _pair_rows(lines, weight, first, rows)
        lines[rows * depth :] = _ZERO
        whole = depth // 8 * 8
        for k in range(0, whole, 8):
            transpose_eight(panels, at + k * TILE_COLUMNS, TILE_COLUMNS, lines, k, depth)
        for k in range(whole, depth):
            for j in range(8):
                panels[at + k * TILE_COLUMNS + j] = lines[j * depth + k]


@njit
def _rows_times_panel(y, y_at, y_row, words, x_at, x_row, rows, panels, panel_at, depth, accumulate):
    whole = rows // TILE_ROWS * TILE_ROWS
    for row in range(0, whole, TILE_ROWS):
        left, into = x_at + row * x_row, y_at + row * y_row
        pair_tile(words, left, x_row, 1, panels, panel_at, TILE_COLUMNS, y, into, y_row, depth, accumulate)
    for row in range(whole, rows):
        left, into = x_at + row * x_row, y_at + row * y_row
        pair_tile_of_one_row(words, left, x_row, 1, panels, panel_at, TILE_COLUMNS, y, into, y_row, depth, accumulate)


@njit
def _multiply(y, x, panels, words, edge):
    """y: MN = x: MK times panels; depths count words."""
    rows, columns = y.shape
    depth = (x.shape[1] + 1) // 2
    runs = (depth + DEPTH - 1) // DEPTH
    run = (depth + runs - 1) // runs
    block = max(min(MAX_ROWS, 2 * ROW_BLOCK // depth), TILE_ROWS) // TILE_ROWS * TILE_ROWS
    full, part = columns // TILE_COLUMNS, columns % TILE_COLUMNS
    flat = y.reshape(-1)
    for begin in range(0, rows, block):
        count = min(block, rows - begin)
        _pair_rows(words, x, begin, count)
        for k in range(0, depth, run):
            length, more = min(run, depth - k), 1 if k else 0
            for p in range(full):
                y_at, at = begin * columns + p * TILE_COLUMNS, (p * depth + k) * TILE_COLUMNS
                _rows_times_panel(flat, y_at, columns, words, k, depth, count, panels, at, length, more)
            if part:
                at = (full * depth + k) * TILE_COLUMNS
                _rows_times_panel(edge, 0, TILE_COLUMNS, words, k, depth, count, panels, at, length, more)
        for row in range(count if part else 0):
            for j in range(part):
                y[begin + row, full * TILE_COLUMNS + j] = edge[row * TILE_COLUMNS + j]


@njit
def _accumulate_outer(dweight, dy, x, tiles, panels, edge):
    """dweight: NK += dy: MN transposed times x: MK."""
    rows, n = dy.shape
    columns = x.shape[1]
    flat = dweight.reshape(-1)
    for first_row in range(0, rows, OUTER_DEPTH):
        depth = min(OUTER_DEPTH, rows - first_row)
        half = (depth + 1) // 2
        tile_size, panel_size = half * TILE_ROWS + SPARE, half * TILE_COLUMNS
        _pack_right(panels, x, first_row, depth)
        for first in range(0, n, LEFT_TILES * TILE_ROWS):
            width = min(LEFT_TILES * TILE_ROWS, n - first)
            _pack_left(tiles, dy, first_row, depth, first, width)
            for column in range(0, columns, TILE_COLUMNS):
                panel_at = column // TILE_COLUMNS * panel_size
                for row in range(0, width, TILE_ROWS):
                    left, top = row // TILE_ROWS * tile_size, first + row
                    if column + TILE_COLUMNS <= columns and row + TILE_ROWS <= width:
                        into = top * columns + column
                        pair_tile(
                            tiles, left, 1, TILE_ROWS, panels, panel_at, TILE_COLUMNS, flat, into, columns, half, 1
                        )
                        continue
                    pair_tile(tiles, left, 1, TILE_ROWS, panels, panel_at, TILE_COLUMNS, edge, 0, TILE_COLUMNS, half, 0)
                    for r in range(min(TILE_ROWS, width - row)):
                        for j in range(min(TILE_COLUMNS, columns - column)):
                            dweight[top + r, column + j] += edge[r * TILE_COLUMNS + j]
