"""Products of bfloat16 numbers with float32 sums: both operands rounded to bfloat16 on their way into the packing.

Two neighbours along the summed axis lie in one 32-bit word, as the dot-product instructions of AVX-512 BF16 want them.
Where the processor lacks these, the same words are widened and multiplied as float32: the same numbers, no faster.
Master weights, results and everything between the products stay float32.  Blocks as in panels.py.
"""

from collections.abc import Sequence

import numpy as np

from ...arrays import Floats, aligned_empty
from ..jit import njit
from ..vectors import TILE_COLUMNS, TILE_ROWS, pair_tile, pair_tile_of_one_row
from .packing import PackedWords, empty_words, pack_right, pair_lines, pair_rows
from .panels import DEPTH, LEFT_TILES, MAX_ROWS, OUTER_DEPTH, ROW_BLOCK, panel_count

SPARE = 8  # words that a block of packed tiles may spill over

_ZERO = np.uint32(0)


def packed_pairs(shape: tuple[int, int]) -> PackedWords:
    """Room for a weight N x K: panels as wide as a register tile, depths as they come."""
    return PackedWords.empty(shape, TILE_COLUMNS, 1)


class PairProducts:
    """One thread's products with weights of these shapes (N, K)."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        half, columns, longest = OUTER_DEPTH // 2, max(k for _, k in shapes), max(max(shape) for shape in shapes)
        self._edge = aligned_empty((MAX_ROWS * TILE_COLUMNS,))
        self._rows = empty_words(max(2 * ROW_BLOCK, TILE_ROWS * ((longest + 1) // 2)))
        self._tiles = empty_words(LEFT_TILES * (half * TILE_ROWS + SPARE))
        self._panels = empty_words(half * panel_count(columns) * TILE_COLUMNS)

    def forward_into(self, y: Floats, x: Floats, weight: PackedWords) -> None:
        """y: MN from x: MK."""
        _multiply(y, x, weight.transposed, self._rows, self._edge)

    def dx_into(self, dx: Floats, dy: Floats, weight: PackedWords) -> None:
        """dx: MK from dy: MN."""
        _multiply(dx, dy, weight.plain, self._rows, self._edge)

    def accumulate_dweight(self, dweight: Floats, dy: Floats, x: Floats) -> None:
        """dweight: NK grows by dy: MN transposed times x: MK."""
        _accumulate_outer(dweight, dy, x, self._tiles, self._panels, self._edge)


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
            pair_lines(tiles, at, flat, source, source if alone else source + width, spill, alone)
            if count < TILE_ROWS:
                tiles[at + count : at + TILE_ROWS] = _ZERO


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
        pair_rows(words, x, begin, count, depth)
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
        pack_right(panels, x, first_row, depth, TILE_COLUMNS, half)
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
