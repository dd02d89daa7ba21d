"""How a training run is set up: presets, YAML and overrides in, frozen dataclasses out.

A default stands once, in a dataclass or in a preset.  Precedence: flag or `--set` over YAML file over task over preset
over dataclass.
"""

import contextlib
import dataclasses
import difflib
import math
import pathlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from .config import ModelConfig, head_dim_of
from .errors import ConfigError

Values = dict[str, dict[str, Any]]  # section -> key -> value, as YAML gives it

RECOMPUTE = ("none", "loop", "layer")  # less memory and more time from left to right; the same bits
PRECISIONS = ("fp32", "bf16", "auto")
ON_ERRORS = ("strict", "replace", "ignore")  # what may be done with bytes that are not text


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Initial values.  Measured: with the published ones small models get worse with every loop."""

    scheme: str = "damped"  # damped: the three values below; ouro: published (0.02 everywhere, norms 1)
    post_norm: float = 0.5  # weight of the norms after attention and after the MLP
    embedding_std: float = 0.5
    weight_std: float = 0.02  # of linear layers

    def __post_init__(self) -> None:
        _one_of(self, "init", "scheme", ("damped", "ouro"))
        _positive(self, "init", "post_norm", "embedding_std", "weight_std")


PUBLISHED_INIT = {"post_norm": 1.0, "embedding_std": 0.02, "weight_std": 0.02}  # what scheme "ouro" stands for


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    corpus: tuple[str, ...] = ("builtin:python-topics",)
    tokenizer: str = "auto"  # auto: byte-level BPE trained on the corpus; bytes; or a tokenizer.json
    vocab_size: int = 0  # of a trained tokenizer; 0: chosen from the corpus size
    val_fraction: float = 0.1  # last part of the text, held out
    encoding: str = "utf-8"
    errors: str = "strict"  # what to do with bytes that are not text: strict, replace, ignore

    def __post_init__(self) -> None:
        if not 0.0 < self.val_fraction < 1.0:
            raise ConfigError(f"data.val_fraction={self.val_fraction} is outside (0, 1)", "use e.g. 0.1")
        if self.vocab_size < 0 or 0 < self.vocab_size < 257:
            raise ConfigError(f"data.vocab_size={self.vocab_size} is too small", "256 bytes + a special token need 257")
        _one_of(self, "data", "errors", ON_ERRORS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Stage I: everything is trained on the expected loss minus entropy."""

    steps: int = 1200  # optimizer updates
    minutes: float = 0.0  # above 0: as many steps as fit, fixed after the first seconds
    batch_size: int = 8  # B
    seq_len: int = 128  # S
    learning_rate: float = 5e-3  # peak
    warmup_steps: int = 0  # 0: a twentieth of the steps, at least 20
    min_lr_ratio: float = 0.1  # where the cosine ends, as a share of the peak
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only
    clip: float = 1.0  # gradient norm; 0: off
    entropy_weight: float = 0.05  # the paper's beta
    prior: str = "uniform"  # uniform; geometric:P; or R numbers separated by commas
    seed: int = 0
    eval_every: int = 0  # steps between evaluations; 0: at most ten in all
    eval_tokens: int = 16384  # of held-out text, at each evaluation but the last, which takes all
    checkpoint_every: int = 0  # steps between checkpoints; 0: every `checkpoint_seconds`
    checkpoint_seconds: float = 20.0
    threads: int = 0  # 0: one per processor core
    dtype: str = "float32"  # how the model folder stores weights; bfloat16 halves it
    recompute: str = "auto"  # what backward computes again: none, loop, layer; auto: the first that fits into memory
    precision: str = "auto"  # of all matrix products, in attention too: fp32, bf16; auto: bf16 where clearly quicker
    kernels: str = ""  # path of the matrix products; empty: the quickest, as measured

    def __post_init__(self) -> None:
        _positive(self, "train", "batch_size", "learning_rate", "adam_eps", "eval_tokens", "checkpoint_seconds")
        _not_negative(self, "train", "steps", "minutes", "warmup_steps", "weight_decay", "clip", "entropy_weight")
        _not_negative(self, "train", "seed", "threads", "eval_every", "checkpoint_every")
        if self.seq_len < 2:
            raise ConfigError(f"train.seq_len={self.seq_len} is too short", "use at least 2 positions")
        if not self.steps and not self.minutes:
            raise ConfigError("train.steps=0 and train.minutes=0 train nothing", "give one of the two")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"train.{name}={getattr(self, name)} is outside [0, 1)", "use e.g. 0.9 and 0.95")
        _one_of(self, "train", "dtype", ("float32", "bfloat16"))
        _one_of(self, "train", "recompute", (*RECOMPUTE, "auto"))
        _one_of(self, "train", "precision", PRECISIONS)
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise ConfigError(f"train.min_lr_ratio={self.min_lr_ratio} is outside [0, 1]", "use e.g. 0.1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run depends on; `to_yaml` is what its folder stores."""

    preset: str
    model: Mapping[str, Any]  # ModelConfig keys; vocab_size and token ids come with the tokenizer
    init: InitConfig
    data: DataConfig
    train: TrainConfig

    def model_config(self, **from_tokenizer: Any) -> ModelConfig:
        """The model's shape once the vocabulary is known."""
        values = {"max_position_embeddings": max(1024, self.train.seq_len)}
        values |= {**self.model, **from_tokenizer}
        values.setdefault("num_key_value_heads", values.get("num_attention_heads", 0))
        if "head_dim" not in values and {"hidden_size", "num_attention_heads"} <= values.keys():
            sizes = values["hidden_size"], values["num_attention_heads"]
            if all(type(size) is int for size in sizes):
                values["head_dim"] = head_dim_of(*sizes)
        config = build(ModelConfig, values, "model")
        if config.max_position_embeddings < self.train.seq_len:
            raise ConfigError(
                f"train.seq_len={self.train.seq_len} is longer than "
                f"model.max_position_embeddings={config.max_position_embeddings}",
                "shorten train.seq_len or raise model.max_position_embeddings",
            )
        return config


_NANO = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 352, "num_hidden_layers": 2}
PRESETS: dict[str, Values] = {
    "nano": {  # what its last loops gain on text is partly lost in bfloat16 products
        "model": _NANO,
        "init": {"weight_std": 0.05},
        "train": {"steps": 1200, "learning_rate": 5e-3, "precision": "fp32"},
    },
    "tiny": {
        "model": {**_NANO, "num_hidden_layers": 4},
        "train": {"steps": 3000, "batch_size": 16, "learning_rate": 4e-3},
    },
    "small": {
        "model": {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 704, "num_hidden_layers": 6},
        "train": {"steps": 5000, "seq_len": 256, "learning_rate": 2e-3},
    },
    "medium": {
        "model": {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1408, "num_hidden_layers": 8},
        "train": {"steps": 10000, "batch_size": 4, "seq_len": 256, "learning_rate": 1e-3},
    },
}

