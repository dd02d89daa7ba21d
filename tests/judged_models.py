"""The judge's small models as the engine's weights, batches for them, and what counts as close."""

import functools
from typing import Any

import numpy as np

from looplm.arrays import Ints
from looplm.config import ModelConfig, model_config_from_json
from looplm.weights import Weights
from looplm_reference.judge import MODELS, random_tensors

BATCH, LENGTH = 3, 7


@functools.cache
def weights_of(name: str) -> Weights:
    config = model_config_from_json(MODELS[name], name)
    return Weights.from_tensors(config, random_tensors(MODELS[name], seed=3)).copy()


def batch_of(config: ModelConfig, batch: int = BATCH, length: int = LENGTH) -> tuple[Ints, Ints]:
    rng = np.random.default_rng(8)
    ids = rng.integers(0, config.vocab_size, (batch, length))
    return ids, np.where(rng.random((batch, length)) < 0.3, -1, rng.integers(0, config.vocab_size, (batch, length)))


def close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Relative to the largest: single entries may cancel to nearly nothing."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()
