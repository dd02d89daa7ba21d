"""The reference model: gradients by central differences, and the checks that any LoopLM must pass."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from looplm_reference import ops
from looplm_reference.model import LoopLM

IDS = np.random.default_rng(5).integers(0, 11, (2, 5))
TARGET = np.where(np.arange(10).reshape(2, 5) % 4 == 0, -1, np.random.default_rng(6).integers(0, 11, (2, 5)))
GATE = ("model.early_exit_gate.weight", "model.early_exit_gate.bias")


def tiny(loops: int = 3, tied: bool = False) -> LoopLM:
    """D 8, H 4, G 2, K 6, F 10, L 2, V 11, with norms far from 1 and an eps that matters."""
    rng = np.random.default_rng(7)
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (rows * 6, 8) for name, rows in (("q", 4), ("k", 2), ("v", 2))}
        shapes |= {f"{at}.self_attn.o_proj.weight": (8, 24), f"{at}.mlp.down_proj.weight": (8, 10)}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (10, 8) for name in ("gate", "up")}
        norms = ("input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2")
        shapes |= {f"{at}.{name}.weight": (8,) for name in norms}
    shapes |= {GATE[0]: (1, 8), GATE[1]: (1,)} | ({} if tied else {"lm_head.weight": (11, 8)})
    tensors = {
        name: rng.uniform(0.4, 1.6, shape) if "norm" in name else rng.normal(0.0, 0.5, shape)
        for name, shape in shapes.items()
    }
    config = {
        "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 11, "total_ut_steps": loops, "rms_norm_eps": 0.01,
        "rope_theta": 100.0, "tie_word_embeddings": tied,
    }  # fmt: skip
    return LoopLM(tensors, config)


def slope(model: LoopLM, name: str, objective: Callable[[], float], direction: np.ndarray, h: float = 2e-6) -> float:
    """Central difference of the objective as one tensor moves along a direction."""
    before, values = model.weight[name], []
    for sign in (1.0, -1.0):
        model.weight[name] = before + sign * h * direction
        values.append(objective())
    model.weight[name] = before
    return (values[0] - values[1]) / (2.0 * h)


def check_gradients(model: LoopLM, objective: Callable[[], dict[str, Any]], names: tuple[str, ...]) -> None:
    grads, rng = objective()["grads"], np.random.default_rng(8)
    for name in names:
        direction = rng.standard_normal(grads[name].shape)
        numeric = slope(model, name, lambda: objective()["objective"], direction)
        scale = np.sqrt(np.square(grads[name] * direction).sum())
        assert scale > 0.0, name
        assert numeric == pytest.approx(float((grads[name] * direction).sum()), abs=1e-6 * scale), name


# ---- gradients


@pytest.mark.parametrize("tied", [False, True])
def test_stage1_gradient_of_every_tensor(tied: bool) -> None:
    model = tiny(tied=tied)
    check_gradients(model, lambda: model.stage1(IDS, TARGET, 0.3), tuple(model.weight))


def test_stage1_gradient_with_a_prior_and_left_padding() -> None:
    model, prior, start = tiny(), np.log([0.2, 0.3, 0.5]), np.array([2, 0])
    target = np.where(np.arange(5) < start[:, None], -1, TARGET)
    check_gradients(model, lambda: model.stage1(IDS, target, 0.3, prior, start), tuple(model.weight))


def test_one_loop_gives_the_gate_no_gradient() -> None:
    grads = tiny(loops=1).stage1(IDS, TARGET, 0.3)["grads"]
    assert not any(grads[name].any() for name in GATE)
    assert all(grads[name].any() for name in grads if name not in GATE)


@pytest.mark.parametrize("kind", ["paper", "look-ahead"])
def test_stage2_gradient_of_the_gate_alone(kind: str) -> None:
    model = tiny()
    assert set(model.stage2(IDS, TARGET, target_kind=kind)["grads"]) == set(GATE)
    check_gradients(model, lambda: model.stage2(IDS, TARGET, target_kind=kind), GATE)


def test_targets_of_minus_one_are_neither_counted_nor_divided_by() -> None:
    model, one = tiny(), np.full((2, 5), -1)
    one[1, 2] = TARGET[1, 2]
    found = model.stage1(IDS, one, 0.3)
    alone = model.stage1(IDS[1:, :3], one[1:, :3], 0.3)
    assert found["objective"] == pytest.approx(alone["objective"])
    assert np.count_nonzero(found["loss"]) == model.loops
    for name, gradient in found["grads"].items():
        assert gradient == pytest.approx(alone["grads"][name], abs=1e-12), name


# ---- the loop


def test_two_loops_are_two_calls_of_layers_and_norm_by_hand() -> None:
    model, found = tiny(loops=2), tiny(loops=2).forward(IDS)
    place, h = model.place(IDS, None), model.weight["model.embed_tokens.weight"][IDS]
    for r in range(2):
        for layer in range(2):
            h, _ = model.layer_forward(r, layer, h, place, None)
        h, _ = ops.rmsnorm_forward(h, model.weight["model.norm.weight"], 0.01)
        assert found["hidden"][r] == pytest.approx(h, abs=1e-13)
        assert found["logits"][r] == pytest.approx(h @ model.weight["lm_head.weight"].T, abs=1e-13)


def test_one_layer_is_the_sandwich_written_out() -> None:
    model, w = tiny(), tiny().weight
    x = np.random.default_rng(9).normal(size=(2, 5, 8))

    def norm(value: np.ndarray, name: str) -> np.ndarray:
        return value / np.sqrt((value**2).mean(-1, keepdims=True) + 0.01) * w[f"model.layers.1.{name}.weight"]

    def times(value: np.ndarray, name: str) -> np.ndarray:
        return value @ w[f"model.layers.1.{name}_proj.weight"].T

    normed = norm(x, "input_layernorm")
    q, k, v = (times(normed, f"self_attn.{name}").reshape(2, 5, -1, 6) for name in "qkv")
    angle = np.arange(5)[:, None] * 100.0 ** (-np.arange(3) / 3.0)
    turn = np.exp(1j * angle)[None, :, None, :]

    def rope(value: np.ndarray) -> np.ndarray:
        turned = (value[..., :3] + 1j * value[..., 3:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    q, k = rope(q), rope(k)
    attended = np.zeros((2, 5, 4, 6))
    for b, s, head in np.ndindex(2, 5, 4):
        weight = np.exp(k[b, : s + 1, head // 2] @ q[b, s, head] / np.sqrt(6.0))
        attended[b, s, head] = weight @ v[b, : s + 1, head // 2] / weight.sum()
    mid = x + norm(times(attended.reshape(2, 5, 24), "self_attn.o"), "input_layernorm_2")
    normed = norm(mid, "post_attention_layernorm")
    gate = times(normed, "mlp.gate")
    mlp = times(gate / (1.0 + np.exp(-gate)) * times(normed, "mlp.up"), "mlp.down")
    expected = mid + norm(mlp, "post_attention_layernorm_2")
    assert model.layer_forward(0, 1, x, model.place(IDS, None), None)[0] == pytest.approx(expected, abs=1e-12)


def test_fewer_or_more_loops_share_their_beginning() -> None:
    model = tiny()
    whole, short, long = (model.forward(IDS, loops=loops)["hidden"] for loops in (3, 2, 5))
    assert np.array_equal(whole[:2], short)
    assert np.array_equal(long[:3], whole)


def test_the_future_is_not_seen() -> None:
    model, changed = tiny(), IDS.copy()
    changed[:, 3:] = (changed[:, 3:] + 1) % 11
    before, after = model.forward(IDS)["hidden"], model.forward(changed)["hidden"]
    assert np.array_equal(before[:, :, :3], after[:, :, :3])
    assert not np.allclose(before[:, :, 3], after[:, :, 3])


def test_taps_come_in_forward_order() -> None:
    taps: list[tuple[str, np.ndarray]] = []
    found = tiny().forward(IDS, taps=taps)
    inner = ["x", "q", "k", "v", "attention", "attention_out", "mid", "gate", "up", "mlp_out"]
    names = []
    for r in (1, 2, 3):
        names += [f"loop{r}.layer{n}.{i}" for n in (1, 2) for i in inner]
        names += [f"loop{r}.hidden", f"loop{r}.gate_logit"]
    assert [name for name, _ in taps] == names
    arrays = dict(taps)
    assert np.array_equal(arrays["loop2.layer1.x"], found["hidden"][0])
    assert np.array_equal(arrays["loop3.gate_logit"], found["gate_logit"][2])
    shapes = {i: arrays[f"loop1.layer1.{i}"].shape for i in ("q", "k", "attention", "gate")}
    assert shapes == {"q": (2, 5, 4, 6), "k": (2, 5, 2, 6), "attention": (2, 5, 24), "gate": (2, 5, 10)}


# ---- cache and padding


@pytest.mark.parametrize("start", [None, np.array([2, 0])])
def test_one_position_at_a_time_equals_every_prefix(start: np.ndarray | None) -> None:
    model = tiny()
    cached = model.cached_hidden(IDS, start)
    for length in range(1, 6):
        whole = model.forward(IDS[:, :length], start)["hidden"]
        real = np.arange(length) >= (np.zeros(2, int) if start is None else start)[:, None]
        assert cached[:, :, :length][:, real] == pytest.approx(whole[:, real], abs=1e-12)


def test_padded_rows_equal_single_rows() -> None:
    model, single = tiny(), tiny().forward(IDS[:1, :3])
    left = np.array([[9, 9, *IDS[0, :3]], IDS[1]])
    right = np.array([[*IDS[0, :3], 9, 9], IDS[1]])
    for name in ("hidden", "logits", "gate_logit", "exit_prob"):
        assert model.forward(left, np.array([2, 0]))[name][:, 0, 2:] == pytest.approx(single[name][:, 0], abs=1e-12)
        assert model.forward(right)[name][:, 0, :3] == pytest.approx(single[name][:, 0], abs=1e-12)


def test_positions_are_counted_from_the_first_real_one() -> None:
    """States cannot show it, since rotary scores depend on distances alone; queries and keys do."""
    padded: list[tuple[str, np.ndarray]] = []
    alone: list[tuple[str, np.ndarray]] = []
    model = tiny()
    model.forward(np.array([[9, 9, *IDS[0, :3]]]), np.array([2]), taps=padded)
    model.forward(IDS[:1, :3], taps=alone)
    for (name, ours), (_, theirs) in zip(padded, alone, strict=True):
        assert ours[:, 2:] == pytest.approx(theirs, abs=1e-12), name


def test_greedy_reads_the_loop_where_the_gate_stops() -> None:
    model = tiny()
    model.weight[GATE[0]] = np.zeros((1, 8))
    model.weight[GATE[1]] = np.zeros(1)  # hazards of 1/2: the sums are 1/2, 3/4, 1
    for threshold, r in ((0.0, 0), (0.5, 0), (0.75, 1), (0.76, 2), (1.0, 2)):
        ids = IDS
        for _ in range(3):
            ids = np.concatenate([ids, model.forward(ids)["logits"][r][:, -1].argmax(-1)[:, None]], axis=1)
        assert np.array_equal(model.greedy(IDS, threshold, 3), ids)


def test_config_spellings() -> None:
    model = tiny()
    config: dict[str, Any] = {
        "total_ut_steps": 3, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_size": 24, "head_dim": None, "rms_norm_eps": 0.01, "rope_parameters": {"rope_theta": 100.0},
    }  # fmt: skip
    other = LoopLM(model.weight, config)
    assert np.array_equal(other.forward(IDS)["logits"], model.forward(IDS)["logits"])
