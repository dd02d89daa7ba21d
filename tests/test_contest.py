"""The contest's arithmetic: what a rule would have done, thresholds solved for, fronts, winners, decode by turns."""

import dataclasses
import math

import numpy as np
import pytest

from looplm import pareto, timing
from looplm.calibration import Gate
from looplm.contest import Entry, Evidence, Figures, Goal, figures, gather, solve
from looplm.data import Batch
from looplm.errors import DataError
from looplm.exits import MEASURED, RULES, FixedDepth, LearnedGate, bind, exit_index, make_rule
from looplm.model import forward
from looplm.pareto import Point, budgets, figure_five, front, half_width, point, spread, standings
from looplm.weights import Weights
from random_models import CONFIG, batch_of, random_ids, random_weights

LOOPS = CONFIG.total_ut_steps


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


@pytest.fixture(scope="module")
def batch() -> Batch:
    ids = random_ids(6, 12)
    target = np.roll(ids, -1, 1)
    target[:, -1] = -1
    return Batch(ids, target)


@pytest.fixture(scope="module")
def seen(weights: Weights, batch: Batch) -> Evidence:
    return gather(weights, [(batch, np.array([1, 1, 1, 2, 2, 2]))], 10**6)


def entry_of(rule: str, weights: Weights) -> Entry:
    return Entry(rule, rule, Gate(weights.gate_weight, weights.gate_bias) if rule == "gate" else None)


# ---- what a rule would have done


@pytest.mark.parametrize("rule", RULES)
def test_an_entry_stops_where_its_rule_does(rule: str, weights: Weights, batch: Batch, seen: Evidence) -> None:
    """At every threshold the contest would try, to the bit."""
    entry, counted = entry_of(rule, weights), batch.target >= 0
    trace = forward(weights, batch.input_ids)
    values = entry.values(seen)
    tried = entry.thresholds(seen, 12)
    depths = set()
    for threshold in tried:
        bound = bind(make_rule(rule, threshold), weights)
        expected = exit_index(bound, trace.hidden[:, counted], trace.gate_logit[:, counted])
        found = entry.exits(values, threshold)
        np.testing.assert_array_equal(found, expected)
        depths.add(round(float(found.mean()), 3))
    assert len(depths) > 3
    assert max(depths) == LOOPS - 1
    assert min(depths) == (MEASURED[rule].earliest if rule in MEASURED else 1) - 1


def test_the_evidence_is_that_of_counted_positions(weights: Weights, batch: Batch, seen: Evidence) -> None:
    trace, counted = forward(weights, batch.input_ids), batch.target >= 0
    np.testing.assert_array_equal(seen.loss, trace.token_loss(batch.target)[:, counted])
    best = np.stack([trace.logits(r) for r in range(LOOPS)]).argmax(-1)[:, counted]
    np.testing.assert_array_equal(seen.right, best == batch.target[counted])
    np.testing.assert_array_equal(seen.agrees, best == best[-1])
    assert seen.group.tolist() == [1] * 33 + [2] * 33
    assert np.isnan(seen.statistics["kl"][0]).all()
    assert gather(weights, [(batch, None)] * 3, 70).loss.shape == (LOOPS, 70)
    with pytest.raises(DataError, match="no position"):
        gather(weights, [(Batch(batch.input_ids, np.full_like(batch.target, -1)), None)], 9)


def test_figures_by_hand() -> None:
    loss = np.array([[3.0, 1.0], [2.0, 4.0]], np.float32)
    right = np.array([[False, True], [True, True]])
    made = Evidence(np.zeros((2, 2, 1), np.float32), loss, right, right, {}, np.array([1, 2]))
    assert figures(made, np.array([1, 0])) == Figures(1.5, 1.5, 1.0, 1.0)
    assert figures(made, np.array([0, 0])) == Figures(1.0, 2.0, 0.5, 0.5)
    from looplm.contest import by_group

    first, second, none = by_group(made, np.array([1, 0]), (1, 2, 3))
    assert (first, second, none) == (Figures(2.0, 2.0, 1.0, 1.0), Figures(1.0, 1.0, 1.0, 1.0), None)


def test_chunks_are_all_of_it_in_order(seen: Evidence) -> None:
    parts = seen.chunks(5)
    assert {part.loss.shape[1] for part in parts} == {13, 14}
    np.testing.assert_array_equal(np.concatenate([part.loss for part in parts], axis=1), seen.loss)


# ---- goals


