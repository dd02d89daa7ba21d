"""Exit rules: the learned gate against whole traces and hand-worked numbers, fixed depth, bounds."""

import itertools

import numpy as np
import pytest

from looplm.errors import UsageError
from looplm.exits import Bounded, FixedDepth, LearnedGate, choose_rule, exit_index
from looplm.model import forward
from looplm.weights import Weights
from random_models import CONFIG, random_ids, random_weights

ALL_LOOPS = LearnedGate(1.0)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


def test_the_gate_stops_where_the_whole_trace_would(weights: Weights) -> None:
    trace = forward(weights, random_ids(1, 30))
    for q in (0.0, 0.2, 0.5, 0.8, 0.999, 1.0):
        found = exit_index(LearnedGate(q), trace.hidden[:, 0], trace.gate_logit[:, 0])
        np.testing.assert_array_equal(found, trace.exit_index(q)[0])


def test_the_gate_at_hand_worked_probabilities() -> None:
    # hazards 1/2, 1/2, 3/4: cumulated 1/2, 3/4, 15/16
    gate_logit = np.array([[0.0], [0.0], [np.log(3.0)]], np.float32)
    hidden = np.zeros((3, 1, 2), np.float32)
    for q, loops in ((0.0, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.93, 3), (0.94, None), (1.0, None)):
        first = next((r for r in range(1, 4) if LearnedGate(q).stops(hidden[:r], gate_logit[:r])[0]), None)
        assert first == loops


def test_a_saturated_gate_does_not_stop_at_threshold_one() -> None:
    assert not LearnedGate(1.0).stops(np.zeros((1, 1, 2), np.float32), np.full((1, 1), 200.0, np.float32))[0]


def test_exits_move_only_deeper_as_the_threshold_grows(weights: Weights) -> None:
    trace = forward(weights, random_ids(1, 30))
    found = [exit_index(LearnedGate(q), trace.hidden[:, 0], trace.gate_logit[:, 0]) for q in np.linspace(0, 1, 21)]
    assert all((low <= high).all() for low, high in itertools.pairwise(found))
    assert found[0].max() == 0
    assert found[-1].min() == CONFIG.total_ut_steps - 1
    assert len(set(found[10])) > 2


def test_bounds_hold_the_gate() -> None:
    hidden, eager = np.zeros((5, 2, 3), np.float32), np.full((5, 2), 9.0, np.float32)
    assert exit_index(LearnedGate(0.5), hidden, eager).tolist() == [0, 0]
    assert exit_index(Bounded(LearnedGate(0.5), min_loops=3), hidden, eager).tolist() == [2, 2]
    assert exit_index(Bounded(LearnedGate(0.5), max_loops=3), hidden, -eager).tolist() == [2, 2]
    assert Bounded(LearnedGate(0.5), max_loops=8).deepest(4) == 8
    assert Bounded(LearnedGate(0.5), min_loops=6).deepest(4) == 6
    assert Bounded(LearnedGate(0.5)).deepest(4) == 4


def test_wishes_become_rules() -> None:
    assert choose_rule(None, None, 0.9) == LearnedGate(0.9)
    assert choose_rule(0.5, None, 0.9) == LearnedGate(0.5)
    assert choose_rule(None, 6, 0.9) == FixedDepth(6)
    assert choose_rule(0.5, 6, 0.9) == Bounded(LearnedGate(0.5), max_loops=6)


@pytest.mark.parametrize("q", [-0.1, 1.1, np.nan])
def test_a_threshold_that_is_no_probability_is_refused(q: float) -> None:
    with pytest.raises(UsageError, match="outside"):
        LearnedGate(q)


def test_impossible_depths_are_refused() -> None:
    with pytest.raises(UsageError, match="loop 0"):
        FixedDepth(0)
    with pytest.raises(UsageError, match="between loop 3 and loop 2"):
        Bounded(ALL_LOOPS, min_loops=3, max_loops=2)
