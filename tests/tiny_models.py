"""Small random models in folders, for tests of commands: nothing is trained, everything is there."""

import pathlib
from typing import Any

import numpy as np

from looplm.checkpoint import save_model
from looplm.config import ModelConfig
from looplm.data import save_tokens
from looplm.settings import InitConfig, run_config, to_yaml
from looplm.tasks.hops import HopsSource
from looplm.text import Tokenizer, byte_tokenizer, tokenizer_config_json
from looplm.weights import initialise

HELD_OUT = "It was the best of times, it was the worst of times, it was the age of wisdom.\n" * 4


def save_tiny(folder: pathlib.Path, tokenizer: Tokenizer, provenance: dict[str, Any], loops: int) -> pathlib.Path:
    """A model whose gates are undecided enough that exits differ from token to token."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        total_ut_steps=loops,
        max_position_embeddings=64,
    )
    weights = initialise(config, InitConfig(weight_std=0.4, embedding_std=1.0, post_norm=0.5), seed=2)
    length = config.max_position_embeddings
    save_model(folder, weights, tokenizer.json, tokenizer_config_json(tokenizer, length), provenance)
    return folder


def text_run(run: pathlib.Path, loops: int = 4) -> pathlib.Path:
    """A run folder with a byte-level text model and held-out text.  Returns the model folder."""
    tokenizer = byte_tokenizer()
    (run / "data").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(run_config("nano", {"train": {"seq_len": 16}})), encoding="utf-8")
    save_tokens(run / "data" / "val.npy", tokenizer.encode(HELD_OUT))
    return save_tiny(run / "model", tokenizer, {"task": "text", "trained_loops": loops}, loops)


def hops_model(folder: pathlib.Path, loops: int = 3) -> pathlib.Path:
    """A model folder of the task hops, alphabet and hops other than the task's defaults."""
    source = HopsSource(2, 20, seed=0, alphabet=5, max_hops=2)
    provenance = {"task": "hops", "task_settings": source.settings, "trained_loops": loops}
    return save_tiny(folder, source.tokenizer(), provenance, loops)


def token_count() -> int:
    return int(np.size(byte_tokenizer().encode(HELD_OUT)))
