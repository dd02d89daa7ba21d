"""The engine's gradient: against central differences, padding, threads, chunks, and recomputation to the bit.

Slopes are those of the float64 reference's objective: float32 has too few digits for differences.
"""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from judged_models import LENGTH, batch_of, close, weights_of
from looplm import gradient as gradient_module
from looplm import model
from looplm.arrays import Ints
from looplm.gradient import GradientReport, GradientWorkspace, gradient
from looplm.layer import Activations, Placement
from looplm.memory import arrays_of
from looplm.model import Tape, forward
from looplm.objectives import StageOne, log_prior
from looplm.settings import RECOMPUTE
from looplm.weights import Weights
from looplm_reference.judge import MODELS
from looplm_reference.model import LoopLM
from random_models import CONFIG, random_weights

ENTROPY_WEIGHT = 0.3
GATE = ("model.early_exit_gate.weight", "model.early_exit_gate.bias")


def run_gradient(
    weights: Weights,
    ids: Ints,
    target: Ints,
    start: Ints | None = None,
    threads: int = 1,
    prior: str = "uniform",
    recompute: str = "none",
) -> tuple[GradientReport, Weights]:
    workspace = GradientWorkspace(weights.config, *ids.shape, threads, recompute)
    objective = StageOne(ENTROPY_WEIGHT, log_prior(prior, weights.config.total_ut_steps))
    rooms, gradients = list(workspace.rooms.values()), [part.contiguous() for part in workspace.gradients]
    for buffer in arrays_of([workspace.shards, gradients, rooms]):
        buffer[...] = np.nan  # what a step before has left must not matter
    return gradient(weights, workspace, ids, target, objective, start), workspace.total


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


@pytest.mark.parametrize("name", MODELS)
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
    monkeypatch.setattr(gradient_module, "LOGIT_CHUNK", 31 * 4)
    monkeypatch.setattr(gradient_module, "LOGIT_ROWS", 1)
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


def test_saturated_gates_leave_numbers() -> None:
    weights = weights_of("grouped").copy()
    for bias in (200.0, -200.0):
        weights.gate_bias[:] = bias
        report, total = run_gradient(weights, *batch_of(weights.config))
        assert np.isfinite(report.objective)
        assert np.isfinite(total.contiguous()).all()


# ---- recomputation


@pytest.mark.parametrize("threads", [1, 2])  # two: shards of two rows and of one
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_computed_again_is_the_same_to_the_bit(name: str, padded: bool, threads: int) -> None:
    weights = weights_of(name)
    ids, target = batch_of(weights.config)
    start = np.array([3, 0, 5]) if padded else None
    if start is not None:
        target = np.where(np.arange(LENGTH) < start[:, None], -1, target)
    (report, total), *others = (
        run_gradient(weights, ids, target, start, threads, "geometric:0.4", recompute) for recompute in RECOMPUTE
    )
    assert len(others) == 2
    for other_report, other in others:
        np.testing.assert_array_equal(total.contiguous(), other.contiguous())
        np.testing.assert_array_equal(report.loss, other_report.loss)
        assert report.objective == other_report.objective


def test_outputs_of_layers_come_back_to_the_bit() -> None:
    """Where nothing runs again they are kept for one loop only: those of earlier loops are sums of what is kept."""
    weights, layers = random_weights(), CONFIG.num_hidden_layers
    ids, _ = batch_of(CONFIG)
    place = Placement.of(CONFIG, *ids.shape, None)
    tape = Tape(CONFIG, np.empty((CONFIG.total_ut_steps, *ids.shape, CONFIG.hidden_size), np.float32), "none")
    model.embedding.gather_into(tape.embedded, ids.reshape(-1), weights.embedding)
    expected = []
    for r, after in enumerate(tape.hidden):
        model.run_layers(weights, tape, range(r * layers, (r + 1) * layers), place)
        expected += [output.copy() for output in tape.outputs]
        after[...] = tape.outputs[-1].reshape(after.shape)
    for r in reversed(range(CONFIG.total_ut_steps)):
        applications = range(r * layers, (r + 1) * layers)
        for buffer in tape.outputs:
            buffer[...] = np.nan
        model.add_up_layers(weights, tape, applications)
        for application in applications:
            np.testing.assert_array_equal(tape.output(application), expected[application])
    assert len(tape.outputs) == layers


