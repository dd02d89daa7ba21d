"""The judge of quantized weights: rounded as defined, and everything computed with them against what they stand for.

A candidate is given weights as they are stored, and brings its own product.  It may round what it multiplies them with,
as integer instructions ask for, as long as it stays within the bound; one that widens the weights is far inside.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from .contract import Row, first_failure, relative_error
from .judge import random_tensors
from .model import LoopLM
from .ops import Array
from .quantize import (
    FORMATS,
    MUTANTS,
    Reader,
    ReadingMutant,
    Stored,
    dequantize,
    dequantize_tensors,
    quantize,
    quantize_tensors,
    rounded,
)

__all__ = ["BOUND", "FORMATS", "MUTANTS", "Candidate", "ReadingCandidate", "compare", "compare_rounding"]

BOUND = {"int8": 1e-3, "int4": 1e-3}  # relative error, against float64 products with the dequantized weights

# N x K: whole blocks, parts of a block, parts of a group, one row, and long enough for every loop of a kernel to turn.
SHAPES = ((5, 64), (7, 200), (3, 20), (1, 97), (96, 130), (33, 1088))
ROWS = (1, 2, 5, 16)  # of what is multiplied: one token, small batches

# Rows of more than one block, padded; sizes that differ from each other.
MODEL: Mapping[str, Any] = {
    "hidden_size": 72,
    "intermediate_size": 136,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 22,
    "num_hidden_layers": 2,
    "total_ut_steps": 3,
    "vocab_size": 75,
    "rms_norm_eps": 1e-2,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32,
}


class Candidate(Protocol):
    """What is judged.

    `product` multiplies rows with a matrix (x: BK, stored: NK -> y: BN).  `forward` runs a model whose matrices are
    Stored, everything else arrays, under the names of the file (input_ids: BS -> hidden: RBSD, logits: RBSV).
    """

    name: str

    def product(self, x: Array, stored: Stored) -> Array: ...

    def forward(
        self, stored: Mapping[str, Any], config: Mapping[str, Any], input_ids: Array
    ) -> Mapping[str, Array]: ...


class ReadingCandidate:
    """The reference with a reader, perhaps a wrong one, in the candidate's seat."""

    def __init__(self, reader: Reader | None = None, name: str = "reference") -> None:
        self.reader, self.name = reader or Reader(), name

    def product(self, x: Array, stored: Stored) -> Array:
        y: Array = x @ self.reader.dequantize(stored).T
        return y

    def forward(self, stored: Mapping[str, Any], config: Mapping[str, Any], input_ids: Array) -> Mapping[str, Array]:
        return LoopLM(dequantize_tensors(stored, self.reader), config).forward(input_ids)


def compare(candidate: Candidate, fmt: str) -> Iterator[Row]:
    """Products of every size, then a whole model, loop by loop."""
    yield from compare_products(candidate, fmt)
    yield from compare_model(candidate, fmt)


def compare_products(candidate: Candidate, fmt: str) -> Iterator[Row]:
    rng = np.random.default_rng(3)
    for shape in SHAPES:
        stored = quantize(rng.standard_normal(shape).astype(np.float32), fmt)
        for rows in ROWS:
            x = rng.standard_normal((rows, shape[1])).astype(np.float32)
            expected = x.astype(np.float64) @ dequantize(stored).T
            error = relative_error(expected, candidate.product(x, stored))
            yield Row(f"{fmt}: {shape[0]} x {shape[1]}, batch of {rows}", error, BOUND[fmt])


def compare_model(candidate: Candidate, fmt: str) -> Iterator[Row]:
    stored = quantize_tensors(random_tensors(MODEL), fmt)
    ids = np.random.default_rng(5).integers(0, MODEL["vocab_size"], (2, 7))
    expected = LoopLM(dequantize_tensors(stored), MODEL).forward(ids)
    found = candidate.forward(stored, MODEL, ids)
    for r in range(MODEL["total_ut_steps"]):
        for name in ("hidden", "logits"):
            error = relative_error(expected[name][r], found[name][r])
            yield Row(f"{fmt}: model.loop{r + 1}.{name}", error, BOUND[fmt])


def compare_rounding(rounding: Callable[[Array, str], Stored], fmt: str) -> Iterator[Row]:
    """Codes and scales that a candidate makes of matrices, which must be those of the definition to the bit."""
    for name, weight in matrices().items():
        expected, found = quantize(weight, fmt), rounding(weight, fmt)
        for part in ("codes", "scales"):
            error = relative_error(getattr(expected, part), getattr(found, part))
            yield Row(f"{fmt}: {name}.{part}", error, 0.0)


def matrices() -> dict[str, Array]:
    """float32 matrices that ask for every rule of the definition."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((9, 200))
    made = {
        "normal": normal,
        "bfloat16": rounded(normal),  # many weights lie half way between two codes
        "few values": rng.integers(-3, 4, (6, 128)) * 0.25,
        "long tails": rng.standard_cauchy((7, 96)),
        "one column": rng.standard_normal((4, 1)),
        "zeros": np.zeros((3, 70)),
        "nearly nothing": normal * 10.0 ** -np.linspace(34, 44, 9)[:, None],  # down to where scales become 0
        "huge": normal * 1e37,
        "one large": np.where(np.arange(64) == 9, 1e6, rng.standard_normal((2, 64))),
    }
    return {name: value.astype(np.float32) for name, value in made.items()}


def first_failures(mutant: ReadingMutant) -> list[Row]:
    """The rows that catch a wrong reader: the first product, and the first of the whole model."""
    wrong = ReadingCandidate(mutant.reader(), mutant.name)
    every: Iterable[Iterator[Row]] = (compare_products(wrong, mutant.format), compare_model(wrong, mutant.format))
    return [row for rows in every if (row := first_failure(rows)) is not None]
