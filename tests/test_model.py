"""The engine as a whole: forward, padding, threads, chunks, and the gradient against central differences.

Slopes are those of the float64 reference's objective: float32 has too few digits for differences.
"""

import functools
from typing import Any

import numpy as np
import pytest

from looplm import model
from looplm.arrays import Floats, Ints
from looplm.config import ModelConfig, model_config_from_json
from looplm.model import GradientReport, GradientWorkspace, Trace, forward, gradient
from looplm.objectives import StageOne, log_prior
from looplm.weights import Weights
from looplm_reference.judge import MODELS, random_tensors
from looplm_reference.model import LoopLM

ENTROPY_WEIGHT = 0.3
NAMES = tuple(MODELS)
BATCH, LENGTH = 3, 7
GATE = ("model.early_exit_gate.weight", "model.early_exit_gate.bias")


@functools.cache
def weights_of(name: str) -> Weights:
    config = model_config_from_json(MODELS[name], name)
    return Weights.from_tensors(config, random_tensors(MODELS[name], seed=3)).copy()


def batch_of(config: ModelConfig, batch: int = BATCH, length: int = LENGTH) -> tuple[Ints, Ints]:
    rng = np.random.default_rng(8)
    ids = rng.integers(0, config.vocab_size, (batch, length))
    return ids, np.where(rng.random((batch, length)) < 0.3, -1, rng.integers(0, config.vocab_size, (batch, length)))


def run_gradient(
    weights: Weights, ids: Ints, target: Ints, start: Ints | None = None, threads: int = 1, prior: str = "uniform"
) -> tuple[GradientReport, Weights]:
    workspace = GradientWorkspace(weights.config, *ids.shape, threads)
    objective = StageOne(ENTROPY_WEIGHT, log_prior(prior, weights.config.total_ut_steps))
    for part in workspace.gradients:
        part.contiguous()[:] = np.nan  # what a step before has left must not matter
    return gradient(weights, workspace, ids, target, objective, start), workspace.total


def close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Relative to the largest: single entries may cancel to nearly nothing."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


# ---- forward


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_the_reference(name: str) -> None:
    weights = weights_of(name)
    ids, _ = batch_of(weights.config)
    trace, wanted = forward(weights, ids), LoopLM(weights.tensors, MODELS[name]).forward(ids)
    close(trace.hidden, wanted["hidden"])
    close(trace.gate_logit, wanted["gate_logit"])
    close(trace.exit_prob, wanted["exit_prob"])
    close(np.stack([trace.logits(r) for r in range(weights.config.total_ut_steps)]), wanted["logits"])


def test_fewer_and_more_loops_are_the_same_stack_applied_fewer_or_more_times() -> None:
    weights = weights_of("grouped")
    ids, _ = batch_of(weights.config)
    own, fewer, more = (forward(weights, ids, loops=loops).hidden for loops in (None, 2, 5))
    assert (len(own), len(fewer), len(more)) == (3, 2, 5)
    np.testing.assert_array_equal(own[:2], fewer)
    np.testing.assert_array_equal(more[:3], own)
    assert not np.array_equal(more[3], more[2])


def test_no_position_sees_what_follows() -> None:
    weights = weights_of("grouped")
    ids, _ = batch_of(weights.config)
    changed = ids.copy()
    changed[:, 4] = (changed[:, 4] + 1) % weights.config.vocab_size
    before, after = forward(weights, ids).hidden, forward(weights, changed).hidden
    np.testing.assert_array_equal(before[:, :, :4], after[:, :, :4])
    assert (before[:, :, 4:] != after[:, :, 4:]).any(-1).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_forward_is_reproducible(threads: int) -> None:
    weights = weights_of("grouped")
    ids, _ = batch_of(weights.config, 5, 11)
    first, again = (forward(weights, ids, threads=threads) for _ in range(2))
    np.testing.assert_array_equal(first.hidden, again.hidden)
    np.testing.assert_array_equal(first.gate_logit, again.gate_logit)