# p-hop induction wants fresh sequences of its own length, and falls into place within two thousand steps.  With the
# usual entropy weight a loop that is wrong soon has no share of the loss, and two hops are often left to the last loop.
TASK_SETTINGS: dict[str, Values] = {
    "builtin:hops": {
        "init": {"weight_std": 0.02},
        "train": {
            "steps": 3500,
            "batch_size": 16,
            "seq_len": 64,
            "learning_rate": 3e-3,
            "beta2": 0.98,
            "entropy_weight": 0.5,
            "precision": "auto",
        },
    }
}

SECTIONS: dict[str, Any] = {"model": ModelConfig, "init": InitConfig, "data": DataConfig, "train": TrainConfig}


def run_config(preset: str, *layers: Mapping[str, Any]) -> RunConfig:
    """Stack YAML-like mappings (later ones win) on a preset, and on what the task needs if the corpus is one.

    Raises: ConfigError for an unknown preset, section or key (with a suggestion), a wrong type or an impossible value.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is not known", _suggest(preset, PRESETS))
    given: Values = {name: {} for name in SECTIONS}
    for layer in layers:
        for section, values in layer.items():
            if section == "preset":
                continue
            if section not in SECTIONS:
                raise ConfigError(f"{section!r} is not a section of a run's settings", _suggest(section, SECTIONS))
            if not isinstance(values, Mapping):
                raise ConfigError(f"section {section!r} is {type(values).__name__}", "it holds `key: value` lines")
            given[section] |= values
    data = build(DataConfig, given["data"], "data")
    task: Values = next((TASK_SETTINGS[name] for name in data.corpus if name in TASK_SETTINGS), {})
    merged = {name: {**PRESETS[preset].get(name, {}), **task.get(name, {}), **given[name]} for name in SECTIONS}
    if given["init"].get("scheme") == "ouro":
        merged["init"] = PUBLISHED_INIT | given["init"]
    config = RunConfig(
        preset=preset,
        model=merged["model"],
        init=build(InitConfig, merged["init"], "init"),
        data=data,
        train=build(TrainConfig, merged["train"], "train"),
    )
    config.model_config(**({} if "vocab_size" in config.model else {"vocab_size": 257}))  # refuse bad sizes at once
    return config


def load_yaml(path: str | pathlib.Path) -> dict[str, Any]:
    """The mapping in a YAML file.  Raises: ConfigError if it is missing, not YAML, or not a mapping."""
    import yaml

    try:
        values = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read settings from {path}: {error}", "name a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2026-13-01 looks like a date
        first_line = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML: {first_line}", "write sections with `key: value` lines") from error
    if not isinstance(values, dict):
        hint = f"top level: {', '.join(SECTIONS)} or preset"
        raise ConfigError(f"{path} holds {type(values).__name__}, not sections", hint)
    return values


def parse_settings(settings: Iterable[str]) -> Values:
    """`["train.steps=10"]` as a mapping, values read as YAML.  Raises: ConfigError if one is not SECTION.KEY=VALUE."""
    import yaml

    values: Values = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        section, dot, key = path.partition(".")
        if not (equals and dot and key):
            raise ConfigError(f"--set {setting!r} is not SECTION.KEY=VALUE", "e.g. --set train.learning_rate=3e-3")
        try:
            values.setdefault(section, {})[key] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"--set {setting!r}: the value is not YAML", "quote text that holds : or [") from error
    return values


def to_yaml(config: RunConfig) -> str:
    """The effective settings, complete, as `looplm train --config` reads them."""
    import yaml

    values = dataclasses.asdict(config)
    values["data"]["corpus"] = list(config.data.corpus)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def from_yaml(path: str | pathlib.Path) -> RunConfig:
    """A run's stored settings."""
    values = load_yaml(path)
    return run_config(values.get("preset", "nano"), values)


