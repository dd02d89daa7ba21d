"""A model as decoding reads it: every matrix where it lies and in the format it is stored in.

Nothing is joined, repacked or copied: a bfloat16 model is read from its mapped file, and a float32 one from its
`Weights`.  Norms and gate are float32.  Integer formats are as docs/formats.md defines them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

from .arrays import Array, Floats, Ints, aligned_empty
from .config import ModelConfig
from .errors import CheckpointError
from .kernels.product.stored import FEW_ROWS, multiply, multiply_many, prepared_size, scratch_size
from .kernels.product.widened import multiply_wide, widen_row
from .kernels.streams import BFLOAT16, FLOAT32, INT4, INT8
from .model_files import EMBEDDING, HEAD, ModelFiles
from .quantization import ROWS, Quantization, Quantized, empty_quantized, quantize_matrix, row_blocks, scale_name
from .safetensors_file import TensorFile, round_to_bfloat16, widen_bfloat16
from .threads import run_all, shards
from .weights import Weights, parameter_table

Format = Literal["float32", "bfloat16", "int8", "int4"]
PromptPrecision = Literal["fp32", "bf16"]
PROMPT_PRECISIONS: tuple[PromptPrecision, ...] = get_args(PromptPrecision)
FORMATS: tuple[Format, ...] = get_args(Format)
KINDS: dict[str, int] = dict(zip(FORMATS, (FLOAT32, BFLOAT16, INT8, INT4), strict=True))
LAYER_PARTS = (  # in the order of a plan
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LAYER_NORMS = (
    "input_layernorm",
    "input_layernorm_2",
    "post_attention_layernorm",
    "post_attention_layernorm_2",
)


@dataclasses.dataclass(frozen=True)
class StoredMatrix:
    """N x K numbers.  `codes`: float32, bfloat16 bits (uint16), or integers; these have `scales`, bfloat16 bits."""

    format: str  # one of FORMATS
    shape: tuple[int, int]
    codes: Array
    scales: Array | None = None

    @property
    def plan(self) -> tuple[int, int, int]:
        """As kernels are told: kind, and the addresses of codes and scales."""
        scales = 0 if self.scales is None else self.scales.ctypes.data
        return KINDS[self.format], self.codes.ctypes.data, scales

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def rows(self, numbers: Ints) -> Floats:
        """Some rows as float32.  numbers: any shape -> shape x K"""
        if self.format == "float32":
            return self.codes[numbers]
        if self.format == "bfloat16":
            return widen_bfloat16(self.codes[numbers])
        kind, codes, scales = self.plan
        found = np.empty((numbers.size, self.shape[1]), np.float32)
        for row, n in zip(found, numbers.reshape(-1), strict=True):
            widen_row(kind, codes, scales, self.shape[1], n, row)
        return found.reshape(*numbers.shape, -1)

    def multiply(self, x: Floats, threads: int = 1) -> Floats:
        """x times the transpose.  x: MK (contiguous) -> y: MN"""
        (kind, *at), (rows, columns) = self.plan, x.shape
        y = np.empty((rows, self.shape[0]), np.float32)
        routine = multiply[kind] if rows <= FEW_ROWS else multiply_many(kind, rounded=False)

        def work(share: slice) -> None:
            prepared, scratch = (
                aligned_empty((prepared_size(columns, rows),)),
                aligned_empty((scratch_size(columns),)),
            )
            out, ready, own = y.ctypes.data + 4 * share.start, prepared.ctypes.data, scratch.ctypes.data
            numbers = (*at, columns, share.start, share.stop, x.ctypes.data, columns, rows, out, self.shape[0])
            if routine is None:
                multiply_wide.call(kind, *numbers, own)
            else:
                routine.call(*numbers, ready, own)

        run_all(work, shards(self.shape[0], threads))
        return y


class StoredWeights:
    """All tensors of a model; `matrices` by their names in the file, norms and gate as float32 in `floats`.

    `prompt_precision` is that of products of many rows with the stack: "bf16" rounds both operands to bfloat16, as
    models stored in it were trained; sums stay float32.  New tokens are decoded in float32 whatever it is.
    """

    def __init__(self, config: ModelConfig, matrices: Mapping[str, StoredMatrix], floats: Mapping[str, Floats]) -> None:
        self.config, self.matrices, self.floats = config, matrices, floats
        self.embedding = matrices[EMBEDDING]  # float32 or bfloat16: it is only looked up in
        self.head = matrices.get(HEAD, self.embedding)
        self.norm = floats["model.norm.weight"]
        self.prompt_precision: PromptPrecision = "fp32"
        self.gate_weight, self.gate_bias = (floats[f"model.early_exit_gate.{name}"] for name in ("weight", "bias"))

    @classmethod
    def of(cls, weights: Weights) -> "StoredWeights":
        """The same memory: what changes there changes here."""
        tensors = {name: np.ascontiguousarray(value) for name, value in weights.tensors.items()}
        matrices = {name: convert(value, "float32") for name, value in tensors.items() if is_matrix(name)}
        return cls(weights.config, matrices, {name: v for name, v in tensors.items() if name not in matrices})

    @property
    def float_arrays(self) -> dict[str, Array]:
        """Every array of floats (bfloat16 as bits) by its name in the file: what could hold a NaN."""
        found: dict[str, Array] = dict(self.floats)
        for name, matrix in self.matrices.items():
            found |= {name: matrix.codes} if matrix.scales is None else {scale_name(name): matrix.scales}
        return found

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices.values()) + sum(a.nbytes for a in self.floats.values())

    @property
    def bytes_per_token(self) -> int:
        """What decoding one token reads: the stack in every loop, and the head."""
        stack = sum(matrix.nbytes for name, matrix in self.matrices.items() if ".layers." in name)
        return stack * self.config.total_ut_steps + self.head.nbytes

    def embedded(self, input_ids: Ints) -> Floats:
        """input_ids: any shape -> shape x D"""
        return self.embedding.rows(input_ids)

    def logits(self, states: Floats, threads: int = 1) -> Floats:
        """Next-token logits.  states: ...D -> ...V"""
        rows = np.ascontiguousarray(states).reshape(-1, states.shape[-1])
        return self.head.multiply(rows, threads).reshape(*states.shape[:-1], -1)


def is_matrix(name: str) -> bool:
    """Whether a tensor is one that is stored in a format: not a norm, not the gate."""
    return "norm" not in name and "early_exit_gate" not in name


def convert(values: Floats, wanted: str, name: str = "the matrix") -> StoredMatrix:
    """A matrix N x K in a format.  Raises: CheckpointError for integers of what is not finite."""
    if wanted in ("int8", "int4"):
        return _quantized(quantize_matrix(values, wanted, name))
    shape = (values.shape[0], values.shape[1])
    return StoredMatrix(wanted, shape, round_to_bfloat16(values) if wanted == "bfloat16" else values)


def _quantized(found: Quantized) -> StoredMatrix:
    return StoredMatrix(found.format, found.shape, found.codes, found.scales)


def read_stored(files: ModelFiles, wanted: str | None = None, threads: int = 1) -> StoredWeights:
    """The weights of a model folder as they are stored there, mapped; or converted, some rows at a time.

    In the integer formats the head is int8 and the embedding bfloat16, as `looplm quantize` writes them.  Of what is
    converted nothing stays in memory but what it became.

    Raises: CheckpointError if another format is wanted of weights that are integers already.
    """
    if files.quantization and wanted not in (None, files.quantization.format):
        raise CheckpointError(
            f"{files.folder} holds {files.quantization.format} weights, which cannot become {wanted}",
            "use them as they are, or the folder that they were made from",
        )
    matrices: dict[str, StoredMatrix] = {}
    floats: dict[str, Floats] = {}
    to_integers = Quantization(wanted) if wanted in ("int8", "int4") and not files.quantization else None
    for name in (parameter.name for parameter in parameter_table(files.config)):
        if not is_matrix(name):
            floats[name] = files.stored_in[name].floats(name)
            continue
        stored = files.stored_matrix(name)
        if isinstance(stored, Quantized):
            matrices[name] = _quantized(stored)
            continue
        own = "bfloat16" if stored.dtype == np.uint16 else "float32"
        into = own if wanted is None or files.quantization else wanted
        if to_integers:
            into = to_integers.format_of(name) or "bfloat16"
        as_it_lies = stored.dtype == np.uint16 or (stored.dtype == np.float32 and stored.flags.aligned)
        if into == own and as_it_lies:
            matrices[name] = StoredMatrix(own, (stored.shape[0], stored.shape[1]), stored)
        else:
            matrices[name] = _converted(files.stored_in[name], name, into, threads)
    return StoredWeights(files.config, matrices, floats)


def _converted(file: TensorFile, name: str, into: str, threads: int) -> StoredMatrix:
    """A matrix of a file in another format."""
    shape = (file.entries[name].shape[0], file.entries[name].shape[1])
    if into in ("int8", "int4"):
        integers = empty_quantized(shape, into)
        made = _quantized(integers)
    else:
        made = StoredMatrix(into, shape, np.empty(shape, np.uint16 if into == "bfloat16" else np.float32))

    def work(share: slice) -> None:
        for rows in row_blocks(share, shape[1]):
            values = file.floats(name, rows=rows)
            if made.scales is not None:
                integers.set_rows(rows, values, name)
            else:
                made.codes[rows] = round_to_bfloat16(values) if into == "bfloat16" else values
            file.release(name, rows)

    run_all(work, shards(shape[0], threads, ROWS))
    file.release(name)  # pages between two pieces, and those that the system mapped around them
    return made
