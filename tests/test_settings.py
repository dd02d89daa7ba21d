"""Settings: what is asked for is what is used, and what cannot be is refused with its cure."""

import dataclasses
import math
import pathlib
from typing import Any

import pytest

from looplm.config import ModelConfig, head_dim_of, model_config_from_json, model_config_to_json
from looplm.errors import ConfigError
from looplm.settings import (
    PRESETS,
    DataConfig,
    InitConfig,
    RunConfig,
    TrainConfig,
    build,
    from_yaml,
    load_yaml,
    parse_settings,
    run_config,
    to_yaml,
)

JSON: dict[str, Any] = {
    "architectures": ["OuroForCausalLM"], "model_type": "ouro", "vocab_size": 300, "hidden_size": 24,
    "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "total_ut_steps": 3, "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip


def refused(message: str, hint: str, *layers: dict[str, Any], preset: Any = "nano") -> None:
    with pytest.raises(ConfigError) as caught:
        run_config(preset, *layers)
    assert message in str(caught.value)
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value) + caught.value.hint


# ---- wrong settings


@pytest.mark.parametrize(
    ("layer", "message", "hint"),
    [
        ({"train": {"stpes": 10}}, "train.stpes is not a setting", "did you mean steps?"),
        ({"model": {"hiden_size": 10}}, "model.hiden_size is not a setting", "did you mean hidden_size?"),
        ({"data": {"zzz": 1}}, "data.zzz is not a setting", "known: corpus, tokenizer"),
        ({"init": {7: 1}}, "init.7 is not a setting", "known: scheme"),
        ({"trian": {}}, "'trian' is not a section", "did you mean train?"),
        ({3: {}}, "3 is not a section", "known: model, init, data, train"),
        ({"train": None}, "section 'train' is NoneType", "key: value"),
        ({"train": ["steps"]}, "section 'train' is list", "key: value"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(layer: dict[str, Any], message: str, hint: str) -> None:
    refused(message, hint, layer)


@pytest.mark.parametrize("preset", ["nanoo", "", None, 3, ["nano"]])
def test_an_unknown_preset_is_refused(preset: Any) -> None:
    refused(f"preset {preset!r} is not known", "nano", preset=preset)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"train": {"steps": "many"}}, "train.steps='many' is str, expected int"),
        ({"train": {"steps": 1.5}}, "train.steps=1.5 is float, expected int"),
        ({"train": {"steps": True}}, "train.steps=True is bool, expected int"),
        ({"train": {"steps": None}}, "train.steps=None is NoneType, expected int"),
        ({"train": {"learning_rate": "fast"}}, "train.learning_rate='fast' is str, expected float"),
        ({"train": {"learning_rate": True}}, "train.learning_rate=True is bool, expected float"),
        ({"train": {"learning_rate": 10**400}}, "is int, expected float"),
        ({"train": {"prior": [0.5, 0.5]}}, "train.prior=[0.5, 0.5] is list, expected str"),
        ({"data": {"corpus": 3}}, "data.corpus=3 is not a list of texts"),
        ({"data": {"corpus": ["a", 3]}}, "data.corpus=['a', 3] is not a list of texts"),
        ({"model": {"hidden_size": "128"}}, "model.hidden_size='128' is str, expected int"),
        ({"model": {"tie_word_embeddings": "yes"}}, "model.tie_word_embeddings='yes' is str, expected bool"),
        ({"model": {"bos_token_id": "0"}}, "model.bos_token_id='0' is str, expected int or NoneType"),
    ],
)
def test_a_wrong_type_is_refused(layer: dict[str, Any], message: str) -> None:
    refused(message, "", layer)


