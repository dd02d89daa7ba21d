"""Products of bfloat16 numbers with float32 sums on tile registers (AMX): the numbers of pairs.py, other instructions.

Four registers hold 32 x 32 sums, two a block of rows of the left operand, two a block of columns of the right one: four
products for four loads.  The arithmetic costs so little that packing and memory decide: a weight is packed once per
optimizer step, the other operand is rounded and packed as it is read, a panel of the right operand stays in the
first-level cache while all rows of a block pass by it, and these in a second-level cache of 2 MiB.  All packed memory
starts on cache lines, without which tiles are loaded at half the speed.  Blocks at the edges of a result go through
`edge`.

Without the instructions the same code runs on emulated registers, slowly.
"""

from collections.abc import Sequence

import numpy as np

from ...arrays import Array, Floats, aligned_empty
from ..amx import BLOCK, SIDE, begin_tiles, end_tiles, multiply_block, tile_state
from ..jit import njit
from ..rounded_attention import TileAttention
from ..vectors import fetch_to_read
from .packing import (
    PackedWords,
    depth_of,
    either,
    empty_words,
    pack_right_of,
    pack_rows_of_transpose_of,
    pair_rows_of,
)
from .panels import fetch_sums

DEPTH = 256  # words, the longest run of a sum kept in registers: a panel of it takes 32 KiB of the first-level cache
ROW_WORDS = 1 << 18  # words of the left operand that stay in the second-level cache (1 MiB)
MAX_ROWS = 1024  # rows in a block, whatever the depth
OUTER_ROWS = 2 * DEPTH  # rows that a weight gradient takes at a time
LEFT_ROWS = 256  # rows of its left operand packed together (256 KiB)

_ZERO = np.uint32(0)


def packed_tiles(shape: tuple[int, int], apart: bool = True) -> PackedWords:
    """Room for a weight N x K: panels two registers wide, depths of whole registers."""
    return PackedWords.empty(shape, BLOCK, SIDE, apart)


class TileProducts:
    """One thread's products with weights of these shapes (N, K)."""

    attention = TileAttention
    operand = np.uint16

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        longest, columns = max(max(shape) for shape in shapes), max(k for _, k in shapes)
        self._state = tile_state()
        self._edge = aligned_empty((BLOCK * BLOCK,))
        self._rows = empty_words(max(ROW_WORDS, BLOCK * depth_of(longest, SIDE)))
        self._left, self._lines = empty_words(LEFT_ROWS * DEPTH), empty_words(8 * LEFT_ROWS)
        self._panels = empty_words(DEPTH * -(-columns // BLOCK) * BLOCK)

    def forward_into(self, y: Floats, x: Array, weight: PackedWords) -> None:
        """y: MN from x: MK."""
        _multiply(y, *either(x), weight.transposed, self._rows, self._edge, self._state)

    def dx_into(self, dx: Floats, dy: Array, weight: PackedWords) -> None:
        """dx: MK from dy: MN."""
        _multiply(dx, *either(dy), weight.plain, self._rows, self._edge, self._state)

    def dweight_into(self, dweight: Floats, dy: Array, x: Array, add: bool) -> None:
        """dweight: NK from dy: MN and x: MK."""
        _outer(dweight, *either(dy), *either(x), add, self._left, self._lines, self._panels, self._edge, self._state)


@njit
def _depth(numbers):
    """Words of a sum over so many numbers: whole registers."""
    return (numbers + 2 * SIDE - 1) // (2 * SIDE) * SIDE


@njit
def _fetch_panel(panels, begin, length, part, parts):
    """Ask for one of `parts` of what is multiplied next, while the others are asked for at the other blocks of rows."""
    for at in range(length * part // parts * BLOCK, length * (part + 1) // parts * BLOCK, SIDE):
        fetch_to_read(panels, begin + at)


@njit
def _multiply(y, x, bits, panels, words, edge, state):
    """y: MN = x: MK, x or bits of it, times panels."""
    rows, columns = y.shape
    depth = _depth(max(x.shape[1], bits.shape[1]))
    block = max(min(MAX_ROWS, words.size // depth), BLOCK) // BLOCK * BLOCK
    flat, ready = y.reshape(-1), bits.shape[1] == 2 * depth and rows % BLOCK == 0
    if ready:  # they are such words where they lie
        words = bits.reshape(-1).view(np.uint32)
    begin_tiles(state)
    for begin in range(0, rows, block):
        count = min(block, rows - begin)
        first = begin * depth if ready else 0  # where the block's words begin
        if not ready:
            pair_rows_of(words, x, bits, begin, count, depth)
            words[count * depth : (count + BLOCK - 1) // BLOCK * BLOCK * depth] = _ZERO
        for k in range(0, depth, DEPTH):
            length = min(DEPTH, depth - k)
            for column in range(0, columns, BLOCK):
                for row in range(0, count, BLOCK):
                    left, right, into = first + row * depth, column * depth, (begin + row) * columns + column
                    if row + BLOCK <= count and column + BLOCK <= columns:
                        at = right + k * BLOCK
                        if column + 2 * BLOCK <= columns:
                            fetch_sums(flat, into + BLOCK, columns, BLOCK, BLOCK)
                            _fetch_panel(panels, at + depth * BLOCK, length, row // BLOCK, count // BLOCK)
                        multiply_block(
                            state, flat, into, columns, words, left + k, depth, panels, at, BLOCK, length, k > 0
                        )
                    elif k == 0:
                        multiply_block(state, edge, 0, BLOCK, words, left, depth, panels, right, BLOCK, depth, False)
                        for r in range(min(BLOCK, count - row)):
                            for j in range(min(BLOCK, columns - column)):
                                flat[into + r * columns + j] = edge[r * BLOCK + j]
    end_tiles(state)


@njit
def _outer(dweight, dy, dy_bits, x, x_bits, add, left, lines, panels, edge, state):
    """dweight: NK (+)= dy: MN transposed times x: MK, each itself or its bits."""
    n, columns = dweight.shape
    flat = dweight.reshape(-1)
    begin_tiles(state)
    every = max(dy.shape[0], dy_bits.shape[0])
    for first_row in range(0, every, OUTER_ROWS):
        rows, more = min(OUTER_ROWS, every - first_row), add or first_row > 0
        depth = _depth(rows)
        pack_right_of(panels, x, x_bits, first_row, rows, BLOCK, depth)
        for first in range(0, n, LEFT_ROWS):
            width = min(LEFT_ROWS, n - first)
            pack_rows_of_transpose_of(left, lines, dy, dy_bits, first_row, rows, first, width, depth)
            left[width * depth : (width + BLOCK - 1) // BLOCK * BLOCK * depth] = _ZERO
            for column in range(0, columns, BLOCK):
                for row in range(0, width, BLOCK):
                    top, right = row * depth, column * depth
                    into = (first + row) * columns + column
                    if row + BLOCK <= width and column + BLOCK <= columns:
                        if column + 2 * BLOCK <= columns:
                            fetch_sums(flat, into + BLOCK, columns, BLOCK, BLOCK)
                        multiply_block(state, flat, into, columns, left, top, depth, panels, right, BLOCK, depth, more)
                        continue
                    multiply_block(state, edge, 0, BLOCK, left, top, depth, panels, right, BLOCK, depth, False)
                    for r in range(min(BLOCK, width - row)):
                        for j in range(min(BLOCK, columns - column)):
                            before = flat[into + r * columns + j] if more else np.float32(0.0)
                            flat[into + r * columns + j] = before + edge[r * BLOCK + j]
    end_tiles(state)
