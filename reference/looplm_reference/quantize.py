"""Int8 and int4 weights: their definition in plain NumPy, as stored in a file, and wrong versions of reading them.

A row of a matrix is cut into groups of neighbouring columns, the last one padded with zeros.  A weight becomes an
integer times its group's scale, which is a bfloat16 number and never negative:

    int8    groups of 64    integers -127..127    stored with 128 added
    int4    groups of 32    integers -8..7        stored with 8 added, two to a byte

The scale is max|w| / d, of several d the one that loses least; integers are computed with the scale as stored.
Sixteen rows, of zeros if there are no more, are stored side by side: for every four columns, those of each row.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .bfloat16 import rounded
from .ops import Array

HEAD = "lm_head.weight"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEAST_SCALE = 2.0**-126  # anything smaller becomes 0


@dataclasses.dataclass(frozen=True)
class Format:
    """Columns that share a scale, the range of the integers, what is added to them, and the divisors to try."""

    group: int
    low: int
    high: int
    zero_point: int
    divisors: tuple[float, ...]


ROWS = 16  # that are stored side by side
FORMATS = {
    "int8": Format(64, -127, 127, 128, (127.0,)),
    "int4": Format(32, -8, 7, 8, tuple(np.arange(6.5, 10.25, 0.25))),
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A matrix of `shape` N x K as in the file, runs of 16 rows one after the other.

    codes: uint8, run x line x 64; scales, as numbers: run x group x 16.
    """

    format: str
    shape: tuple[int, int]
    codes: Array
    scales: Array