@pytest.mark.parametrize("rule", ["gate", "top", "margin"])
@pytest.mark.parametrize("wanted", [1.0, 2.5, 5.0])
def test_mean_loops_are_reached(rule: str, wanted: float, weights: Weights, seen: Evidence) -> None:
    entry = entry_of(rule, weights)
    found = figures(seen, entry.exits(entry.values(seen), solve(entry, seen, Goal(target_loops=wanted))))
    assert found.mean_loops == pytest.approx(wanted, abs=2 / seen.loss.shape[1])


def test_the_loss_allowed_is_kept_with_as_few_loops_as_can_be(weights: Weights, seen: Evidence) -> None:
    entry = entry_of("gate", weights)
    goal = Goal(max_loss_increase=0.02)
    found = figures(seen, entry.exits(entry.values(seen), solve(entry, seen, goal)))
    allowed = 1.02 * seen.loss[-1].mean(dtype=np.float64)
    assert found.loss <= allowed
    for q in entry.thresholds(seen, 400):
        other = figures(seen, entry.exits(entry.values(seen), q))
        assert other.loss > allowed or other.mean_loops >= found.mean_loops
    assert str(goal) == "at most 2 % more loss than all loops"
    assert str(Goal(target_loops=2.5)) == "2.5 loops on average"


# ---- fronts and winners


def made(
    entry: str, loops: float, loss: float, ms: float = math.nan, accuracy: float = 0.5, noise: float = 0.0
) -> Point:
    """A point of four chunks, whose losses and accuracies differ by `noise`."""
    whole = Figures(loops, loss, accuracy, 1.0)
    parts = [Figures(loops, loss + n * noise, accuracy + n * noise, 1.0) for n in (-1, -1, 1, 1)]
    rule = "fixed" if entry == "fixed" else "gate"
    decoded = None if math.isnan(ms) else timing.Decoded([ms], [loops], [loss])
    return Point(Entry(entry, rule), loops, whole, parts, [], (1, 1, 1), [], decoded)


def test_the_front_is_what_nothing_beats() -> None:
    points = [made("a", 1.0, 3.0, 9.0), made("a", 2.0, 2.0, 1.0), made("b", 2.0, 2.5, 2.0), made("b", 3.0, 2.0, 3.0)]
    assert front(points, "loops") == [True, True, False, False]
    assert front(points, "ms") == [False, True, False, False]
    assert front([made("a", 1.0, 1.0)], "ms") == [False], "what was not timed is on no front of time"


def test_winners_are_read_off_between_thresholds() -> None:
    points = [made("a", 1.0, 4.0), made("a", 3.0, 2.0), made("b", 2.0, 2.5), made("b", 4.0, 0.5), made("c", 3.0, 1.0)]
    found = standings(points, "loops", 2.0)
    assert [(s.entry, s.loss) for s in found.ranking] == [("b", 2.5), ("a", 3.0)]
    assert found.advantage[0] == pytest.approx(0.5)
    assert [s.entry for s in standings(points, "loops", 3.0).ranking] == ["c", "b", "a"]
    assert [s.entry for s in standings(points, "loops", 9.0).ranking] == ["b", "c", "a"]
    assert standings(points, "loops", 9.0, exactly=True).ranking == []
    assert standings(points, "loops", 0.5).ranking == []
    assert math.isnan(standings(points, "loops", 0.5).advantage[0])


def test_a_budget_is_spent_only_where_that_lowers_the_loss() -> None:
    """The last loop may harm, and measured times are not in the order of loops."""
    points = [made("a", 1.0, 3.0, 1.0), made("a", 2.0, 1.0, 4.0), made("a", 3.0, 0.5, 3.0), made("a", 4.0, 2.0, 5.0)]
    for cost, amount, loss in (("loops", 2.5, 0.75), ("loops", 3.5, 0.5), ("ms", 2.0, 1.75), ("ms", 4.0, 0.5)):
        (found,) = standings(points, cost, amount).ranking
        assert found.loss == pytest.approx(loss), (cost, amount)
        assert found.losses == pytest.approx((loss,) * 4)
    (found,) = standings(points, "loops", 3.5, exactly=True).ranking
    assert found.loss == pytest.approx(1.25)


def test_budgets_are_between_one_loop_and_all_in_loops_and_in_time() -> None:
    points = [made("fixed", 1.0, 3.0, 10.0), made("fixed", 5.0, 1.0, 30.0), made("gate, paper", 5.0, 1.0, 99.0)]
    assert [(b.cost, b.amount) for b in budgets(points, 5)] == [
        *(("loops", 2.0), ("loops", 3.0), ("loops", 4.0)),
        *(("ms", 15.0), ("ms", 20.0), ("ms", 25.0)),
    ]


