"""Float32 products of our own: weights packed once for all loops, the other operand read where it lies.

A weight is packed into panels, TILE_COLUMNS columns wide, once as it is (for gradients of inputs) and once transposed
(for the forward product).  A block of rows stays in the second-level cache while all panels pass by it, and a panel in
the first-level cache while all tiles of the block pass by it.  Weight gradients pack both operands and add into the
gradient in place.

The loops over tiles serve pairs.py too, where an element of an operand is a word of two numbers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from ...arrays import LINE, Array, Floats, aligned_empty
from ..attention import Attention
from ..jit import njit
from ..vectors import TILE_COLUMNS, TILE_ROWS, fetch_to_write, move_eight, tile, tile_of_one_row, transpose_eight
from . import Use

ROW_BLOCK = 1 << 15  # floats of the left operand that stay in the second-level cache (128 KiB)
MAX_ROWS = 1024  # rows in a block, whatever the depth
DEPTH = 384  # longest run of a product kept in registers: a panel of it takes 24 KiB of the first-level cache
OUTER_DEPTH = 256  # rows that a weight gradient takes at a time
LEFT_TILES = 8  # tiles of its left operand packed together
SPARE = 8 - TILE_ROWS  # numbers that a block of packed tiles may spill over

_ZERO = np.float32(0.0)

Arranged = TypeVar("Arranged", bound=Any)  # Packed, or packing.PackedWords


@dataclasses.dataclass(frozen=True)
class Packed:
    """One weight matrix, N x K, in both arrangements; one that is not there is None, so that no product reads it."""

    shape: tuple[int, int]
    plain: Floats | None  # panels of the weight: K/TILE_COLUMNS x N x TILE_COLUMNS
    transposed: Floats | None  # panels of its transpose: N/TILE_COLUMNS x K x TILE_COLUMNS

    @classmethod
    def empty(cls, shape: tuple[int, int], apart: bool = True) -> "Packed":
        """Room for both arrangements; unless they lie `apart`, in the same memory: for one at a time."""
        n, k = shape
        sizes = panel_count(k) * n * TILE_COLUMNS, panel_count(n) * k * TILE_COLUMNS
        return cls(shape, *two_rooms(sizes, apart, lambda size: aligned_empty((size,))))

    def fill(self, weight: Floats, use: Use = "both") -> "Packed":
        """The weight, packed into this room for what it is to be used for."""
        filled = arranged_for(self, use)
        if filled.plain is not None:
            _pack_right(filled.plain, weight, 0, weight.shape[0])
        if filled.transposed is not None:
            _pack_transposed(filled.transposed, weight)
        return filled


def panel_count(columns: int) -> int:
    """Panels that so many columns take."""
    return -(-columns // TILE_COLUMNS)


def two_rooms(sizes: tuple[int, int], apart: bool, empty: Callable[[int], Array]) -> tuple[Array, Array]:
    """Memory of these sizes for two arrangements of a weight; the same for both unless they are to lie `apart`."""
    if apart:
        return empty(sizes[0]), empty(sizes[1])
    shared = empty(max(sizes))
    return shared, shared


def arranged_for(room: Arranged, use: Use) -> Arranged:
    """The room with those arrangements alone that this use wants: `transposed` forward, `plain` backward."""
    assert use != "both" or room.plain is not room.transposed, "one arrangement would overwrite the other"
    wanted = {"plain": use != "forward", "transposed": use != "backward"}
    return dataclasses.replace(room, **{name: None for name, kept in wanted.items() if not kept})


class PanelProducts:
    """One thread's products with weights of these shapes (N, K)."""

    attention = Attention
    operand = np.float32

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        columns = max(k for _, k in shapes)
        self._edge = aligned_empty((MAX_ROWS * TILE_COLUMNS,))
        self._tiles = aligned_empty((LEFT_TILES * (OUTER_DEPTH * TILE_ROWS + SPARE),))
        self._panels = aligned_empty((OUTER_DEPTH * panel_count(columns) * TILE_COLUMNS,))

    def forward_into(self, y: Floats, x: Floats, weight: Packed) -> None:
        """y: MN from x: MK."""
        _multiply(y, x, weight.transposed, self._edge)

    def dx_into(self, dx: Floats, dy: Floats, weight: Packed) -> None:
        """dx: MK from dy: MN."""
        _multiply(dx, dy, weight.plain, self._edge)

    def dweight_into(self, dweight: Floats, dy: Floats, x: Floats, add: bool) -> None:
        """dweight: NK from dy: MN and x: MK."""
        _outer(dweight, dy, x, add, self._tiles, self._panels, self._edge)


