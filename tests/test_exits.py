"""Exit rules: against whole traces and hand-worked numbers, alone and in batches, and their bounds."""

import dataclasses
import itertools

import numpy as np
import pytest

from looplm.decoder import Decoder
from looplm.errors import UsageError
from looplm.exits import (
    MEASURED,
    RULES,
    Bounded,
    ExitRule,
    FixedDepth,
    LearnedGate,
    Readout,
    bind,
    choose_rule,
    exit_index,
    exit_indices,
    make_rule,
)
from looplm.generation import Session
from looplm.kernels import exit_distribution_forward, exit_loop
from looplm.model import Trace, forward
from looplm.stored import StoredMatrix
from looplm.weights import Weights
from random_models import CONFIG, random_ids, random_weights

ALL_LOOPS = LearnedGate(1.0)
LOOPS = CONFIG.total_ut_steps

# Thresholds from stopping early to never stopping, in the direction in which a position goes deeper.
DEEPER = {
    "gate": (0.0, 0.2, 0.5, 0.8, 1.0),
    "fixed": (1, 2, 3, 4, 5),
    "change": (3.0, 0.9, 0.7, 0.5, 0.0),
    "kl": (100.0, 2.0, 1.0, 0.4, 0.0),
    "top": (0.0, 0.1, 0.2, 0.4, 1.0),
    "margin": (0.0, 0.3, 0.8, 1.5, 1e9),
    "stable": (1, 2, 3, 4, 6),
}


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


@pytest.fixture(scope="module")
def trace(weights: Weights) -> Trace:
    return forward(weights, random_ids(1, 30))


def stops_of(rule: ExitRule, trace: Trace) -> np.ndarray:
    return exit_index(rule, trace.hidden[:, 0], trace.gate_logit[:, 0])


# ---- the learned gate


@pytest.mark.kernels
@pytest.mark.plain_python
@pytest.mark.parametrize("q", [0.0, 0.3, 0.7, 0.999999, 1.0])
def test_the_gate_stops_where_the_exit_law_of_the_whole_trace_does(q: float) -> None:
    gate_logit = np.random.default_rng(0).normal(0.0, 4.0, (5, 400)).astype(np.float32)
    gate_logit[:, :40] = np.sign(gate_logit[:, :40]) * 200.0  # saturated
    exit_prob, _ = exit_distribution_forward(gate_logit)
    (expected,) = exit_loop(exit_prob, q)
    for seen in range(1, 5):
        stops = LearnedGate(q).stops(np.empty((seen, 400, 1), np.float32), gate_logit[:seen])
        np.testing.assert_array_equal(stops, expected < seen)
    assert len(np.unique(expected)) == (1 if q in (0.0, 1.0) else 5)


def test_the_gate_stops_where_the_whole_trace_would(trace: Trace) -> None:
    for q in (0.0, 0.2, 0.5, 0.8, 0.999, 1.0):
        np.testing.assert_array_equal(stops_of(LearnedGate(q), trace), trace.exit_index(q)[0])


def test_the_gate_at_hand_worked_probabilities() -> None:
    # hazards 1/2, 1/2, 3/4: cumulated 1/2, 3/4, 15/16
    gate_logit = np.array([[0.0], [0.0], [np.log(3.0)]], np.float32)
    hidden = np.zeros((3, 1, 2), np.float32)
    for q, loops in ((0.0, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.93, 3), (0.94, None), (1.0, None)):
        first = next((r for r in range(1, 4) if LearnedGate(q).stops(hidden[:r], gate_logit[:r])[0]), None)
        assert first == loops


def test_a_saturated_gate_does_not_stop_at_threshold_one() -> None:
    assert not LearnedGate(1.0).stops(np.zeros((1, 1, 2), np.float32), np.full((1, 1), 200.0, np.float32))[0]


# ---- every rule


