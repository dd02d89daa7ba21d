"""Weights as small integers with a scale per group of neighbouring columns: int8 and int4, as stored in a file.

Only matrices that rows are multiplied by are quantized.  Norms and the gate are too small to matter, and the embedding
is only looked up in: one row a token.  The head, on which every prediction hangs, is int8 in both formats.

The layout is that of docs/formats.md.  Scales and codes follow the definition of looplm_reference.quantize to the bit.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Array, Floats
from .config import ModelConfig
from .errors import CheckpointError, ConfigError
from .kernels.finite import count_not_finite
from .kernels.quantization import quantize_rows_into
from .safetensors_file import widen_bfloat16

KEY, METHOD = "quantization_config", "looplm"  # in config.json
HEAD = "lm_head.weight"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

CHUNK = 1 << 20  # weights widened to float32 at a time (4 MiB; what is made on the way takes as much a few times)
ROWS_OF = 1 << 18  # weights rounded at a time: they stay in the cache, and so does what comes of them


@dataclasses.dataclass(frozen=True)
class Format:
    """How one matrix is stored.  Scales are max|w| / d for the d of `divisors` that loses least."""

    name: str
    group: int  # columns that share a scale
    block: int  # columns are padded to a multiple of it, so that a block of codes is a cache line
    low: int  # range of the integers
    high: int
    dtype: str  # of the codes, in safetensors' words
    per_byte: int  # codes in a byte
    divisors: tuple[float, ...]

    def padded(self, columns: int) -> int:
        return -(-columns // self.block) * self.block

    def codes_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0], self.padded(shape[1]) // self.per_byte

    def scales_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0], self.padded(shape[1]) // self.group


# Only one side reaches 8, and a scale that clips the largest weight can serve the other 31 better.  Error on normal
# weights: 0.097 with 7 alone, 0.090 with 7 and 8, 0.0863 with these, 0.0858 with steps of 1/32.
_DIVISORS = tuple(6.5 + 0.25 * step for step in range(15))
FORMATS = {
    "int8": Format("int8", 64, 64, -127, 127, "I8", 1, (127.0,)),
    "int4": Format("int4", 32, 128, -8, 7, "U8", 2, _DIVISORS),
}


@dataclasses.dataclass(frozen=True)
class Quantized:
    """One matrix of `shape` N x K as it lies in the file; arrays may be mapped.

    codes: int8, N x Kp, or uint8, N x Kp/2; scales: bfloat16 as its bits in uint16, N x Kp/group.
    """

    format: str
    shape: tuple[int, int]
    codes: Array
    scales: npt.NDArray[np.uint16]

    @property
    def layout(self) -> Format:
        return FORMATS[self.format]

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scales.nbytes)

    def set_rows(self, rows: slice, weight: Floats, name: str = "the matrix") -> None:
        """Round some rows of the matrix.  weight: MK

        Raises: CheckpointError that calls it `name`, if a weight is not a finite number.
        """
        layout, weight = self.layout, np.ascontiguousarray(weight, np.float32)
        wrong = count_not_finite(weight)
        if wrong:
            raise CheckpointError(
                f"{name} has {wrong} weights that are not finite numbers", "quantize a model whose weights are sound"
            )
        packed = self.format == "int4"
        codes = np.empty((len(weight), layout.padded(self.shape[1])), np.int8) if packed else self.codes[rows]
        divisors = np.array(layout.divisors)
        quantize_rows_into(codes, self.scales[rows], weight, divisors, float(layout.low), float(layout.high))
        if packed:
            self.codes[rows] = pack(codes)

    def dequantize(self, rows: slice | None = None, out: Floats | None = None) -> Floats:
        """The numbers that some rows (default all) stand for, N x K, exact in float32; written to `out` if given."""
        rows = slice(None) if rows is None else rows
        codes, scales = self.codes[rows], widen_bfloat16(self.scales[rows])
        made = np.empty((len(codes), self.shape[1]), np.float32) if out is None else out
        chunk = max(1, CHUNK // max(1, self.layout.padded(self.shape[1])))
        for begin in range(0, len(codes), chunk):
            part = slice(begin, begin + chunk)
            whole = codes[part] if self.format == "int8" else unpack(codes[part])
            grouped = whole.reshape(*scales[part].shape, self.layout.group)
            values = np.multiply(grouped, scales[part][..., None], dtype=np.float32)
            made[part] = values.reshape(len(whole), -1)[:, : self.shape[1]]
        return made


def quantize_matrix(weight: Floats, fmt: str, name: str = "the matrix") -> Quantized:
    """Round a matrix to a format.  weight: NK

    Raises: CheckpointError that calls it `name`, if a weight is not a finite number.
    """
    made = empty_quantized((weight.shape[0], weight.shape[1]), fmt)
    for rows in row_blocks(slice(0, len(weight)), weight.shape[1]):
        made.set_rows(rows, weight[rows], name)
    return made


def empty_quantized(shape: tuple[int, int], fmt: str) -> Quantized:
    """A matrix of a format whose rows are still to be set."""
    layout = FORMATS[fmt]
    codes = np.empty(layout.codes_shape(shape), np.int8 if fmt == "int8" else np.uint8)
    return Quantized(fmt, shape, codes, np.empty(layout.scales_shape(shape), np.uint16))


def row_blocks(rows: slice, columns: int) -> Iterator[slice]:
    """Some rows of a matrix in pieces of at most ROWS_OF weights, but a row at least."""
    step = max(1, ROWS_OF // max(1, columns))
    return (slice(begin, min(begin + step, rows.stop)) for begin in range(rows.start, rows.stop, step))


def pack(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """int4: integers of -8..7, N x Kp -> bytes, N x Kp/2.

    Each block of 128 columns is 64 bytes, four groups: byte 16 q + 4 g + i holds column 32 g + 4 q + i, plus 8, in its
    lower half, and the one 16 further in its upper half.  A mask or a shift of a vector gives four columns a lane, as
    processors add them, and every fourth lane has the same scale.
    """
    halves = (
        (codes + np.int8(8)).view(np.uint8).reshape(len(codes), -1, 4, 2, 4, 4)
    )  # block, group, half, place, column
    both = halves[:, :, :, 0] | halves[:, :, :, 1] << 4
    return np.ascontiguousarray(both.swapaxes(2, 3)).reshape(len(codes), -1)


def unpack(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """The way back from `pack`."""
    both = packed.reshape(len(packed), -1, 4, 4, 4).swapaxes(2, 3)
    halves = np.stack([both & np.uint8(15), both >> 4], axis=3).view(np.int8) - np.int8(8)
    return halves.reshape(len(packed), -1)


# ---- a model's part


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What config.json says of a quantized model."""

    format: str

    def format_of(self, name: str) -> str | None:
        """The format of a tensor of the model, or None if it is stored as a float."""
        if name == HEAD:
            return "int8"
        return self.format if name.endswith(tuple(f".{projection}.weight" for projection in PROJECTIONS)) else None

    def json(self, config: ModelConfig) -> dict[str, Any]:
        """The value of quantization_config."""
        return {
            "quant_method": METHOD,
            "format": self.format,
            "group_size": FORMATS[self.format].group,
            "block_size": FORMATS[self.format].block,
            "head_format": "bfloat16" if config.tie_word_embeddings else "int8",
        }


def scale_name(name: str) -> str:
    """The tensor of scales that belongs to a tensor of codes."""
    return f"{name}_scale"


def quantization_from_json(values: Mapping[str, Any], config: ModelConfig, where: str) -> Quantization | None:
    """What the mapping of a config.json says about quantization; None for a model of floats.

    Raises: ConfigError for a method, format or layout that is not this project's.
    """
    found = values.get(KEY)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or method != METHOD:
        raise ConfigError(
            f"{where}: {KEY}.quant_method={method!r} is not supported",
            "use the folder in floats, and `looplm quantize` on it if it is to be smaller",
        )
    name = found.get("format")
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"{where}: {KEY}.format={name!r} is not known", f"known: {', '.join(FORMATS)}")
    for key, wanted in Quantization(name).json(config).items():
        if found.get(key) != wanted:
            raise ConfigError(
                f"{where}: {KEY}.{key}={found.get(key)!r}, but {name} is stored with {key}={wanted!r}",
                "quantize the model again, with `looplm quantize`",
            )
    return Quantization(name)
