"""Settings of training runs so small that a step takes milliseconds."""

from typing import Any

from looplm.settings import RunConfig, run_config

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 48}
STEPS: dict[str, Any] = {"seq_len": 16, "batch_size": 4, "eval_tokens": 128, "threads": 1}

# the same for the command line
ARGUMENTS = (
    *("--tokenizer", "bytes"),
    *(f"--set=model.{name}={value}" for name, value in SIZES.items()),
    *(f"--set=train.{name}={value}" for name, value in STEPS.items()),
)


def settings(corpus: str, model: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    """A run on a text, every byte a token."""
    data = {"corpus": corpus, "tokenizer": "bytes"}
    return run_config("nano", {"model": {**SIZES, **(model or {})}, "data": data, "train": {**STEPS, **train}})