def test_every_rule_is_tested() -> None:
    assert set(DEEPER) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_exits_only_move_deeper_along_the_threshold(name: str, weights: Weights, trace: Trace) -> None:
    found = [stops_of(bind(make_rule(name, threshold), weights), trace) for threshold in DEEPER[name]]
    assert all((low <= high).all() for low, high in itertools.pairwise(found))
    earliest = MEASURED[name].earliest if name in MEASURED else 1
    assert set(found[0].tolist()) == {earliest - 1}
    assert set(found[-1].tolist()) == {LOOPS - 1}
    assert name == "fixed" or any(len(set(each.tolist())) > 2 for each in found[1:-1])


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_the_same_step_by_step_as_on_the_whole_trace(name: str, weights: Weights, trace: Trace) -> None:
    rule = bind(make_rule(name, DEEPER[name][2]), weights)
    whole = stops_of(rule, trace)
    hidden, gate_logit = trace.hidden[:, 0], trace.gate_logit[:, 0]
    for row in range(hidden.shape[1]):
        fresh = bind(rule, weights)
        asked = (fresh.stops(hidden[: r + 1, [row]], gate_logit[: r + 1, [row]])[0] for r in range(LOOPS - 1))
        assert next((r for r, stop in enumerate(asked) if stop), LOOPS - 1) == whole[row]


@pytest.mark.parametrize("name", RULES)
def test_a_session_stops_where_the_rule_does(name: str, weights: Weights) -> None:
    ids, rule = random_ids(1, 12), bind(make_rule(name, DEEPER[name][2]), weights)
    session = Session(weights, policy="full", loops=rule.deepest(LOOPS))
    decoded = [session.advance(ids[:, s], rule)[0] for s in range(12)]
    found = forward(weights, ids, loops=rule.deepest(LOOPS))
    np.testing.assert_array_equal(decoded, stops_of(rule, found))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("rows", [1, 2, 7, 30])
def test_rows_stop_in_any_batch_as_alone(name: str, rows: int, weights: Weights, trace: Trace) -> None:
    """To the bit: the threshold is set exactly onto a row's own number."""
    hidden, gate_logit = trace.hidden[:, 0], trace.gate_logit[:, 0]
    rule = bind(make_rule(name, DEEPER[name][2]), weights)
    if name in MEASURED and name != "stable":
        rule = dataclasses.replace(rule, threshold=float(rule.statistic(hidden[:3, [5]], gate_logit[:3, [5]])[0]))
    alone = [exit_index(rule, hidden[:, [row]], gate_logit[:, [row]])[0] for row in range(30)]
    parts = [slice(begin, begin + rows) for begin in range(0, 30, rows)]
    together = np.concatenate([exit_index(rule, hidden[:, part], gate_logit[:, part]) for part in parts])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("name", RULES)
def test_with_one_loop_every_rule_runs_it(name: str) -> None:
    weights = random_weights(dataclasses.replace(CONFIG, total_ut_steps=1))
    found = forward(weights, random_ids(1, 5))
    for threshold in DEEPER[name]:
        assert stops_of(bind(make_rule(name, threshold), weights), found).tolist() == [0] * 5


def test_rules_together_stop_as_each_alone(weights: Weights, trace: Trace) -> None:
    rules = [bind(make_rule(name, DEEPER[name][2]), Readout(weights.head)) for name in RULES]
    found = exit_indices(rules, trace.hidden[:, 0], trace.gate_logit[:, 0])
    for rule, index in zip(rules, found, strict=True):
        np.testing.assert_array_equal(index, stops_of(rule, trace))


