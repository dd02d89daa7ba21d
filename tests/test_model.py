"""The engine's forward pass as a whole: the reference's states, padding, threads, chunks, and what a trace tells."""

import numpy as np
import pytest

from judged_models import BATCH, LENGTH, batch_of, close, weights_of
from looplm import model
from looplm.arrays import Floats, Ints
from looplm.model import Trace, forward
from looplm_reference.judge import MODELS
from looplm_reference.model import LoopLM


@pytest.mark.parametrize("name", MODELS)
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
    close(forward(weights, ids, threads=2).hidden, forward(weights, ids).hidden)
    close(forward(weights, ids[:1], threads=2).hidden, forward(weights, ids[:1]).hidden)


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
