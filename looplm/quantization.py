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

from .arrays import Floats
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

ROWS, COLUMNS = 16, 4  # a line of codes, 64 bytes, holds so many columns (in int4 twice as many) of so many rows


@dataclasses.dataclass(frozen=True)
class Format:
    """How one matrix is stored.  Scales are max|w| / d for the d of `divisors` that loses least."""

    name: str
    group: int  # columns that share a scale, and are padded to it
    low: int  # range of the integers
    high: int
    zero_point: int  # what is added to them, to make bytes without sign
    per_byte: int  # integers in a byte
    divisors: tuple[float, ...]

    def groups(self, columns: int) -> int:
        return -(-columns // self.group)

    def codes_shape(self, shape: tuple[int, int]) -> tuple[int, int, int]:
        """Runs of rows, lines of a run, bytes of a line."""
        return runs(shape[0]), self.groups(shape[1]) * self.group // (COLUMNS * self.per_byte), COLUMNS * ROWS

    def scales_shape(self, shape: tuple[int, int]) -> tuple[int, int, int]:
        """Runs of rows, groups, rows."""
        return runs(shape[0]), self.groups(shape[1]), ROWS


def runs(rows: int) -> int:
    """Rows are padded to whole runs."""
    return -(-rows // ROWS)


# Only one side reaches 8, and a scale that clips the largest weight can serve the other 31 better.  Error on normal
# weights: 0.097 with 7 alone, 0.090 with 7 and 8, 0.0863 with these, 0.0858 with steps of 1/32.
_DIVISORS = tuple(6.5 + 0.25 * step for step in range(15))
FORMATS = {
    "int8": Format("int8", 64, -127, 127, 128, 1, (127.0,)),
    "int4": Format("int4", 32, -8, 7, 8, 2, _DIVISORS),
}


@dataclasses.dataclass(frozen=True)
class Quantized:
    """One matrix of `shape` N x K as it lies in the file, runs of ROWS rows one after the other; arrays may be mapped.

    codes: uint8, run x line x 64; scales: bfloat16 as its bits in uint16, run x group x ROWS.
    """

    format: str
    shape: tuple[int, int]
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.uint16]

    @property
    def layout(self) -> Format:
        return FORMATS[self.format]

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scales.nbytes)

    def set_rows(self, rows: slice, weight: Floats, name: str = "the matrix") -> None:
        """Round some rows of the matrix: whole runs, but for its last.  weight: MK

        Raises: CheckpointError that calls it `name`, if a weight is not a finite number.
        """
        layout, weight = self.layout, np.ascontiguousarray(weight, np.float32)
        wrong = count_not_finite(weight)
        if wrong:
            raise CheckpointError(
                f"{name} has {wrong} weights that are not finite numbers", "quantize a model whose weights are sound"
            )
        groups, part = layout.groups(self.shape[1]), _runs_of(rows)
        codes = np.empty((len(weight), groups * layout.group), np.int8)
        scales = np.zeros((runs(len(weight)) * ROWS, groups), np.uint16)
        divisors = np.array(layout.divisors)
        quantize_rows_into(codes, scales[: len(weight)], weight, divisors, float(layout.low), float(layout.high))
        self.codes[part], self.scales[part] = pack(codes, layout), scales.reshape(-1, ROWS, groups).swapaxes(1, 2)

    def dequantize(self, rows: slice | None = None, out: Floats | None = None) -> Floats:
        """The numbers that some rows (default all) stand for, N x K, exact in float32; written to `out` if given."""
        begin, end, _ = (rows or slice(None)).indices(self.shape[0])
        made = np.empty((end - begin, self.shape[1]), np.float32) if out is None else out
        for piece in row_blocks(slice(begin // ROWS * ROWS, end), self.shape[1]):
            part, some = _runs_of(piece), slice(max(begin, piece.start), piece.stop)
            integers = unpack(self.codes[part], self.layout)
            scales = widen_bfloat16(self.scales[part]).swapaxes(1, 2).reshape(len(integers), -1)
            grouped = integers.reshape(*scales.shape, self.layout.group)
            values = np.multiply(grouped, scales[..., None], dtype=np.float32).reshape(len(integers), -1)
            wanted = values[some.start - piece.start : some.stop - piece.start, : self.shape[1]]
            made[some.start - begin : some.stop - begin] = wanted
        return made


def _runs_of(rows: slice) -> slice:
    """The runs that some rows lie in, of which they begin the first."""
    assert rows.start % ROWS == 0, "a run of rows is written and read as a whole"
    return slice(rows.start // ROWS, runs(rows.stop))


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
    codes, scales = np.empty(layout.codes_shape(shape), np.uint8), np.empty(layout.scales_shape(shape), np.uint16)
    return Quantized(fmt, shape, codes, scales)


def row_blocks(rows: slice, columns: int) -> Iterator[slice]:
    """Some rows of a matrix in pieces of whole runs, of at most ROWS_OF weights, but a run at least."""
    step = max(1, ROWS_OF // max(1, columns) // ROWS) * ROWS
    return (slice(begin, min(begin + step, rows.stop)) for begin in range(rows.start, rows.stop, step))


def pack(codes: npt.NDArray[np.int8], layout: Format) -> npt.NDArray[np.uint8]:
    """Integers, N x Kp -> bytes, run x line x 64.

    Byte 4 r + i of line l holds column 4 l + i of row r of the run, plus the zero point.  Where two share a byte, the
    lower half holds column 8 l + i, and the upper one the column 4 further.
    """
    rows, columns = codes.shape
    padded = np.zeros((runs(rows) * ROWS, columns), np.int8)
    padded[:rows] = codes
    stored = padded.view(np.uint8) + np.uint8(layout.zero_point)  # the same bits modulo 256
    words = np.ascontiguousarray(stored.view(np.uint32).reshape(-1, ROWS, columns // COLUMNS).swapaxes(1, 2))
    if layout.per_byte == 2:
        words = words[:, ::2] | words[:, 1::2] << np.uint32(4)
    return words.view(np.uint8)


def unpack(packed: npt.NDArray[np.uint8], layout: Format) -> npt.NDArray[np.int8]:
    """The way back from `pack`; N is a whole number of runs."""
    if layout.per_byte == 2:
        halves = np.stack([packed & np.uint8(15), packed >> 4], axis=2)
        packed = halves.reshape(len(packed), -1, packed.shape[2])
    words = np.ascontiguousarray(packed).view(np.uint32).swapaxes(1, 2)
    integers = np.ascontiguousarray(words).view(np.uint8) - np.uint8(layout.zero_point)
    return integers.view(np.int8).reshape(len(packed) * ROWS, -1)


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
            "rows_together": ROWS,
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