@pytest.mark.parametrize("forgotten", ["add_up_layers", "packed_for_backward"])
def test_what_takes_turns_in_memory_must_come_back(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons above can fail: without either, the gradient is another, or there is none."""
    weights = random_weights()
    _, right = run_gradient(weights, *batch_of(CONFIG))
    if forgotten == "add_up_layers":
        monkeypatch.setattr(gradient_module, forgotten, lambda *given: None)
        _, wrong = run_gradient(weights, *batch_of(CONFIG))
        assert (wrong.contiguous() != right.contiguous()).any()
        return
    monkeypatch.setattr(GradientWorkspace, forgotten, lambda self, weights, packed: packed)
    with pytest.raises(Exception, match=r"(?i)none"):
        run_gradient(weights, *batch_of(CONFIG))


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (8, 32)])  # activations smaller than a layer's gradient, larger
def test_a_gradient_lies_where_activations_lay_and_no_nearer(
    batch: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saves memory; one application further in, it would overwrite what is still to be read."""
    weights, given = random_weights(), batch_of(CONFIG, batch, length)
    begin, end = gradient_module.gradient_begins(CONFIG, batch * length, "none")
    assert begin < end
    _, right = run_gradient(weights, *given)
    for recompute in ("loop", "layer"):
        begins = gradient_module.gradient_begins(CONFIG, batch * length, recompute)
        assert begins[0] == begins[1]
        _, other = run_gradient(weights, *given, recompute=recompute)
        np.testing.assert_array_equal(right.contiguous(), other.contiguous())
    each = Activations.elements(CONFIG, batch * length)
    monkeypatch.setattr(gradient_module, "gradient_begins", lambda *_: (max(0, begin - each), end))
    _, wrong = run_gradient(weights, *given)
    assert not np.array_equal(wrong.contiguous(), right.contiguous())


def test_a_workspace_used_before_gives_the_same_bits() -> None:
    weights = random_weights()
    objective = StageOne(ENTROPY_WEIGHT, log_prior("uniform", CONFIG.total_ut_steps))
    batches = [batch_of(CONFIG), tuple(array[::-1] for array in batch_of(CONFIG))]
    for recompute in RECOMPUTE:
        workspace = GradientWorkspace(CONFIG, *batches[0][0].shape, 1, recompute)
        found = []
        for ids, target in (*batches, batches[0]):
            gradient(weights, workspace, ids, target, objective)
            found.append(workspace.total.contiguous().copy())
        np.testing.assert_array_equal(found[0], found[2])
        assert (found[0] != found[1]).any()


@pytest.mark.parametrize(("recompute", "kept", "again"), [("none", 15, 0), ("loop", 3, 12), ("layer", 1, 14)])
def test_what_is_kept_and_how_often_layers_run(
    recompute: str, kept: int, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five loops of three layers; the last block's activations are still there when backward begins."""
    calls = []
    forward_of_a_layer = model.layer_forward
    monkeypatch.setattr(model, "layer_forward", lambda *given: calls.append(0) or forward_of_a_layer(*given))
    assert len(GradientWorkspace(CONFIG, 2, 5, 1, recompute).shards[0].tape.activations) == kept
    run_gradient(random_weights(), *batch_of(CONFIG), recompute=recompute)
    assert len(calls) == 15 + again


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_step_allocates_next_to_nothing(recompute: str) -> None:
    """Less than one state of one loop: all that is large was made with the workspace."""
    weights = random_weights(dataclasses.replace(CONFIG, hidden_size=96, num_key_value_heads=4))
    ids, target = batch_of(CONFIG, 8, 32)
    workspace = GradientWorkspace(weights.config, *ids.shape, 1, recompute)
    objective = StageOne(ENTROPY_WEIGHT, log_prior("uniform", CONFIG.total_ut_steps))
    gradient(weights, workspace, ids, target, objective)
    tracemalloc.start()
    try:
        gradient(weights, workspace, ids, target, objective)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < ids.size * 96 * 4