def test_two_threads_agree_with_one() -> None:
    weights = weights_of("grouped")
    ids, _ = batch_of(weights.config, 5, 11)
    close(forward(weights, ids, threads=2).hidden, forward(weights, ids).hidden, 1e-6)
    close(forward(weights, ids[:1], threads=2).hidden, forward(weights, ids[:1]).hidden, 1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_different_length_give_what_single_rows_give(threads: int) -> None:
    weights = weights_of("grouped")
    ids, _ = batch_of(weights.config)
    lengths = (7, 4, 1)
    start = LENGTH - np.array(lengths)
    left = forward(weights, ids, start=start, threads=threads)
    right = forward(weights, ids, threads=threads)
    for row, length in enumerate(lengths):
        alone = forward(weights, ids[row : row + 1, -length:])
        close(left.hidden[:, row, -length:], alone.hidden[:, 0])
        close(left.gate_logit[:, row, -length:], alone.gate_logit[:, 0])
        close(right.hidden[:, row, :length], forward(weights, ids[row : row + 1, :length]).hidden[:, 0])


def test_what_stands_before_a_rows_start_does_not_matter() -> None:
    weights = weights_of("grouped")
    ids, _ = batch_of(weights.config)
    start, other = np.array([3, 0, 5]), ids.copy()
    other[np.arange(LENGTH) < start[:, None]] = 0
    first, second = (forward(weights, x, start=start).hidden for x in (ids, other))
    for row, begin in enumerate(start):
        np.testing.assert_array_equal(first[:, row, begin:], second[:, row, begin:])


def test_taps_change_nothing_and_come_in_order() -> None:
    weights = weights_of("tied")
    ids, _ = batch_of(weights.config)
    taps: model.Taps = []
    tapped, plain = forward(weights, ids, taps=taps, threads=2), forward(weights, ids)
    np.testing.assert_array_equal(tapped.hidden, plain.hidden)
    per_layer = ["x", "q", "k", "v", "attention", "attention_out", "mid", "gate", "up", "mlp_out"]
    expected = []
    for r in (1, 2, 3, 4):
        expected += [f"loop{r}.layer1.{each}" for each in per_layer] + [f"loop{r}.hidden", f"loop{r}.gate_logit"]
    assert [name for name, _ in taps] == expected
    np.testing.assert_array_equal(dict(taps)["loop3.hidden"], plain.hidden[2])
    np.testing.assert_array_equal(dict(taps)["loop3.layer1.x"].reshape(plain.hidden[1].shape), plain.hidden[1])


# ---- what a trace tells


def test_the_exit_law() -> None:
    weights = weights_of("grouped")
    trace = forward(weights, batch_of(weights.config)[0])
    stop = 1.0 / (1.0 + np.exp(-trace.gate_logit.astype(np.float64)))
    close(trace.hazard, stop)
    wanted = np.stack([stop[0], (1 - stop[0]) * stop[1], (1 - stop[0]) * (1 - stop[1])])
    close(trace.exit_prob, wanted)
    close(trace.exit_cdf, wanted.cumsum(0))
    assert (trace.exit_cdf[-1] == 1.0).all()
    for q in (0.0, 0.4, 0.8):
        np.testing.assert_array_equal(trace.exit_index(q), (wanted.cumsum(0) >= q).argmax(0))
    assert (trace.exit_index(1.0) == 2).all()


def test_saturated_gates_are_exact() -> None:
    weights = weights_of("grouped").copy()
    ids, _ = batch_of(weights.config)
    for bias, index in ((200.0, 0), (-200.0, 2)):
        weights.gate_bias[:] = bias
        trace = forward(weights, ids)
        assert (trace.exit_prob[index] == 1.0).all()
        assert trace.exit_prob.sum() == BATCH * LENGTH
        assert (trace.hazard == (bias > 0)).all()
        report, total = run_gradient(weights, *batch_of(weights.config))
        assert np.isfinite(report.objective)
        assert np.isfinite(total.contiguous()).all()


def log_softmax_loss(trace: Trace, target: Ints) -> Floats:
    """The loss written out in float64, and nothing in chunks."""
    logits = trace.hidden.astype(np.float64) @ trace.weights.head.astype(np.float64).T
    log_prob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_prob, np.maximum(target, 0)[None, ..., None], axis=-1)[..., 0]
    return np.where(target >= 0, -picked, 0.0)


@pytest.mark.parametrize("chunk", [1, 37 * 4, 37 * 21, 1 << 19])
def test_losses_do_not_depend_on_the_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of("grouped")
    ids, target = batch_of(weights.config)
    trace = forward(weights, ids)
    monkeypatch.setattr(model, "LOGIT_CHUNK", chunk)
    seen = np.zeros((3, BATCH * LENGTH), int)

    def visit(r: int, rows: slice, logits: Floats) -> None:
        assert logits.size <= max(chunk, 37)
        close(logits, trace.logits(r).reshape(-1, 37)[rows])
        seen[r, rows] += 1

    found = trace.token_loss(target, visit)
    close(found, log_softmax_loss(trace, target))
    assert (seen == 1).all()
    assert (found[:, target < 0] == 0.0).all()
    assert (found[:, target >= 0] > 0.0).all()


# ---- gradient


