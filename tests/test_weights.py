"""Parameters: one flat buffer, its names, and how it starts."""

import dataclasses

import numpy as np
import pytest

from looplm.config import ModelConfig
from looplm.settings import InitConfig
from looplm.weights import Weights, initialise, joined, parameter_count, parameter_table

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
LAYER_NORMS_2 = ("input_layernorm_2", "post_attention_layernorm_2")


def numbered(config: ModelConfig = CONFIG) -> Weights:
    """Every weight its own number."""
    weights = Weights.zeros(config)
    weights.contiguous()[:] = np.arange(weights.contiguous().size)
    return weights


# ---- the table


@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_the_table_covers_the_buffer_without_gap_or_overlap(config: ModelConfig) -> None:
    table, end = parameter_table(config), 0
    for parameter in table:
        assert parameter.offset == end, parameter.name
        end += parameter.size
    assert end == parameter_count(config)
    assert len({parameter.name for parameter in table}) == len(table)


def test_names_and_shapes_are_those_of_the_published_checkpoints() -> None:
    shapes = {parameter.name: parameter.shape for parameter in parameter_table(CONFIG)}
    per_layer = {
        "input_layernorm.weight": (12,), "input_layernorm_2.weight": (12,), "post_attention_layernorm.weight": (12,),
        "post_attention_layernorm_2.weight": (12,), "self_attn.q_proj.weight": (24, 12),
        "self_attn.k_proj.weight": (12, 12), "self_attn.v_proj.weight": (12, 12), "self_attn.o_proj.weight": (12, 24),
        "mlp.gate_proj.weight": (20, 12), "mlp.up_proj.weight": (20, 12), "mlp.down_proj.weight": (12, 20),
    }  # fmt: skip
    expected: dict[str, tuple[int, ...]] = {f"model.layers.{i}.{k}": v for i in (0, 1) for k, v in per_layer.items()}
    expected |= {"model.embed_tokens.weight": (50, 12), "model.norm.weight": (12,), "lm_head.weight": (50, 12)}
    expected |= {"model.early_exit_gate.weight": (1, 12), "model.early_exit_gate.bias": (1,)}
    assert shapes == expected
    assert {p.name for p in parameter_table(TIED)} == expected.keys() - {"lm_head.weight"}


def test_loops_add_no_parameter_and_a_tied_head_none_either() -> None:
    assert parameter_count(dataclasses.replace(CONFIG, total_ut_steps=9)) == parameter_count(CONFIG)
    assert parameter_count(CONFIG) - parameter_count(TIED) == 50 * 12