@pytest.mark.parametrize(
    ("layer", "message", "hint"),
    [
        (
            {"model": {"hidden_size": 100, "num_attention_heads": 8}},
            "model.hidden_size=100 is not divisible by num_attention_heads=8",
            "use a multiple of 8, e.g. 104",
        ),
        (
            {"model": {"num_key_value_heads": 3}},
            "model.num_attention_heads=4 is not divisible by num_key_value_heads=3",
            "same number of query heads",
        ),
        ({"model": {"head_dim": 7}}, "model.head_dim=7 is odd", "even"),
        ({"model": {"hidden_size": 12}}, "model.head_dim=3 is odd", "even"),
        ({"model": {"total_ut_steps": 0}}, "model.total_ut_steps=0 is not a positive number", "above 0"),
        ({"model": {"total_ut_steps": -2}}, "model.total_ut_steps=-2 is not a positive number", "above 0"),
        ({"model": {"num_attention_heads": 0}}, "model.num_attention_heads=0 is not a positive number", ""),
        ({"model": {"num_hidden_layers": 0}}, "model.num_hidden_layers=0 is not a positive number", ""),
        ({"model": {"rms_norm_eps": 0}}, "model.rms_norm_eps=0.0 is not a positive number", ""),
        ({"model": {"early_exit_threshold": 1.5}}, "early_exit_threshold=1.5 is outside [0, 1]", ""),
        ({"model": {"max_position_embeddings": 64}}, "train.seq_len=128 is longer than", "max_position_embeddings"),
        ({"train": {"batch_size": 0}}, "train.batch_size=0 is not positive", "above 0"),
        ({"train": {"learning_rate": -1e-3}}, "train.learning_rate=-0.001 is not positive", ""),
        ({"train": {"learning_rate": math.nan}}, "train.learning_rate=nan is not a finite number", ""),
        ({"train": {"learning_rate": ".nan"}}, "train.learning_rate='.nan' is str", ""),
        ({"train": {"entropy_weight": math.inf}}, "train.entropy_weight=inf is not a finite number", ""),
        ({"train": {"entropy_weight": "nan"}}, "train.entropy_weight=nan is not a finite number", ""),
        ({"train": {"seed": -1}}, "train.seed=-1 is negative", "0 or more"),
        ({"train": {"minutes": -1}}, "train.minutes=-1.0 is negative", "0 or more"),
        ({"train": {"weight_decay": -0.1}}, "train.weight_decay=-0.1 is negative", ""),
        ({"train": {"clip": -1.0}}, "train.clip=-1.0 is negative", ""),
        ({"train": {"steps": 0}}, "train.steps=0 and train.minutes=0 train nothing", "one of the two"),
        ({"train": {"seq_len": 1}}, "train.seq_len=1 is too short", "2"),
        ({"train": {"beta1": 1.0}}, "train.beta1=1.0 is outside [0, 1)", ""),
        ({"train": {"dtype": "float16"}}, "train.dtype='float16' is not known", "use float32 or bfloat16"),
        ({"train": {"recompute": "all"}}, "train.recompute='all' is not known", "use none, loop, layer or auto"),
        ({"train": {"precision": "fp16"}}, "train.precision='fp16' is not known", "use fp32, bf16 or auto"),
        ({"train": {"min_lr_ratio": 1.1}}, "train.min_lr_ratio=1.1 is outside [0, 1]", ""),
        ({"data": {"val_fraction": 0}}, "data.val_fraction=0.0 is outside (0, 1)", "0.1"),
        ({"data": {"val_fraction": 1}}, "data.val_fraction=1.0 is outside (0, 1)", "0.1"),
        ({"data": {"vocab_size": 256}}, "data.vocab_size=256 is too small", "257"),
        ({"data": {"vocab_size": -1}}, "data.vocab_size=-1 is too small", "257"),
        ({"data": {"errors": "loud"}}, "data.errors='loud' is not known", "strict"),
        ({"init": {"scheme": "xavier"}}, "init.scheme='xavier' is not known", "damped or ouro"),
        ({"init": {"weight_std": 0}}, "init.weight_std=0.0 is not positive", ""),
    ],
)
def test_an_impossible_value_is_refused(layer: dict[str, Any], message: str, hint: str) -> None:
    refused(message, hint, layer)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model lacks .*num_hidden_layers.*head_dim"):
        build(ModelConfig, {"vocab_size": 3, "hidden_size": 4}, "model")


# ---- what is understood


@pytest.mark.parametrize("text", ["3e-4", 3e-4, "0.0003"])
def test_what_yaml_reads_as_text_becomes_the_float_the_field_says(text: Any) -> None:
    assert run_config("nano", {"train": {"learning_rate": text}}).train.learning_rate == 3e-4