def test_a_lead_is_as_sure_as_its_chunks_are_alike() -> None:
    """Chunks that differ alike for both leave the difference sure: it is taken chunk by chunk."""
    points = [made("a", 2.0, 2.0, noise=0.5), made("b", 2.0, 2.1, noise=0.5), made("c", 2.0, 2.2)]
    first, second, third = standings(points, "loops", 2.0).ranking
    assert pareto.lead(first, second) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-9))
    mean, interval = pareto.lead(first, third)
    assert mean == pytest.approx(0.2)
    assert interval > mean


def test_intervals_are_students() -> None:
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert half_width([1.0]) == math.inf
    assert half_width([0.0, 1.0] * 50) == pytest.approx(1.96 * 0.5025 / 10, rel=1e-3)


def test_figure_five_is_checked_as_it_was_drawn() -> None:
    """The paper's order: Stage II 66 %, Stage I 64 %, fixed 55 %, a small change close to Stage II."""
    accuracy = {"gate, paper": 0.66, "gate, Stage I": 0.64, "fixed": 0.55, "change": 0.65}
    points = [made(name, 2.5, 1.0, accuracy=value) for name, value in accuracy.items()]
    budget, claims = figure_five(points, 4)
    assert budget == 2.5
    assert [claim.holds for claim in claims] == [True] * 4
    assert claims[0].lead == pytest.approx(0.02)
    reverse = [made(name, 2.5, 1.0, accuracy=1.0 - value) for name, value in accuracy.items()]
    assert [claim.holds for claim in figure_five(reverse, 4)[1]] == [False, False, True, False]
    assert figure_five(points[:1], 4)[1] == []


def test_points_are_spread_over_the_loops_with_both_ends() -> None:
    points = [made("a", loops, 1.0) for loops in (1.0, 1.01, 1.02, 2.0, 2.9, 3.0, 3.01, 4.0)]
    assert [p.whole.mean_loops for p in spread(points, 4)] == [1.0, 2.0, 3.0, 4.0]


def test_a_point_is_its_entry_at_a_threshold(weights: Weights, seen: Evidence) -> None:
    entry = entry_of("gate", weights)
    found = point(entry, 0.5, seen, seen.chunks(3), (1, 2))
    exits = entry.exits(entry.values(seen), 0.5)
    assert found.whole == figures(seen, exits)
    assert sum(found.exits) == pytest.approx(1.0)
    assert len(found.chunks) == 3
    assert found.chunks[0] == figures(seen.chunks(3)[0], exits[:22])
    assert found.quantiles == tuple(1 + np.quantile(exits, (0.1, 0.5, 0.9), method="inverted_cdf").astype(int))
    assert (found.exit, found.ms) == ("gate:0.5", math.inf)


# ---- decoding by turns


def test_everyone_decodes_every_text_once_a_turn(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = timing.decode
    monkeypatch.setattr(timing, "decode", lambda w, rule, *more: (order.append(str(rule)), real(w, rule, *more))[1])
    texts = [batch_of(random_ids(12, seed=seed)) for seed in range(3)]
    rules = [FixedDepth(1), FixedDepth(LOOPS)]
    *_, found = timing.decode_by_turns([(weights, rule) for rule in rules], texts, 4)
    one, every = "fixed:1", f"fixed:{LOOPS}"
    assert order == [one, every, one, every, every, one, one, every]
    assert [d.loops_run for d in found] == [[1.0] * 3, [float(LOOPS)] * 3]
    assert all(ms > 0.0 for d in found for ms in d.ms_per_token)


def test_the_loss_of_a_decode_is_the_models(weights: Weights) -> None:
    text = random_ids(12)
    (found,) = list(timing.decode_by_turns([(weights, LearnedGate(1.0))], [batch_of(text)], 4))[-1]
    loss = forward(weights, text[None, :-1]).token_loss(text[None, 1:])[-1, 0, 4:]
    assert found.loss[0] == pytest.approx(float(loss.mean()), rel=1e-5)


def test_another_gate_is_used_and_the_model_left_alone(weights: Weights) -> None:
    before = weights.gate_bias.copy()
    eager = Gate(np.zeros_like(weights.gate_weight), np.full(1, 50.0, np.float32))
    other = timing.with_gate(weights, eager)
    (found,) = list(timing.decode_by_turns([(other, LearnedGate(0.9))], [batch_of(random_ids(9))], 3))[-1]
    assert found.loops_run == [1.0]
    np.testing.assert_array_equal(weights.gate_bias, before)
    assert dataclasses.asdict(found)["ms_per_token"]
