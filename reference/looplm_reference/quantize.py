"""Int8 and int4 weights: their definition in plain NumPy, as stored in a file, and wrong versions of reading them.

A row of a matrix is cut into groups of neighbouring columns, padded with zeros to whole blocks.  A weight becomes an
integer times its group's scale, which is a bfloat16 number and never negative:

    int8    groups of 64    blocks of 64     integers -127..127    stored as themselves
    int4    groups of 32    blocks of 128    integers -8..7        stored with 8 added, two to a byte

The scale is max|w| / d, of several d the one that loses least; integers are computed with the scale as stored.
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
    """Columns that share a scale and that are stored together, the range of the integers, and the divisors to try."""

    group: int
    block: int
    low: int
    high: int
    divisors: tuple[float, ...]


FORMATS = {
    "int8": Format(64, 64, -127, 127, (127.0,)),
    "int4": Format(32, 128, -8, 7, tuple(np.arange(6.5, 10.25, 0.25))),
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A matrix of `shape` N x K as in the file: codes int8 (N Kp) or uint8 (N Kp/2), scales as numbers (N Kp/group)."""

    format: str
    shape: tuple[int, int]
    codes: Array
    scales: Array


def quantize(weight: Array, fmt: str) -> Stored:
    """weight: NK, finite."""
    layout, (rows, columns) = FORMATS[fmt], weight.shape
    padded = np.zeros((rows, -(-columns // layout.block) * layout.block))
    padded[:, :columns] = weight
    groups = padded.reshape(rows, -1, layout.group)
    largest = np.abs(groups).max(axis=2)
    scales, least = np.zeros(largest.shape), np.full(largest.shape, np.inf)
    for divisor in layout.divisors:
        scale = rounded((largest / divisor).astype(np.float32).astype(np.float64))
        scale[scale < LEAST_SCALE] = 0.0
        error = ((groups - integers(groups, scale, layout) * scale[..., None]) ** 2).sum(axis=2)
        better = (scale > 0.0) & (error < least * (1.0 - 1e-9))  # not by rounding alone
        scales[better], least[better] = scale[better], error[better]
    codes = integers(groups, scales, layout).reshape(rows, -1)
    return Stored(fmt, (rows, columns), codes.astype(np.int8) if fmt == "int8" else pack(codes), scales)


def integers(groups: Array, scale: Array, layout: Format) -> Array:
    """The nearest multiples of each group's scale, ties to even; 0 where the scale is."""
    there = scale[..., None] > 0.0
    exact = np.divide(groups, scale[..., None], out=np.zeros_like(groups), where=there)
    return np.clip(np.rint(exact), layout.low, layout.high)


def pack(codes: Array) -> Array:
    """Integers N Kp -> bytes N Kp/2.

    Byte 16 q + 4 g + i of a block holds its column 32 g + 4 q + i in the lower half, the one 16 further in the upper.
    """
    block = (codes + 8).astype(np.int64).reshape(len(codes), -1, 4, 2, 4, 4)  # N, block, g, half, q, i
    both = block[:, :, :, 0] + 16 * block[:, :, :, 1]
    return both.swapaxes(2, 3).astype(np.uint8).reshape(len(codes), -1)


class Reader:
    """The way back, in small steps, so that each can be replaced by a wrong one."""

    def dequantize(self, stored: Stored) -> Array:
        """The numbers that a stored matrix stands for, N x K."""
        codes = self.int8(stored.codes) if stored.format == "int8" else self.int4(stored.codes)
        scales = self.scales(stored.scales)
        grouped = codes.reshape(*scales.shape, FORMATS[stored.format].group) * scales[..., None]
        return grouped.reshape(len(codes), -1)[:, : stored.shape[1]]

    def scales(self, scales: Array) -> Array:
        return np.asarray(scales, np.float64)

    def int8(self, codes: Array) -> Array:
        return codes.astype(np.float64)

    def int4(self, codes: Array) -> Array:
        """Bytes N Kp/2 -> integers N Kp."""
        both = self.groups(codes.astype(np.int64).reshape(len(codes), -1, 4, 4, 4))  # N, block, g, q, i
        halves = np.stack(self.halves(both), axis=3)
        return self.signed(self.columns(halves)).astype(np.float64).reshape(len(codes), -1)

    def groups(self, both: Array) -> Array:
        return both.swapaxes(2, 3)

    def halves(self, both: Array) -> tuple[Array, Array]:
        return both & 15, both >> 4

    def columns(self, halves: Array) -> Array:
        return halves

    def signed(self, code: Array) -> Array:
        return code - 8


def dequantize(stored: Stored) -> Array:
    """The numbers that a stored matrix stands for, N x K, float64."""
    return Reader().dequantize(stored)


# ---- wrong readers


class _NeighbouringScale(Reader):
    def scales(self, scales: Array) -> Array:
        return np.roll(super().scales(scales), 1, axis=1)


class _SwappedNibbles(Reader):
    def halves(self, both: Array) -> tuple[Array, Array]:
        low, high = super().halves(both)
        return high, low


class _UnsignedAsSigned(Reader):
    """Four bits as two's complement, which are 0..15 with 8 to be taken off."""

    def signed(self, code: Array) -> Array:
        return np.where(code > 7, code - 16, code)


class _SignedAsUnsigned(Reader):
    def int8(self, codes: Array) -> Array:
        return super().int8(codes.view(np.uint8))


class _NeighboursInAByte(Reader):
    """As if the halves of a byte were columns side by side, as in most other formats."""

    def columns(self, halves: Array) -> Array:
        return np.moveaxis(halves, 3, 5)


class _GroupsApart(Reader):
    """As if each group were 16 bytes in a row, not four in every 16."""

    def groups(self, both: Array) -> Array:
        return both


@dataclasses.dataclass(frozen=True)
class ReadingMutant:
    """One mistake in reading a format."""

    name: str
    format: str
    reader: type[Reader]


MUTANTS = (
    ReadingMutant("scale of the neighbouring group", "int8", _NeighbouringScale),
    ReadingMutant("signed read as unsigned", "int8", _SignedAsUnsigned),
    ReadingMutant("scale of the neighbouring group", "int4", _NeighbouringScale),
    ReadingMutant("swapped nibbles", "int4", _SwappedNibbles),
    ReadingMutant("unsigned read as signed", "int4", _UnsignedAsSigned),
    ReadingMutant("halves of a byte side by side", "int4", _NeighboursInAByte),
    ReadingMutant("groups one after the other", "int4", _GroupsApart),
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
