"""float32 matrices rounded to bfloat16 on their way into what products read: what the bfloat16 paths share.

A matrix of activations may be of such numbers already, their bits in uint16: then it is only packed.

Two neighbours along the summed axis lie in one 32-bit word, the first in the lower half.  A sum has a depth, counted in
words; beyond the matrix there are zeros, which add nothing.  What is multiplied from the left is rows of words, what is
multiplied from the right lies in panels, so many columns wide.
"""

import dataclasses

import numpy as np

from ...arrays import Array, Floats, aligned_empty
from ..jit import njit
from ..vectors import PAIR_WORDS, pair_neighbours, pair_one, pair_words, transpose_eight
from . import Use
from .panels import arranged_for, two_rooms

_ZERO, _LOWER = np.uint32(0), np.uint32(0xFFFF)
_NO_FLOATS, _NO_BITS = np.empty((0, 0), np.float32), np.empty((0, 0), np.uint16)

Either = tuple[Floats, Array]  # a matrix as float32 or as bits of bfloat16 numbers, and nothing as the other


def either(x: Array) -> Either:
    """So that one compiled product takes both: two arguments, since tuples take long to be passed."""
    return (x, _NO_BITS) if x.dtype == np.float32 else (_NO_FLOATS, x)


def empty_words(count: int) -> Array:
    """Uninitialised memory for so many words, on a cache line."""
    return aligned_empty((count,)).view(np.uint32)