def build(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """Make a settings dataclass from a mapping.  Raises: ConfigError for unknown or missing keys and wrong types."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    wanted = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}.{key} is not a setting", _suggest(key, fields))
    found = {key: _coerce(value, wanted[key], f"{where}.{key}") for key, value in values.items()}
    missing = [name for name, f in fields.items() if name not in found and f.default is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}", "give them in the YAML file or with --set")
    return cls(**found)


def _coerce(value: Any, wanted: Any, where: str) -> Any:
    if wanted == tuple[str, ...]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{where}={value!r} is not a list of texts", "write one or several names")
        return tuple(items)
    kinds = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # PyYAML reads 3e-4 as text
    if str in kinds and wanted is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(
            f"{where}={value!r} is {type(value).__name__}, expected {names}", f"give {where} a value of type {names}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}={value} is not a finite number", f"give {where} a finite value")
    return value


def _suggest(key: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(key), list(known), 1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def _positive(config: Any, where: str, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{where}.{name}={getattr(config, name)} is not positive", "use a value above 0")


def _not_negative(config: Any, where: str, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{where}.{name}={getattr(config, name)} is negative", "use 0 or more")


def _one_of(config: Any, where: str, name: str, known: tuple[str, ...]) -> None:
    if (value := getattr(config, name)) not in known:
        raise ConfigError(f"{where}.{name}={value!r} is not known", f"use {', '.join(known[:-1])} or {known[-1]}")