def test_a_long_trace_is_judged_in_pieces(weights: Weights, trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    from looplm import exits

    rule = bind(make_rule("kl", 1.0), weights)
    whole = stops_of(rule, trace)
    monkeypatch.setattr(exits, "READ_AT_ONCE", 7 * CONFIG.vocab_size)
    np.testing.assert_array_equal(stops_of(rule, trace), whole)


# ---- the numbers they compare


def statistic(name: str, hidden: list[list[float]], head: list[list[float]], threshold: float = 1.0) -> float:
    weights_of = Readout(np.array(head, np.float32))
    states = np.array(hidden, np.float32)[:, None]
    rule = bind(make_rule(name, threshold), weights_of)
    return float(rule.statistic(states, np.zeros((len(states), 1), np.float32))[0])


def test_the_compared_numbers_by_hand() -> None:
    head = [[1.0, 0.0], [0.0, 1.0]]  # so the logits are the state
    two, three = float(np.log(2.0)), float(np.log(3.0))
    assert statistic("change", [[3.0, 0.0], [3.0, 4.0]], head) == pytest.approx(4.0 / 5.0)
    assert statistic("top", [[three, 0.0]], head) == pytest.approx(0.75)
    assert statistic("margin", [[three, 0.0]], head) == pytest.approx(three)
    # before 1/3, 2/3, after 3/4, 1/4
    expected = 1 / 3 * np.log((1 / 3) / (3 / 4)) + 2 / 3 * np.log((2 / 3) / (1 / 4))
    assert statistic("kl", [[0.0, two], [three, 0.0]], head) == pytest.approx(expected, rel=1e-5)
    assert statistic("stable", [[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]], head, 9) == 2
    assert statistic("stable", [[3.0, 1.0], [1.0, 0.0], [2.0, 0.0]], head, 9) == 3


def test_a_state_is_read_once(weights: Weights, trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = StoredMatrix.multiply

    def counted(head: StoredMatrix, states: np.ndarray) -> np.ndarray:
        read.append(len(states))
        return real(head, states)

    monkeypatch.setattr(StoredMatrix, "multiply", counted)
    hidden, gate_logit = trace.hidden[:, 0], trace.gate_logit[:, 0]
    readout = Readout(weights.head)
    rules = [bind(make_rule(name, DEEPER[name][2]), readout) for name in ("kl", "top", "margin", "stable")]
    for r in range(LOOPS):
        for rule in rules:
            rule.stops(hidden[: r + 1, :1], gate_logit[: r + 1, :1])
    assert read == [1] * LOOPS
    bind(make_rule("change", 0.5), readout).stops(hidden[:, 1:2], gate_logit[:, 1:2])
    assert read == [1] * LOOPS, "a rule that needs no logits has read some"


@pytest.mark.parametrize("name", ["kl", "change"])
def test_a_session_takes_what_its_rule_has_read(weights: Weights, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, session = bind(make_rule(name, 1e9), weights), Session(weights, capacity=8)
    session.feed(np.array([[1, 2, 3]]))
    exit_at = session.advance(np.array([4]), rule)
    multiplied: list[int] = []
    expected, real = session.logits(exit_at), Decoder.logits

    def counted(decoder: Decoder, states: np.ndarray) -> np.ndarray:
        multiplied.append(len(states))
        return real(decoder, states)

    monkeypatch.setattr(Decoder, "logits", counted)
    np.testing.assert_array_equal(session.logits(exit_at, rule), expected)
    assert multiplied == ([] if name == "kl" else [1])


def test_what_is_remembered_is_not_taken_for_something_else(weights: Weights, trace: Trace) -> None:
    """The session writes every position's states into the same memory."""
    readout, buffer = Readout(weights.head), trace.hidden[:1, 0, :1].copy()
    first = readout(buffer)[0].copy()
    buffer[0, 0, -1] += 1.0  # the same beginning
    second = readout(buffer)[0]
    np.testing.assert_allclose(second, buffer[0] @ weights.head.T, rtol=1e-4, atol=1e-5)
    assert (first != second).any()


# ---- bounds and wishes


def test_bounds_hold_the_gate() -> None:
    hidden, eager = np.zeros((5, 2, 3), np.float32), np.full((5, 2), 9.0, np.float32)
    assert exit_index(LearnedGate(0.5), hidden, eager).tolist() == [0, 0]
    assert exit_index(Bounded(LearnedGate(0.5), min_loops=3), hidden, eager).tolist() == [2, 2]
    assert exit_index(Bounded(LearnedGate(0.5), max_loops=3), hidden, -eager).tolist() == [2, 2]
    assert Bounded(LearnedGate(0.5), max_loops=8).deepest(4) == 8
    assert Bounded(LearnedGate(0.5), min_loops=6).deepest(4) == 6
    assert Bounded(LearnedGate(0.5)).deepest(4) == 4


@pytest.mark.parametrize("name", RULES)
def test_bounds_hold_every_rule(name: str, weights: Weights, trace: Trace) -> None:
    eager, never = (make_rule(name, DEEPER[name][end]) for end in (0, -1))
    assert stops_of(bind(Bounded(eager, min_loops=4), weights), trace).tolist() == [3] * 30
    assert stops_of(bind(Bounded(never, max_loops=2), weights), trace).tolist() == [1] * 30


def test_wishes_become_rules() -> None:
    gate = LearnedGate(0.5)
    assert choose_rule(None, None, ALL_LOOPS) == ALL_LOOPS
    assert choose_rule(gate, None, ALL_LOOPS) == gate
    assert choose_rule(None, 6, ALL_LOOPS) == FixedDepth(6)
    assert choose_rule(gate, 6, ALL_LOOPS) == Bounded(gate, max_loops=6)
    assert choose_rule(gate, None, ALL_LOOPS, 2) == Bounded(gate, min_loops=2)
    assert choose_rule(None, None, ALL_LOOPS, 2) == Bounded(ALL_LOOPS, min_loops=2)
    assert str(choose_rule(make_rule("kl", 0.01), 4, ALL_LOOPS, 2)) == "kl:0.01, at least 2 loops, at most 4 loops"


# ---- refusals


@pytest.mark.parametrize("q", [-0.1, 1.1, np.nan])
def test_a_threshold_that_is_no_probability_is_refused(q: float) -> None:
    with pytest.raises(UsageError, match="outside"):
        LearnedGate(q)


@pytest.mark.parametrize(
    ("name", "threshold", "said"),
    [
        ("change", -0.1, "change:-0.1: the threshold is not between 0 and infinity"),
        ("kl", np.nan, "kl:nan"),
        ("kl", np.inf, "kl:inf"),
        ("top", 1.01, "top:1.01: the threshold is not between 0 and 1"),
        ("margin", -1.0, "margin:-1"),
        ("stable", 0, "stable:0: a number of loops is whole"),
        ("stable", 1.5, "stable:1.5"),
        ("stable", np.nan, "stable:nan"),
        ("fixed", 0, "fixed:0: a number of loops is whole"),
        ("fixed", 1.5, "fixed:1.5"),
        ("fixed", np.nan, "fixed:nan"),
        ("entropy", 1.0, "'entropy' is not an exit rule"),
    ],
)
def test_thresholds_out_of_range_and_unknown_rules_are_refused(name: str, threshold: float, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_rule(name, threshold)
    assert str(caught.value).startswith(said)
    assert "use " in caught.value.hint


def test_a_rule_without_a_head_says_what_it_lacks(trace: Trace) -> None:
    with pytest.raises(UsageError, match=r"kl:0\.01 has no head"):
        make_rule("kl", 0.01).stops(trace.hidden[:2, 0], trace.gate_logit[:2, 0])


def test_impossible_depths_are_refused() -> None:
    with pytest.raises(UsageError, match="loop 0"):
        FixedDepth(0)
    with pytest.raises(UsageError, match="between loop 3 and loop 2"):
        Bounded(ALL_LOOPS, min_loops=3, max_loops=2)
    with pytest.raises(UsageError, match="between loop 3 and loop 2"):
        choose_rule(None, 2, ALL_LOOPS, 3)