def depth_of(numbers: int, step: int = 1) -> int:
    """Words that so many numbers take, filled up to a multiple of `step`."""
    return -(-numbers // (2 * step)) * step


@dataclasses.dataclass(frozen=True)
class PackedWords:
    """One weight matrix, N x K, in both arrangements: panels `columns` wide, depths a multiple of `step` words.

    An arrangement that is not there is None, so that no product reads it.
    """

    shape: tuple[int, int]
    columns: int
    step: int
    plain: Array | None  # K/columns x depth of N x columns
    transposed: Array | None  # N/columns x depth of K x columns
    lines: Array  # eight rows of the weight on their way into `transposed`

    @classmethod
    def empty(cls, shape: tuple[int, int], columns: int, step: int, apart: bool = True) -> "PackedWords":
        """Room for both arrangements; unless they lie `apart`, in the same memory: for one at a time."""
        n, k = shape
        sizes = -(-k // columns) * depth_of(n, step) * columns, -(-n // columns) * depth_of(k, step) * columns
        plain, transposed = two_rooms(sizes, apart, empty_words)
        return cls(shape, columns, step, plain, transposed, empty_words(8 * depth_of(k, step)))

    def fill(self, weight: Floats, use: Use = "both") -> "PackedWords":
        """The weight, packed into this room for what it is to be used for."""
        (n, k), filled = self.shape, arranged_for(self, use)
        if filled.plain is not None:
            pack_right(filled.plain, weight, 0, n, self.columns, depth_of(n, self.step))
        if filled.transposed is not None:
            pack_transposed(filled.transposed, weight, self.lines, self.columns, depth_of(k, self.step))
        return filled


@njit(forceinline=True)
def pair_lines(words, at, source, first_at, second_at, count, alone):
    """`count` words of two lines; `alone`: there is no second line, its half is zero."""
    whole = count // PAIR_WORDS * PAIR_WORDS
    for j in range(0, whole, PAIR_WORDS):
        pair_words(words, at + j, source, first_at + j, second_at + j)
    for j in range(whole, count):
        pair_one(words, at + j, source, first_at + j, second_at + j)
    if alone:
        for j in range(count):
            words[at + j] &= _LOWER


@njit
def pair_rows(words, x, begin, rows, depth):
    """words: rows x depth from rows of x: MK."""
    width, step = x.shape[1], x.strides[0] // x.itemsize
    half, whole = (width + 1) // 2, width // (2 * PAIR_WORDS) * PAIR_WORDS
    for row in range(rows):
        at, source = row * depth, (begin + row) * step
        for k in range(0, whole, PAIR_WORDS):
            pair_neighbours(words, at + k, x, source + 2 * k)
        for k in range(whole, half):
            alone = 2 * k + 1 == width
            pair_lines(words, at + k, x, source + 2 * k, source + 2 * k + (0 if alone else 1), 1, alone)
        for k in range(half, depth):
            words[at + k] = _ZERO


@njit
def pack_right(panels, x, first_row, rows, columns, depth):
    """panels: depth x columns words, one after the other: panel p holds columns p * `columns` and on of rows of x.

    `columns` is a multiple of PAIR_WORDS.
    """
    width, step = x.shape[1], x.strides[0] // x.itemsize
    half = (rows + 1) // 2
    for first in range(0, width, columns):
        count = min(columns, width - first)
        whole = rows // 2 if count == columns else 0
        for m in range(whole):  # most of it, and nothing else: every other loop costs as much, even an empty one
            at, source = first * depth + m * columns, (first_row + 2 * m) * step + first
            for j in range(0, columns, PAIR_WORDS):
                pair_words(panels, at + j, x, source + j, source + j + step)
        for m in range(whole, half):
            at, source = first * depth + m * columns, (first_row + 2 * m) * step + first
            alone = 2 * m + 1 == rows
            pair_lines(panels, at, x, source, source if alone else source + step, count, alone)
            panels[at + count : at + columns] = _ZERO
        panels[first * depth + half * columns : (first + columns) * depth] = _ZERO


@njit
def pack_transposed(panels, weight, lines, columns, depth):
    """panels[p, k, j] = word k of weight[p * columns + j]; zero beyond the last row."""
    n = weight.shape[0]
    for first in range(0, (n + columns - 1) // columns * columns, 8):
        at = first // columns * depth * columns + first % columns
        rows = max(0, min(8, n - first))
        pair_rows(lines, weight, first, rows, depth)
        lines[rows * depth :] = _ZERO
        whole = depth // 8 * 8
        for k in range(0, whole, 8):
            transpose_eight(panels, at + k * columns, columns, lines, k, depth)
        for k in range(whole, depth):
            for j in range(8):
                panels[at + k * columns + j] = lines[j * depth + k]


@njit
def pack_rows_of_transpose(words, lines, x, first_row, rows, first_column, columns, depth):
    """words: columns x depth: row i is column first_column + i of rows of x.  lines: 8 x columns, up to the next 8."""
    step = x.strides[0] // x.itemsize
    room = (columns + 7) // 8 * 8
    for k in range(0, depth, 8):
        for i in range(8):
            row = 2 * (k + i)
            if row >= rows:
                lines[i * room : (i + 1) * room] = _ZERO
                continue
            source, alone = (first_row + row) * step + first_column, row + 1 == rows
            pair_lines(lines, i * room, x, source, source if alone else source + step, columns, alone)
            for j in range(columns, room):
                lines[i * room + j] = _ZERO
        for j in range(0, columns, 8):
            transpose_eight(words, j * depth + k, depth, lines, j, room)


@njit
def pair_rows_of(words, x, bits, begin, rows, depth):
    """`pair_rows` of `either`."""
    if x.size:
        pair_rows(words, x, begin, rows, depth)
    else:
        pair_rows(words, bits, begin, rows, depth)


@njit
def pack_right_of(panels, x, bits, first_row, rows, columns, depth):
    """`pack_right` of `either`."""
    if x.size:
        pack_right(panels, x, first_row, rows, columns, depth)
    else:
        pack_right(panels, bits, first_row, rows, columns, depth)


@njit
def pack_rows_of_transpose_of(words, lines, x, bits, first_row, rows, first_column, columns, depth):
    """`pack_rows_of_transpose` of `either`."""
    if x.size:
        pack_rows_of_transpose(words, lines, x, first_row, rows, first_column, columns, depth)
    else:
        pack_rows_of_transpose(words, lines, bits, first_row, rows, first_column, columns, depth)