@njit
def _pack_transposed(panels, weight):
    """panels[p, k, j] = weight[p * TILE_COLUMNS + j, k]; zero beyond the last row of the weight."""
    n, depth = weight.shape
    source = weight.reshape(-1)
    for first in range(0, (n + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS, 8):
        at = first // TILE_COLUMNS * depth * TILE_COLUMNS + first % TILE_COLUMNS
        whole = depth // 8 * 8 if first + 8 <= n else 0
        for k in range(0, whole, 8):
            transpose_eight(panels, at + k * TILE_COLUMNS, TILE_COLUMNS, source, first * depth + k, depth)
        for k in range(whole, depth):
            for j in range(8):
                panels[at + k * TILE_COLUMNS + j] = source[(first + j) * depth + k] if first + j < n else _ZERO


@njit
def _pack_right(panels, x, first_row, rows):
    """panels: one of rows x TILE_COLUMNS after the other: panel p holds columns p * TILE_COLUMNS and on, then zeros."""
    flat, width = x.reshape(-1), x.shape[1]
    for first in range(0, width, TILE_COLUMNS):
        source, at = first_row * width + first, first * rows
        whole = rows if first + TILE_COLUMNS <= width else 0
        for m in range(whole):
            for part in range(0, TILE_COLUMNS, 8):
                move_eight(panels, at + m * TILE_COLUMNS + part, flat, source + m * width + part)
        for m in range(whole, rows):
            for j in range(TILE_COLUMNS):
                inside = first + j < width
                panels[at + m * TILE_COLUMNS + j] = flat[source + m * width + j] if inside else _ZERO


@njit
def _pack_left(tiles, dy, first_row, rows, first_column, columns):
    """tiles: one of rows x TILE_ROWS and SPARE after the other: tile i holds columns i * TILE_ROWS and on, then zeros.

    Eight numbers are moved at once; what spills over is overwritten by the next row, or lands in the spare ones.
    """
    flat, width = dy.reshape(-1), dy.shape[1]
    for first in range(0, columns, TILE_ROWS):
        source, at = first_row * width + first_column + first, first // TILE_ROWS * (rows * TILE_ROWS + SPARE)
        whole = rows if first_column + first + 8 <= width else 0
        for m in range(whole):
            move_eight(tiles, at + m * TILE_ROWS, flat, source + m * width)
        for m in range(whole, rows):
            for r in range(TILE_ROWS):
                inside = first_column + first + r < width
                tiles[at + m * TILE_ROWS + r] = flat[source + m * width + r] if inside else _ZERO


@njit
def rows_times_panel(y, y_at, y_row, x, x_at, x_row, rows, panels, panel_at, depth, accumulate, ahead=0):
    """`ahead`: how far behind these the columns begin that come next, if their memory is to be asked for already."""
    whole = rows // TILE_ROWS * TILE_ROWS
    for row in range(0, whole, TILE_ROWS):
        left, into = x_at + row * x_row, y_at + row * y_row
        if ahead:
            fetch_sums(y, into + ahead, y_row, TILE_ROWS, TILE_COLUMNS)
        tile(x, left, x_row, 1, panels, panel_at, TILE_COLUMNS, y, into, y_row, depth, accumulate)
    for row in range(whole, rows):
        left, into = x_at + row * x_row, y_at + row * y_row
        tile_of_one_row(x, left, x_row, 1, panels, panel_at, TILE_COLUMNS, y, into, y_row, depth, accumulate)


@njit
def fetch_sums(c, at, row, rows, columns):
    """Ask for a tile of sums ahead of its turn: a column of tiles is no stream that processors would see coming."""
    for r in range(rows):
        for j in range(0, columns, LINE):
            fetch_to_write(c, at + r * row + j)


@njit
def rows_times_panels(y, begin, count, x, x_at, depth, run, panels, edge):
    """y[begin : begin + count] = rows of x, the first at x_at, times all panels: `run` of a sum at a time.

    What the last panel gives, if it is not full, goes through `edge`.
    """
    columns, flat = y.shape[1], y.reshape(-1)
    full, part = columns // TILE_COLUMNS, columns % TILE_COLUMNS
    for k in range(0, depth, run):
        length, left, more = min(run, depth - k), x_at + k, 1 if k else 0
        for p in range(full):
            y_at, panel_at = begin * columns + p * TILE_COLUMNS, (p * depth + k) * TILE_COLUMNS
            ahead = TILE_COLUMNS if p + 1 < full else 0
            rows_times_panel(flat, y_at, columns, x, left, depth, count, panels, panel_at, length, more, ahead)
        if part:
            panel_at = (full * depth + k) * TILE_COLUMNS
            rows_times_panel(edge, 0, TILE_COLUMNS, x, left, depth, count, panels, panel_at, length, more)
    for row in range(count if part else 0):
        for j in range(part):
            y[begin + row, full * TILE_COLUMNS + j] = edge[row * TILE_COLUMNS + j]


@njit
def _multiply(y, x, panels, edge):
    """y: MN = x: MK times panels: P x K x TILE_COLUMNS."""
    rows, depth = x.shape
    run = (depth + (depth + DEPTH - 1) // DEPTH - 1) // ((depth + DEPTH - 1) // DEPTH)  # equal runs
    block = min(MAX_ROWS, max(ROW_BLOCK // run, TILE_ROWS)) // TILE_ROWS * TILE_ROWS
    flat = x.reshape(-1)
    for begin in range(0, rows, block):
        rows_times_panels(y, begin, min(block, rows - begin), flat, begin * depth, depth, run, panels, edge)


@njit
def tiles_times_panels(dweight, first, width, add, tiles, panels, depth, spare, edge):
    """dweight[first : first + width] (+)= packed tiles (`spare` elements apart) times all packed panels."""
    columns, flat = dweight.shape[1], dweight.reshape(-1)
    for row in range(0, width, TILE_ROWS):
        left, top = row // TILE_ROWS * (depth * TILE_ROWS + spare), first + row
        for column in range(0, columns, TILE_COLUMNS):
            right = column // TILE_COLUMNS * depth * TILE_COLUMNS
            if column + TILE_COLUMNS <= columns and row + TILE_ROWS <= width:
                into = top * columns + column
                if column + 2 * TILE_COLUMNS <= columns:
                    fetch_sums(flat, into + TILE_COLUMNS, columns, TILE_ROWS, TILE_COLUMNS)
                tile(tiles, left, 1, TILE_ROWS, panels, right, TILE_COLUMNS, flat, into, columns, depth, add)
                continue
            tile(tiles, left, 1, TILE_ROWS, panels, right, TILE_COLUMNS, edge, 0, TILE_COLUMNS, depth, 0)
            for r in range(min(TILE_ROWS, width - row)):
                for j in range(min(TILE_COLUMNS, columns - column)):
                    before = dweight[top + r, column + j] if add else _ZERO
                    dweight[top + r, column + j] = before + edge[r * TILE_COLUMNS + j]


@njit
def _outer(dweight, dy, x, add, tiles, panels, edge):
    """dweight: NK (+)= dy: MN transposed times x: MK."""
    rows, n = dy.shape
    for first_row in range(0, rows, OUTER_DEPTH):
        depth = min(OUTER_DEPTH, rows - first_row)
        _pack_right(panels, x, first_row, depth)
        for first in range(0, n, LEFT_TILES * TILE_ROWS):
            width = min(LEFT_TILES * TILE_ROWS, n - first)
            _pack_left(tiles, dy, first_row, depth, first, width)
            more = 1 if add or first_row else 0
            tiles_times_panels(dweight, first, width, more, tiles, panels, depth, SPARE, edge)
