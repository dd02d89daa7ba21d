"""Products of bfloat16 numbers with float32 sums: both operands rounded to bfloat16 on their way into the packing.

Two neighbours along the summed axis lie in one 32-bit word, as the dot-product instructions of AVX-512 BF16 want them.
Where the processor lacks these, the same words are widened and multiplied as float32: the same numbers, no faster.
Master weights, results and everything between the products stay float32.  Blocks as in panels.py.
"""

from collections.abc import Sequence

import numpy as np

from ...arrays import Array, Floats, aligned_empty
from ..jit import njit
from ..rounded_attention import PairAttention
from ..vectors import TILE_COLUMNS, TILE_ROWS
from .packing import PackedWords, either, empty_words, pack_right_of, pair_lines, pair_rows_of
from .panels import (
    DEPTH,
    LEFT_TILES,
    MAX_ROWS,
    OUTER_DEPTH,
    ROW_BLOCK,
    panel_count,
    rows_times_panels,
    tiles_times_panels,
)

SPARE = 8  # words that a block of packed tiles may spill over

_ZERO = np.uint32(0)


def packed_pairs(shape: tuple[int, int], apart: bool = True) -> PackedWords:
    """Room for a weight N x K: panels as wide as a register tile, depths as they come."""
    return PackedWords.empty(shape, TILE_COLUMNS, 1, apart)


class PairProducts:
    """One thread's products with weights of these shapes (N, K)."""

    attention = PairAttention
    operand = np.uint16

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        half, columns, longest = OUTER_DEPTH // 2, max(k for _, k in shapes), max(max(shape) for shape in shapes)
        self._edge = aligned_empty((MAX_ROWS * TILE_COLUMNS,))
        self._rows = empty_words(max(2 * ROW_BLOCK, TILE_ROWS * ((longest + 1) // 2)))
        self._tiles = empty_words(LEFT_TILES * (half * TILE_ROWS + SPARE))
        self._panels = empty_words(half * panel_count(columns) * TILE_COLUMNS)

    def forward_into(self, y: Floats, x: Array, weight: PackedWords) -> None:
        """y: MN from x: MK."""
        _multiply(y, *either(x), weight.transposed, self._rows, self._edge)

    def dx_into(self, dx: Floats, dy: Array, weight: PackedWords) -> None:
        """dx: MK from dy: MN."""
        _multiply(dx, *either(dy), weight.plain, self._rows, self._edge)

    def dweight_into(self, dweight: Floats, dy: Array, x: Array, add: bool) -> None:
        """dweight: NK from dy: MN and x: MK."""
        _outer(dweight, *either(dy), *either(x), add, self._tiles, self._panels, self._edge)


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
def _multiply(y, x, bits, panels, words, edge):
    """y: MN = x: MK, x or bits of it, times panels; depths count words."""
    rows = y.shape[0]
    depth = (max(x.shape[1], bits.shape[1]) + 1) // 2
    runs = (depth + DEPTH - 1) // DEPTH
    run = (depth + runs - 1) // runs
    block = max(min(MAX_ROWS, 2 * ROW_BLOCK // depth), TILE_ROWS) // TILE_ROWS * TILE_ROWS
    for begin in range(0, rows, block):
        count = min(block, rows - begin)
        pair_rows_of(words, x, bits, begin, count, depth)
        rows_times_panels(y, begin, count, words, 0, depth, run, panels, edge)


@njit
def _outer(dweight, dy, dy_bits, x, x_bits, add, tiles, panels, edge):
    """dweight: NK (+)= dy: MN transposed times x: MK, each itself or its bits."""
    rows, n = max(dy.shape[0], dy_bits.shape[0]), dweight.shape[0]
    for first_row in range(0, rows, OUTER_DEPTH):
        depth = min(OUTER_DEPTH, rows - first_row)
        half = (depth + 1) // 2
        pack_right_of(panels, x, x_bits, first_row, depth, TILE_COLUMNS, half)
        for first in range(0, n, LEFT_TILES * TILE_ROWS):
            width = min(LEFT_TILES * TILE_ROWS, n - first)
            if dy.size:
                _pack_left(tiles, dy, first_row, depth, first, width)
            else:
                _pack_left(tiles, dy_bits, first_row, depth, first, width)
            more = 1 if add or first_row else 0
            tiles_times_panels(dweight, first, width, more, tiles, panels, half, SPARE, edge)
