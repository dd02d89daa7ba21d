"""A small random model of odd, pairwise different sizes, in memory; far from trained, so that nothing is near zero."""

import numpy as np

from looplm.config import ModelConfig
from looplm.data import Batch
from looplm.settings import InitConfig
from looplm.weights import Weights, initialise

CONFIG = ModelConfig(
    vocab_size=53,
    hidden_size=20,
    intermediate_size=36,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    total_ut_steps=5,
    max_position_embeddings=40,
    rms_norm_eps=1e-3,
    rope_theta=100.0,
)


def random_weights(config: ModelConfig = CONFIG, seed: int = 0) -> Weights:
    """Weights far from trained, with gates that differ from token to token and loop to loop."""
    weights = initialise(config, InitConfig(post_norm=0.7, embedding_std=1.0, weight_std=0.3), seed)
    rng = np.random.default_rng(seed)
    for name, tensor in weights.tensors.items():
        if "norm" in name:
            tensor *= rng.uniform(0.5, 1.5, tensor.shape).astype(np.float32)
    weights.gate_weight[...] = rng.standard_normal(weights.gate_weight.shape) * 0.6
    weights.gate_bias[...] = -1.0
    return weights


def random_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape)


def batch_of(ids: np.ndarray) -> Batch:
    """A text, S + 1 ids, as a row of ids and the ids that follow them."""
    return Batch(ids[None, :-1], ids[None, 1:])


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    difference = actual.astype(np.float64) - expected
    error = np.sqrt(np.mean(difference**2) / np.mean(expected.astype(np.float64) ** 2))
    return float(error) if np.isfinite(error) else np.inf