def test_only_matrices_decay() -> None:
    assert {p.name.removesuffix(".weight").split(".")[-1] for p in parameter_table(CONFIG) if p.decays} == {
        *("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
    }


# ---- views


def test_tensors_are_views_of_the_buffer_in_the_tables_order() -> None:
    weights = numbered()
    laid = np.concatenate([weights.tensors[p.name].reshape(-1) for p in parameter_table(CONFIG)])
    np.testing.assert_array_equal(laid, weights.contiguous())
    for name, tensor in weights.tensors.items():
        assert np.shares_memory(tensor, weights.contiguous()), name


def test_groups_that_lie_side_by_side_are_views() -> None:
    weights, at = numbered(), "model.layers.1"
    layer = weights.layers[1]
    for group, names in (
        (layer.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        (layer.gate_up, ("mlp.gate_proj", "mlp.up_proj")),
    ):
        parts = [weights.tensors[f"{at}.{name}.weight"] for name in names]
        np.testing.assert_array_equal(group, np.concatenate(parts))
        assert all(np.shares_memory(group, part) for part in parts)
        group[-1, -1] = -5.0
        assert parts[-1][-1, -1] == -5.0


def test_norms_stand_where_the_sandwich_has_them() -> None:
    weights, at = numbered(), "model.layers.0"
    order = ("input_layernorm", *LAYER_NORMS_2[:1], "post_attention_layernorm", *LAYER_NORMS_2[1:])
    layer = weights.layers[0]
    for norm, name in zip((layer.norm_1, layer.norm_2, layer.norm_3, layer.norm_4), order, strict=True):
        np.testing.assert_array_equal(norm, weights.tensors[f"{at}.{name}.weight"])


def test_a_tied_head_is_the_embedding() -> None:
    for config, same in ((TIED, True), (CONFIG, False)):
        weights = numbered(config)
        assert np.shares_memory(weights.head, weights.embedding) == same


def test_foreign_tensors_are_used_as_they_are_and_only_groups_are_copied() -> None:
    rng = np.random.default_rng(1)
    tensors = {p.name: rng.standard_normal(p.shape).astype(np.float32) for p in parameter_table(CONFIG)}
    weights = Weights.from_tensors(CONFIG, tensors)
    assert all(weights.tensors[name] is tensor for name, tensor in tensors.items())
    qkv = [tensors[f"model.layers.0.self_attn.{letter}_proj.weight"] for letter in "qkv"]
    np.testing.assert_array_equal(weights.layers[0].qkv, np.concatenate(qkv))
    with pytest.raises(ValueError, match="copy"):
        weights.contiguous()
    copy = weights.copy()
    assert copy.contiguous().size == parameter_count(CONFIG)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(copy.tensors[name], tensor)
        assert not np.shares_memory(copy.tensors[name], tensor)


def test_neighbours_in_another_order_are_not_taken_for_a_group() -> None:
    base = np.arange(12, dtype=np.float32).reshape(6, 2)
    first, second = base[:2], base[2:]
    assert np.shares_memory(joined([first, second]), base)
    for parts in ([second, first], [first, base[3:]], [base[:2, :1], base[2:, :1]], [first, second.copy()]):
        np.testing.assert_array_equal(joined(parts), np.concatenate(parts))
        assert not np.shares_memory(joined(parts), base)
    memory = memoryview(bytearray(16))  # neighbours by accident: nothing keeps the second alive
    strangers = [np.frombuffer(memory[part], np.float32) for part in (slice(0, 8), slice(8, 16))]
    assert not np.shares_memory(joined(strangers), strangers[0])


def test_a_read_only_buffer_stays_read_only() -> None:
    flat = numbered().contiguous()
    flat.flags.writeable = False
    weights = Weights.from_flat(CONFIG, flat)
    assert not weights.layers[0].qkv.flags.writeable
    assert not weights.tensors["model.norm.weight"].flags.writeable
    assert weights.copy().contiguous().flags.writeable


# ---- initial values


def test_the_damped_start() -> None:
    config = dataclasses.replace(CONFIG, hidden_size=48, vocab_size=400)
    init = InitConfig(post_norm=0.3, embedding_std=0.7, weight_std=0.05)
    weights = initialise(config, init, seed=4)
    for name, tensor in weights.tensors.items():
        if name.endswith("early_exit_gate.bias"):
            assert not tensor.any()
        elif any(norm in name for norm in LAYER_NORMS_2):
            np.testing.assert_array_equal(tensor, np.float32(0.3), name)
        elif "norm" in name:
            np.testing.assert_array_equal(tensor, np.float32(1.0), name)
        else:
            std = 0.7 if "embed" in name else 0.05
            assert tensor.std() == pytest.approx(std, rel=5.0 / np.sqrt(2 * tensor.size)), name
            assert abs(tensor.mean()) < 5.0 * std / np.sqrt(tensor.size), name


def test_a_seed_is_one_start() -> None:
    first, again, other = (initialise(CONFIG, InitConfig(), seed).contiguous() for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_no_two_tensors_start_alike() -> None:
    weights = initialise(CONFIG, InitConfig(), 1)
    starts = {tuple(tensor.reshape(-1)[:3]) for name, tensor in weights.tensors.items() if tensor.std() > 0.0}
    assert len(starts) == sum(tensor.std() > 0.0 for tensor in weights.tensors.values())
