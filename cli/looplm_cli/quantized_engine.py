"""Who computes with weights in short formats, in the seats of looplm_reference.quantized_judge."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from looplm import model
from looplm.arrays import Array, Floats
from looplm.config import model_config_from_json
from looplm.exits import LearnedGate
from looplm.generation import Session
from looplm.quantization import Quantized, quantize_matrix
from looplm.safetensors_file import round_to_bfloat16, widen_bfloat16
from looplm.stored import StoredMatrix, StoredWeights, convert, is_matrix
from looplm.weights import Weights
from looplm_reference.quantize import Stored
from looplm_reference.quantized_judge import Candidate


def quantized(stored: Stored) -> Quantized:
    """The engine's form of a stored matrix."""
    return Quantized(stored.format, stored.shape, stored.codes, round_to_bfloat16(stored.scales.astype(np.float32)))


def engine_rounding(weight: Floats, fmt: str) -> Stored:
    """The engine's quantize_matrix, as the judge wants to see it."""
    made = quantize_matrix(weight, fmt)
    return Stored(made.format, made.shape, made.codes, widen_bfloat16(made.scales).astype(np.float64))


class Widened:
    """Weights widened to float32 when they are read, then as any other: what all commands do with a loaded model."""

    name = "widened to float32"

    def product(self, x: Floats, stored: Stored) -> Array:
        y: Array = x @ quantized(stored).dequantize().T
        return y

    def forward(self, stored: Mapping[str, Any], config: Mapping[str, Any], input_ids: Array) -> Mapping[str, Array]:
        tensors = {
            name: quantized(value).dequantize() if isinstance(value, Stored) else np.asarray(value, np.float32)
            for name, value in stored.items()
        }
        weights = Weights.from_tensors(model_config_from_json(config, "the judge's model"), tensors)
        trace = model.forward(weights, input_ids)
        logits = np.stack([trace.logits(r) for r in range(len(trace.hidden))])
        return {"hidden": trace.hidden, "logits": logits}


class Decoded:
    """Weights read as they are stored, by the kernels and the compiled loop of decoding, position by position."""

    name = "decoded as they are stored"

    def product(self, x: Floats, stored: Stored) -> Array:
        rows = np.ascontiguousarray(x, np.float32).reshape(-1, x.shape[-1])
        return _matrix(stored).multiply(rows).reshape(*x.shape[:-1], -1)

    def forward(self, stored: Mapping[str, Any], config: Mapping[str, Any], input_ids: Array) -> Mapping[str, Array]:
        matrices = {name: _matrix(value) for name, value in stored.items() if is_matrix(name)}
        floats = {name: np.asarray(value, np.float32) for name, value in stored.items() if name not in matrices}
        return decoded(StoredWeights(model_config_from_json(config, "the judge's model"), matrices, floats), input_ids)


def _matrix(value: Stored | Array) -> StoredMatrix:
    if isinstance(value, Stored):
        found = quantized(value)
        return StoredMatrix(found.format, found.shape, found.codes, found.scales)
    return convert(np.ascontiguousarray(value, np.float32), "float32")


def decoded(weights: StoredWeights, input_ids: Array) -> dict[str, Array]:
    """States and logits of every loop, RBS..., of text that is fed in half and decoded from there on."""
    half = input_ids.shape[1] // 2
    session = Session(weights, batch=len(input_ids), policy="full")
    states = [session.feed(input_ids[:, :half]).hidden] if half else []
    for column in np.ascontiguousarray(input_ids[:, half:].T):
        session.advance(column, LearnedGate(1.0))
        states.append(session.hidden[:, :, None].copy())
    hidden = np.concatenate(states, axis=2)
    return {"hidden": hidden, "logits": weights.logits(hidden)}


CANDIDATES: tuple[Candidate, ...] = (Widened(), Decoded())
