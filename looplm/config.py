"""The shape of a model, under the names of the Hugging Face `config.json` of the Ouro models.

How a run is set up (presets, YAML, overrides) is in settings.py.  Nothing is defaulted here that a checkpoint has to
say itself: the class defaults of the published OuroConfig are not those of any published model.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError

ARCHITECTURE = "OuroForCausalLM"
# The published Python code that transformers runs these models with; our folders name it and don't carry it.
MODEL_CODE = "ByteDance/Ouro-1.4B"
AUTO_MAP = {
    "AutoConfig": "configuration_ouro.OuroConfig",
    "AutoModel": "modeling_ouro.OuroModel",
    "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
}

# What a folder must say; the rest of ModelConfig has a value that is right when the key is absent.
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "total_ut_steps",
    "rms_norm_eps",
    "max_position_embeddings",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the network; the letters are those of the glossary.

    Raises: ConfigError if sizes do not fit together, naming the value and a cure.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L, distinct layers of the shared stack
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    head_dim: int  # K
    total_ut_steps: int = 4  # R, times the stack is applied (the paper's T)
    max_position_embeddings: int = 1024  # longest S
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = False
    early_exit_threshold: float = 1.0  # q
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (*REQUIRED, "num_key_value_heads", "head_dim", "rope_theta"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"model.{name}={value} is not a positive number", "use a value above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model.num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}",
                "every key/value head serves the same number of query heads",
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model.head_dim={self.head_dim} is odd", "rotary positions turn pairs of channels: use an even number"
            )
        if not 0.0 <= self.early_exit_threshold <= 1.0:
            raise ConfigError(
                f"model.early_exit_threshold={self.early_exit_threshold} is outside [0, 1]", "use e.g. 0.7"
            )


def head_dim_of(hidden_size: int, num_attention_heads: int) -> int:
    """Channels per head when a config leaves them out.  Raises: ConfigError if the division leaves a rest."""
    if num_attention_heads <= 0:
        raise ConfigError(f"model.num_attention_heads={num_attention_heads} is not a positive number", "use 1 or more")
    if hidden_size % num_attention_heads:
        step = num_attention_heads
        raise ConfigError(
            f"model.hidden_size={hidden_size} is not divisible by num_attention_heads={num_attention_heads}",
            f"use a multiple of {step}, e.g. {-(-hidden_size // step) * step}, or give model.head_dim",
        )
    return hidden_size // num_attention_heads


def model_config_from_json(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Read the mapping of a `config.json`; `where` names the file in messages.

    Understands `rope_theta` and the newer `rope_parameters`, an absent or null `head_dim` and `num_key_value_heads`.

    Raises: ConfigError for another architecture, a missing or mistyped key, or a feature this engine does not have.
    """
    named = values.get("architectures") or [ARCHITECTURE]
    architectures = named if isinstance(named, list) else [named]
    if values.get("model_type", "ouro") != "ouro" or ARCHITECTURE not in architectures:
        raise ConfigError(
            f"{where}: architecture {architectures[0]!r} (model_type {values.get('model_type')!r}) is not a LoopLM",
            f"looplm opens folders whose config.json says model_type 'ouro' and architecture '{ARCHITECTURE}'",
        )
    missing = [name for name in REQUIRED if values.get(name) is None]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}", "a model's sizes are never guessed: add the key")
    _refuse_unsupported(values, where)

    found: dict[str, Any] = {}
    for field in dataclasses.fields(ModelConfig):
        value = values.get(field.name)
        if value is not None:
            found[field.name] = _first_id(value) if field.name.endswith("_token_id") else value
    found["rope_theta"] = _rope_theta(values, where)
    found.setdefault("num_key_value_heads", values["num_attention_heads"])
    _check_types(found, where)
    if "head_dim" not in found:
        found["head_dim"] = head_dim_of(found["hidden_size"], found["num_attention_heads"])
    return ModelConfig(**found)


def model_config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The mapping to write as `config.json`: every field name of the published Ouro configs, both RoPE spellings."""
    values = dataclasses.asdict(config)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "ouro",
        "auto_map": {name: f"{MODEL_CODE}--{target}" for name, target in AUTO_MAP.items()},
        **values,
        "hidden_act": "silu",
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "use_cache": True,
        "torch_dtype": "float32",
        "transformers_version": "4.55.0",
    }


def _rope_theta(values: Mapping[str, Any], where: str) -> Any:
    parameters = values.get("rope_parameters")
    theta = parameters.get("rope_theta") if isinstance(parameters, Mapping) else None
    spelled = values.get("rope_theta")
    if theta is not None and spelled is not None and theta != spelled:
        raise ConfigError(
            f"{where}: rope_theta={spelled} contradicts rope_parameters.rope_theta={theta}", "make the two agree"
        )
    found = spelled if theta is None else theta
    if found is None:
        raise ConfigError(f"{where} has neither rope_theta nor rope_parameters.rope_theta", "add rope_theta")
    return found


def _refuse_unsupported(values: Mapping[str, Any], where: str) -> None:
    parameters = values.get("rope_parameters")
    rope_type = parameters.get("rope_type", "default") if isinstance(parameters, Mapping) else "default"
    for seen, wanted, name in (
        (values.get("hidden_act", "silu"), "silu", "hidden_act"),
        (values.get("rope_scaling"), None, "rope_scaling"),
        (rope_type, "default", "rope_parameters.rope_type"),
        (bool(values.get("use_sliding_window", False)), False, "use_sliding_window"),
    ):
        if seen != wanted:
            raise ConfigError(f"{where}: {name}={seen!r} is not supported", f"this engine has {name}={wanted!r} only")


def _first_id(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _check_types(found: dict[str, Any], where: str) -> None:
    for field in dataclasses.fields(ModelConfig):
        if field.name not in found:
            continue
        value = found[field.name]
        if field.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = found[field.name] = float(value)
        wanted = int if field.type == int | None else field.type
        if type(value) is not wanted:
            name = getattr(wanted, "__name__", str(wanted))
            seen = f"{where}: {field.name}={value!r} is {type(value).__name__}, expected {name}"
            raise ConfigError(seen, f"correct {field.name} in that file")