def test_whole_numbers_become_floats_and_numbers_become_text_where_the_field_says_so() -> None:
    config = run_config("nano", {"train": {"clip": 2, "prior": 1}, "data": {"corpus": "a.txt"}})
    assert (config.train.clip, type(config.train.clip)) == (2.0, float)
    assert config.train.prior == "1"
    assert config.data.corpus == ("a.txt",)


def test_how_products_and_backward_run_is_left_to_the_machine_unless_it_is_said() -> None:
    train = run_config("tiny").train
    assert (train.recompute, train.precision, train.kernels) == ("auto", "auto", "")
    assert run_config("nano").train.precision == "fp32"
    assert run_config("nano", {"data": {"corpus": "builtin:hops"}}).train.precision == "auto"
    given = parse_settings(["train.recompute=none", "train.precision=fp32", "train.kernels=blas"])
    train = run_config("nano", given).train
    assert (train.recompute, train.precision, train.kernels) == ("none", "fp32", "blas")


def test_set_reads_yaml_values() -> None:
    assert parse_settings(
        ["train.steps=10", "train.learning_rate=3e-3", "data.corpus=[a, b]", "data.tokenizer=a=b.c", "train.steps=11"]
    ) == {
        "train": {"steps": 11, "learning_rate": "3e-3"},
        "data": {"corpus": ["a", "b"], "tokenizer": "a=b.c"},
    }


@pytest.mark.parametrize(
    "wrong", ["train.steps", "steps=3", "=3", "", "train.=3", "train.steps=[", "train.prior=9999-99-99"]
)
def test_a_set_that_is_no_setting_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="--set") as caught:
        parse_settings([wrong])
    assert repr(wrong) in str(caught.value)
    assert caught.value.hint


def test_a_value_that_looks_like_a_section_alone_is_refused_later() -> None:
    refused("'' is not a section", "known", parse_settings([".steps=3"]))


def test_later_layers_win_over_the_preset() -> None:
    base = run_config("tiny")
    assert base.train.batch_size == PRESETS["tiny"]["train"]["batch_size"]
    changed = run_config("tiny", {"train": {"batch_size": 3, "steps": 7}}, {"train": {"steps": 9}})
    assert (changed.train.batch_size, changed.train.steps) == (3, 9)
    assert changed.train.learning_rate == base.train.learning_rate
    assert changed.model == base.model


def test_a_task_brings_settings_above_the_preset_and_below_all_else() -> None:
    task = {"data": {"corpus": "builtin:hops"}}
    found = run_config("tiny", task, {"train": {"steps": 5}}).train
    assert (found.seq_len, found.beta2, found.entropy_weight, found.steps) == (64, 0.98, 0.5, 5)
    assert found.learning_rate == 3e-3
    assert run_config("tiny", {"train": {"seq_len": 32}}, task).train.seq_len == 32
    assert run_config("nano", task, {"model": {"max_position_embeddings": 64}}).model["max_position_embeddings"] == 64


@pytest.mark.parametrize("preset", PRESETS)
def test_the_published_initialisation_stands_for_its_values_unless_they_are_given(preset: str) -> None:
    assert run_config(preset, {"init": {"scheme": "ouro"}}).init == InitConfig(
        scheme="ouro", post_norm=1.0, embedding_std=0.02, weight_std=0.02
    )
    assert run_config(preset, {"init": {"scheme": "ouro", "post_norm": 0.3}}).init.post_norm == 0.3


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole(preset: str) -> None:
    config = run_config(preset)
    model = config.model_config(vocab_size=500)
    assert model.num_key_value_heads == model.num_attention_heads
    assert model.head_dim * model.num_attention_heads == model.hidden_size
    assert model.total_ut_steps == 4
    assert (model.hidden_size, model.num_hidden_layers, model.num_attention_heads, model.intermediate_size) == {
        "nano": (128, 2, 4, 352),
        "tiny": (128, 4, 4, 352),
        "small": (256, 6, 8, 704),
        "medium": (512, 8, 8, 1408),
    }[preset]


def test_the_context_grows_with_the_windows() -> None:
    assert run_config("nano").model_config(vocab_size=300).max_position_embeddings == 1024
    assert run_config("nano", {"train": {"seq_len": 2000}}).model_config(vocab_size=300).max_position_embeddings == 2000


# ---- YAML


