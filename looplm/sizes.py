"""How large a model is: parameters by part, and the memory it takes to run and to train."""

from .cache import POLICIES, kept_loops
from .config import ModelConfig
from .weights import parameter_count, parameter_table

FLOAT_BYTES = 4  # of float32, in which everything is computed and cached
TRAINING_BUFFERS = 4  # weights, gradient, and two moments of the optimizer


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part; their `total`; and `unrolled`, the total if no loop shared its layers."""
    parts = {"embedding": 0, "stack": 0, "norm": 0, "gate": 0, "head": 0}
    for parameter in parameter_table(config):
        parts[_part(parameter.name)] += parameter.size
    total = parameter_count(config)
    return {**parts, "total": total, "unrolled": total + (config.total_ut_steps - 1) * parts["stack"]}


def key_value_bytes(config: ModelConfig, loops: int, dtype: str = "float32") -> int:
    """Bytes of the keys and values of one position: a key and a value in every layer of every loop."""
    channels = config.num_key_value_heads * config.head_dim
    return 2 * {"float32": FLOAT_BYTES, "bfloat16": 2}[dtype] * loops * config.num_hidden_layers * channels


def key_value_bytes_by_policy(config: ModelConfig, loops: int, dtype: str = "float32") -> dict[str, int]:
    """Bytes of one position's keys and values under each cache policy, once it is decoded."""
    return {policy: key_value_bytes(config, kept_loops(policy, loops), dtype) for policy in POLICIES}


def memory(config: ModelConfig) -> dict[str, int]:
    """Bytes of the weights, of training's buffers without activations, and of keys and values."""
    weights = FLOAT_BYTES * parameter_count(config)
    position = key_value_bytes(config, config.total_ut_steps)
    return {
        "weights": weights,
        "training": TRAINING_BUFFERS * weights,
        "key_value_per_token": position,
        "key_value_per_token_bfloat16": key_value_bytes(config, config.total_ut_steps, "bfloat16"),
        "key_value_context": position * config.max_position_embeddings,
    }


def _part(name: str) -> str:
    for mark, part in (
        ("embed_tokens", "embedding"),
        (".layers.", "stack"),
        ("exit_gate", "gate"),
        ("lm_head", "head"),
    ):
        if mark in name:
            return part
    return "norm"
