"""Int8 and int4 weights: their definition in plain NumPy, as stored in a file, and wrong versions of reading them.

A row of a matrix is cut into groups of neighbouring columns, padded with zeros to a multiple of 64.  Every weight of a
group becomes an integer times the group's scale, which is a bfloat16 number and never negative:

    int8    groups of 64    integers -127..127    stored as themselves
    int4    groups of 32    integers -8..7        stored with 8 added, four to a 16-bit word

The scale is max|w| / d, of several d the one that loses least; integers are computed with the scale as stored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .bfloat16 import rounded
from .ops import Array

BLOCK = 64
HEAD = "lm_head.weight"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEAST_SCALE = 2.0**-126  # anything smaller becomes 0


@dataclasses.dataclass(frozen=True)
class Format:
    """Columns that share a scale, the range of the integers, and the divisors to try."""

    group: int
    low: int
    high: int
    divisors: tuple[float, ...]


FORMATS = {
    "int8": Format(64, -127, 127, (127.0,)),
    "int4": Format(32, -8, 7, tuple(np.arange(6.5, 10.25, 0.25))),
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
    padded = np.zeros((rows, -(-columns // BLOCK) * BLOCK))
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
    """Integers N Kp -> bytes N Kp/2: bits 4i..4i+3 of word j of a block hold its column 16 i + j."""
    rows = len(codes)
    block = (codes + 8).astype(np.int64).reshape(rows, -1, 4, 16)
    words = sum(block[:, :, i] << (4 * i) for i in range(4))
    low, high = words & 255, words >> 8  # little-endian
    return np.stack([low, high], axis=-1).astype(np.uint8).reshape(rows, -1)


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
        words = self.words(codes.astype(np.int64).reshape(len(codes), -1, 16, 2))
        block = np.stack([self.signed(words >> (4 * i) & 15) for i in range(4)], axis=2)  # N, block, i, j
        return self.columns(block).astype(np.float64)

    def words(self, pairs: Array) -> Array:
        return pairs[..., 0] + 256 * pairs[..., 1]

    def signed(self, code: Array) -> Array:
        return code - 8

    def columns(self, block: Array) -> Array:
        return block.reshape(len(block), -1)


def dequantize(stored: Stored) -> Array:
    """The numbers that a stored matrix stands for, N x K, float64."""
    return Reader().dequantize(stored)


# ---- wrong readers


class _NeighbouringScale(Reader):
    def scales(self, scales: Array) -> Array:
        return np.roll(super().scales(scales), 1, axis=1)


class _SwappedNibbles(Reader):
    def words(self, pairs: Array) -> Array:
        return super().words(pairs >> 4 | (pairs & 15) << 4)


class _UnsignedAsSigned(Reader):
    """Four bits as two's complement, which are 0..15 with 8 to be taken off."""

    def signed(self, code: Array) -> Array:
        return np.where(code > 7, code - 16, code)


class _SignedAsUnsigned(Reader):
    def int8(self, codes: Array) -> Array:
        return super().int8(codes.view(np.uint8))


class _ColumnsAsBytesCome(Reader):
    """Word after word, as if four neighbouring columns shared one."""

    def columns(self, block: Array) -> Array:
        return super().columns(block.swapaxes(2, 3))


class _BigEndian(Reader):
    def words(self, pairs: Array) -> Array:
        return super().words(pairs[..., ::-1])


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
    ReadingMutant("columns in the order of the words", "int4", _ColumnsAsBytesCome),
    ReadingMutant("words read big-endian", "int4", _BigEndian),
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