def test_yaml_round_trip(tmp_path: pathlib.Path) -> None:
    config = run_config(
        "small",
        {
            "model": {"hidden_size": 64, "total_ut_steps": 2, "tie_word_embeddings": True, "rope_theta": "1e6"},
            "init": {"scheme": "ouro", "weight_std": 0.1},
            "data": {"corpus": ["ä.txt", "builtin:python-topics"], "errors": "replace"},
            "train": {
                **{"learning_rate": 1e-5, "prior": "0.5,0.5", "seed": 2**70, "minutes": 0.25},
                **{"recompute": "none", "precision": "bf16", "kernels": "some-path"},
            },
        },
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(path) == config
    assert to_yaml(from_yaml(path)) == to_yaml(config)


def test_every_setting_is_in_the_yaml(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(run_config("nano")), encoding="utf-8")
    values = load_yaml(path)
    assert set(values) == {field.name for field in dataclasses.fields(RunConfig)}
    for name, cls in (("init", InitConfig), ("data", DataConfig), ("train", TrainConfig)):
        assert set(values[name]) == {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read settings"),
        (b"\xff\xfe", "cannot read settings"),
        (b"train: [", "is not YAML"),
        (b"when: 2026-13-01", "is not YAML"),
        (b"[" * 5000, "is not YAML"),
        (b"a: b: c", "is not YAML"),
        (b"- train", "holds list, not sections"),
        (b"", "holds NoneType, not sections"),
        (b"!!python/object:os.system {}", "is not YAML"),
    ],
)
def test_a_file_that_is_no_settings_file_is_refused(
    content: bytes | None, message: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value) + caught.value.hint


# ---- config.json


def test_config_json_round_trip() -> None:
    config = model_config_from_json(JSON, "config.json")
    assert (config.num_key_value_heads, config.head_dim, config.total_ut_steps) == (2, 8, 3)
    assert model_config_from_json(model_config_to_json(config), "config.json") == config


def test_absent_or_null_sizes_follow_from_the_others() -> None:
    values = {**JSON, "head_dim": None, "num_key_value_heads": None, "rms_norm_eps": 1, "bos_token_id": [5, 6]}
    config = model_config_from_json(values, "config.json")
    assert (config.head_dim, config.num_key_value_heads, config.bos_token_id) == (6, 4, 5)
    assert type(config.rms_norm_eps) is float


def test_both_spellings_of_the_rotary_base_are_understood() -> None:
    without = {key: value for key, value in JSON.items() if key != "rope_theta"}
    nested = {**without, "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}
    assert model_config_from_json(nested, "config.json").rope_theta == 5.0
    assert model_config_from_json({**nested, "rope_theta": 5.0}, "config.json").rope_theta == 5.0
    for wrong, message in (
        (without, "has neither rope_theta"),
        ({**nested, "rope_theta": 6.0}, "rope_theta=6.0 contradicts"),
        ({**without, "rope_parameters": {"rope_theta": 5.0, "rope_type": "yarn"}}, "rope_type='yarn' is not supported"),
    ):
        with pytest.raises(ConfigError, match=message):
            model_config_from_json(wrong, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"architectures": ["LlamaForCausalLM"]}, "'LlamaForCausalLM'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "24"}, "hidden_size='24' is str, expected int"),
        ({"hidden_size": 24.0}, "hidden_size=24.0 is float, expected int"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 is int, expected bool"),
        ({"hidden_size": 22, "head_dim": None}, "hidden_size=22 is not divisible by num_attention_heads=4"),
        ({"num_attention_heads": 0, "num_key_value_heads": None}, "num_attention_heads=0 is not a positive number"),
        ({"num_attention_heads": "4", "head_dim": None}, "num_attention_heads='4' is str"),
        ({"total_ut_steps": 0}, "total_ut_steps=0 is not a positive number"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling="),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan is not a positive number"),
        ({"rope_theta": math.inf}, "rope_theta=inf is not a positive number"),
        ({"architectures": "OuroForCausalLMx"}, "is not a LoopLM"),
        ({"architectures": 3}, "is not a LoopLM"),
    ],
)
def test_another_model_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_config_from_json({**JSON, **change}, "some/config.json")
    assert message in str(caught.value)
    assert caught.value.hint


def test_head_dim_is_a_division() -> None:
    assert head_dim_of(24, 3) == 8