def check_slopes(name: str, start: Ints | None = None, prior: str = "uniform") -> None:
    """Each tensor's gradient along a random direction is the slope of the reference's objective along it."""
    weights, config = weights_of(name), MODELS[name]
    ids, target = batch_of(weights.config)
    if start is not None:
        target = np.where(np.arange(LENGTH) < start[:, None], -1, target)
    report, total = run_gradient(weights, ids, target, start, prior=prior)
    reference, rng, h = LoopLM(weights.tensors, config), np.random.default_rng(4), 1e-5
    log_prior_wide = log_prior(prior, config["total_ut_steps"]).astype(np.float64)

    def objective() -> float:
        return reference.stage1(ids, target, ENTROPY_WEIGHT, log_prior_wide, start)["objective"]

    assert report.objective / report.tokens == pytest.approx(objective(), rel=1e-5)
    for tensor, found in total.tensors.items():
        direction, before = rng.standard_normal(found.shape), reference.weight[tensor]
        values = []
        for sign in (1.0, -1.0):
            reference.weight[tensor] = before + sign * h * direction
            values.append(objective())
        reference.weight[tensor] = before
        scale = np.sqrt(np.square(found.astype(np.float64) * direction).sum())
        slope = (values[0] - values[1]) / (2.0 * h)
        assert slope == pytest.approx(float((found * direction).sum()), abs=2e-5 * scale), tensor
        assert scale > 0.0 or (tensor in GATE and config["total_ut_steps"] == 1), tensor


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_slope(name: str) -> None:
    """Grouped key/value heads, tied embeddings with an odd number of heads, and a single loop."""
    check_slopes(name)


def test_the_gradient_is_the_slope_under_left_padding_and_a_prior() -> None:
    check_slopes("grouped", np.array([3, 0, 5]), "geometric:0.4")


def test_one_loop_leaves_the_gate_alone() -> None:
    weights = weights_of("one loop")
    report, total = run_gradient(weights, *batch_of(weights.config))
    assert not any(total.tensors[name].any() for name in GATE)
    assert report.exit_prob[0] == pytest.approx(report.tokens)
    assert report.objective == pytest.approx(float(report.loss[0]), rel=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_gradient_is_reproducible(threads: int) -> None:
    weights = weights_of("grouped")
    ids, target = batch_of(weights.config, 5, 11)
    first, second = (run_gradient(weights, ids, target, threads=threads) for _ in range(2))
    np.testing.assert_array_equal(first[1].contiguous(), second[1].contiguous())
    np.testing.assert_array_equal(first[0].loss, second[0].loss)
    assert first[0].objective == second[0].objective


def test_the_gradient_of_two_threads_agrees_with_that_of_one() -> None:
    weights = weights_of("grouped")
    ids, target = batch_of(weights.config, 5, 11)
    (one, first), (two, second) = (run_gradient(weights, ids, target, threads=threads) for threads in (1, 2))
    assert one.tokens == two.tokens == (target >= 0).sum()
    close(two.loss, one.loss)
    close(two.exit_prob, one.exit_prob)
    for name in first.tensors:
        close(second.tensors[name], first.tensors[name])


def test_the_gradient_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of("tied")
    ids, target = batch_of(weights.config)
    whole_report, whole = run_gradient(weights, ids, target)
    monkeypatch.setattr(model, "LOGIT_CHUNK", 31 * 4)
    report, total = run_gradient(weights, ids, target)
    close(report.loss, whole_report.loss)
    for name in whole.tensors:
        close(total.tensors[name], whole.tensors[name])


def test_reports_are_sums_over_counted_positions() -> None:
    weights = weights_of("grouped")
    ids, target = batch_of(weights.config)
    report, _ = run_gradient(weights, ids, target)
    trace = forward(weights, ids)
    assert report.tokens == (target >= 0).sum() < target.size
    close(report.loss, trace.token_loss(target).sum((1, 2)))
    close(report.exit_prob, trace.exit_prob[:, target >= 0].sum(1))


def test_targets_of_minus_one_are_as_if_they_were_not_there() -> None:
    weights = weights_of("grouped")
    ids, target = batch_of(weights.config)
    target[1:] = -1
    report, total = run_gradient(weights, ids, target)
    alone_report, alone = run_gradient(weights, ids[:1], target[:1])
    assert report.tokens == alone_report.tokens
    for name in alone.tensors:
        close(total.tensors[name], alone.tensors[name])
    nothing, empty = run_gradient(weights, ids, np.full_like(target, -1))
    assert (nothing.tokens, nothing.objective) == (0, 0.0)
    assert not empty.contiguous().any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_gradient_of_a_padded_batch_is_that_of_its_rows(side: str) -> None:
    weights = weights_of("grouped")
    ids, target = batch_of(weights.config)
    lengths = np.array([7, 4, 2])
    place = np.arange(LENGTH)
    inside = place >= (LENGTH - lengths)[:, None] if side == "left" else place < lengths[:, None]
    target = np.where(inside, np.maximum(target, 0), -1)
    _, total = run_gradient(weights, ids, target, LENGTH - lengths if side == "left" else None)
    expected = {name: np.zeros(tensor.shape) for name, tensor in total.tensors.items()}
    for row, length in enumerate(lengths):
        part = slice(LENGTH - length, None) if side == "left" else slice(None, length)
        _, alone = run_gradient(weights, ids[row : row + 1, part], target[row : row + 1, part])
        for name in expected:
            expected[name] += alone.tensors[name] * (length / lengths.sum())
    for name in expected:
        close(total.tensors[name], expected[name])