def quantize(weight: Array, fmt: str) -> Stored:
    """weight: NK, finite."""
    layout, (rows, columns) = FORMATS[fmt], weight.shape
    padded = np.zeros((-(-rows // ROWS) * ROWS, -(-columns // layout.group) * layout.group))
    padded[:rows, :columns] = weight
    groups = padded.reshape(len(padded), -1, layout.group)
    largest = np.abs(groups).max(axis=2)
    scales, least = np.zeros(largest.shape), np.full(largest.shape, np.inf)
    for divisor in layout.divisors:
        scale = rounded((largest / divisor).astype(np.float32).astype(np.float64))
        scale[scale < LEAST_SCALE] = 0.0
        error = ((groups - integers(groups, scale, layout) * scale[..., None]) ** 2).sum(axis=2)
        better = (scale > 0.0) & (error < least * (1.0 - 1e-9))  # not by rounding alone
        scales[better], least[better] = scale[better], error[better]
    codes = integers(groups, scales, layout).reshape(padded.shape)
    return Stored(fmt, (rows, columns), pack(codes, fmt), side_by_side(scales))


def integers(groups: Array, scale: Array, layout: Format) -> Array:
    """The nearest multiples of each group's scale, ties to even; 0 where the scale is."""
    there = scale[..., None] > 0.0
    exact = np.divide(groups, scale[..., None], out=np.zeros_like(groups), where=there)
    return np.clip(np.rint(exact), layout.low, layout.high)


def side_by_side(scales: Array) -> Array:
    """One for each group of each row, N x G -> run x G x 16."""
    return np.ascontiguousarray(scales.reshape(-1, ROWS, scales.shape[1]).swapaxes(1, 2))


def pack(codes: Array, fmt: str) -> Array:
    """Integers N x Kp -> bytes, run x line x 64.

    Byte 4 r + i of line l is column 4 l + i of row r; in int4 its lower half is column 8 l + i, its upper the one 4 on.
    """
    stored = (codes + FORMATS[fmt].zero_point).astype(np.int64)
    fours = stored.reshape(-1, ROWS, codes.shape[1] // 4, 4).swapaxes(1, 2)  # run, four columns, row, column
    lines = fours if fmt == "int8" else fours[:, ::2] + 16 * fours[:, 1::2]
    return lines.astype(np.uint8).reshape(len(fours), -1, 4 * ROWS)


class Reader:
    """The way back, in small steps, so that each can be replaced by a wrong one."""

    def dequantize(self, stored: Stored) -> Array:
        """The numbers that a stored matrix stands for, N x K."""
        lines = self.rows(stored.codes.astype(np.int64))  # run, line, row, column
        fours = lines if stored.format == "int8" else self.columns(np.stack(self.halves(lines), axis=2))
        codes = self.signed(fours.reshape(len(lines), -1, ROWS, 4), FORMATS[stored.format].zero_point)
        grouped = codes.swapaxes(1, 2).reshape(len(codes), ROWS, -1, FORMATS[stored.format].group)
        values = grouped * self.scales(stored.scales).swapaxes(1, 2)[..., None]
        return values.reshape(len(codes) * ROWS, -1)[: stored.shape[0], : stored.shape[1]]

    def scales(self, scales: Array) -> Array:
        return np.asarray(scales, np.float64)

    def rows(self, lines: Array) -> Array:
        return lines.reshape(*lines.shape[:2], ROWS, 4)

    def halves(self, both: Array) -> tuple[Array, Array]:
        return both & 15, both >> 4

    def columns(self, halves: Array) -> Array:
        """run, line, half, row, column"""
        return halves

    def signed(self, code: Array, zero_point: int) -> Array:
        return code - zero_point


def dequantize(stored: Stored) -> Array:
    """The numbers that a stored matrix stands for, N x K, float64."""
    return Reader().dequantize(stored)


# ---- wrong readers


class _NeighbouringScale(Reader):
    def scales(self, scales: Array) -> Array:
        return np.roll(super().scales(scales), 1, axis=1)


class _ScaleOfTheNextRow(Reader):
    def scales(self, scales: Array) -> Array:
        return np.roll(super().scales(scales), 1, axis=2)


class _SwappedNibbles(Reader):
    def halves(self, both: Array) -> tuple[Array, Array]:
        low, high = super().halves(both)
        return high, low


class _UnsignedAsSigned(Reader):
    """Bits as two's complement, which are a number without sign with the zero point to be taken off."""

    def signed(self, code: Array, zero_point: int) -> Array:
        return np.where(code >= zero_point, code - 2 * zero_point, code)


class _NeighboursInAByte(Reader):
    """As if the halves of a byte were columns side by side, as in most other formats."""

    def columns(self, halves: Array) -> Array:
        return np.moveaxis(halves, 2, 4)


class _RowsApart(Reader):
    """As if a line were columns of one row after another, the four of each not together."""

    def rows(self, lines: Array) -> Array:
        return lines.reshape(*lines.shape[:2], 4, ROWS).swapaxes(2, 3)


@dataclasses.dataclass(frozen=True)
class ReadingMutant:
    """One mistake in reading a format."""

    name: str
    format: str
    reader: type[Reader]


MUTANTS = (
    ReadingMutant("scale of the neighbouring group", "int8", _NeighbouringScale),
    ReadingMutant("scale of the next row", "int8", _ScaleOfTheNextRow),
    ReadingMutant("unsigned read as signed", "int8", _UnsignedAsSigned),
    ReadingMutant("columns of a row apart", "int8", _RowsApart),
    ReadingMutant("scale of the neighbouring group", "int4", _NeighbouringScale),
    ReadingMutant("scale of the next row", "int4", _ScaleOfTheNextRow),
    ReadingMutant("swapped nibbles", "int4", _SwappedNibbles),
    ReadingMutant("unsigned read as signed", "int4", _UnsignedAsSigned),
    ReadingMutant("halves of a byte side by side", "int4", _NeighboursInAByte),
)


# ---- a whole model


def format_of(name: str, fmt: str) -> str | None:
    """How a tensor of a model is stored in a folder of this format; None for floats.  The head is int8 in both."""
    if name == HEAD:
        return "int8"
    return fmt if name.split(".")[-2] in PROJECTIONS else None


def quantize_tensors(tensors: Mapping[str, Array], fmt: str) -> dict[str, Any]:
    """Every tensor of a model as its folder in this format would hold it; the embedding in bfloat16."""
    made: dict[str, Any] = {}
    for name, value in tensors.items():
        kind = format_of(name, fmt)
        if kind is not None:
            made[name] = quantize(value, kind)
        else:
            made[name] = rounded(np.asarray(value, np.float64)) if "embed_tokens" in name else value
    return made


def dequantize_tensors(stored: Mapping[str, Any], reader: Reader | None = None) -> dict[str, Array]:
    """The plain tensors that a model's stored ones stand for."""
    read = (reader or Reader()).dequantize
    return {name: read(value) if isinstance(value, Stored) else value for name, value in stored.items()}
