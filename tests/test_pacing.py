"""Pacers and exit traces: what is allowed is never exceeded, what is told is done, and nothing depends on luck."""

import pathlib

import numpy as np
import pytest

from looplm.errors import UsageError
from looplm.exit_trace import ExitTrace, read_exit_trace
from looplm.exits import Bounded, FixedDepth, LearnedGate, TopProbability, bind, count_token, readout_of
from looplm.generation import Generated, generate
from looplm.pacing import RESERVE, LoopBudget, TimeLimit
from looplm.sampling import GREEDY
from looplm.weights import Weights
from random_models import CONFIG, random_ids, random_weights
from refusals import refused

LOOPS = CONFIG.total_ut_steps


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


def written(weights, rule, tokens: int = 30, seed: int = 0) -> list[Generated]:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    return list(generate(weights, random_ids(5), rule=rule, rng=rng, sampling=GREEDY, max_new_tokens=tokens))


def loops_of(tokens: list[Generated]) -> np.ndarray:
    """Of the decoded ones: the prompt's is not charged."""
    return np.array([token.loops_run for token in tokens[1:]])


def play(rule, hazards: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Tokens whose gates say so, without a model.  hazards: NR -> loops run: N."""
    loops = hazards.shape[1]
    gate_logit, found = np.log(hazards / (1 - hazards)).astype(np.float32), []
    count_token(rule, loops)
    for row in gate_logit:
        run = next((r for r in range(1, loops) if rule.stops(np.zeros((r, 1, 2), np.float32), row[:r, None])[0]), loops)
        count_token(rule, run)
        found.append(run)
    return np.array(found)


# ---- loops


@pytest.mark.parametrize("budget", [1.0, 1.7, 2.1, 2.5, 3.0, 4.9, 7.0])
@pytest.mark.parametrize("rule", [None, LearnedGate(0.6), LearnedGate(1.0), FixedDepth(4)], ids=str)
def test_a_budget_is_never_exceeded(budget: float, rule: object) -> None:
    for seed in range(5):
        hazards = np.random.default_rng(seed).uniform(0.02, 0.9, (200, 5))
        pacer = LoopBudget(budget, rule)  # type: ignore[arg-type]
        run = play(pacer, hazards)
        assert (np.cumsum(run) <= budget * np.arange(1, 201) + 1e-6).all()
        assert pacer.mean_loops == run.mean()
        assert pacer.tokens == 200
        np.testing.assert_array_equal(run, play(LoopBudget(budget, rule), hazards))  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [1.7, 2.5, 3.3])
def test_a_steered_gate_uses_the_budget_up_where_the_gate_wants_it(budget: float) -> None:
    rng = np.random.default_rng(3)
    hard = rng.random(600) < 0.4
    hazards = np.where(hard[:, None], 0.08, 0.6) * rng.uniform(0.7, 1.3, (600, 5))
    pacer = LoopBudget(budget)
    run = play(pacer, hazards)
    assert budget - (RESERVE + 1) / 600 * 1.01 <= pacer.mean_loops <= budget
    assert run[hard].mean() > run[~hard].mean() + 0.5


def test_what_all_loops_would_take_is_spread_evenly() -> None:
    run = play(LoopBudget(2.5, LearnedGate(1.0)), np.full((40, 5), 0.5))
    assert set(run) == {2, 3}
    assert run.mean() == 2.5
    assert (play(LoopBudget(5.0, LearnedGate(1.0)), np.full((9, 5), 0.5)) == 5).all()


def test_a_rule_that_wants_less_gets_what_it_wants() -> None:
    hazards = np.random.default_rng(1).uniform(0.1, 0.9, (100, 5))
    np.testing.assert_array_equal(play(LoopBudget(5.0, LearnedGate(0.5)), hazards), play(LearnedGate(0.5), hazards))


def test_a_real_text_keeps_its_budget_within_bounds(weights: Weights) -> None:
    for budget in (1.5, 2.5, 4.0):
        pacer = LoopBudget(budget)
        run = loops_of(written(weights, Bounded(pacer, 1, 4)))
        assert (np.cumsum(run) <= budget * np.arange(1, run.size + 1) + 1e-6).all()
        assert run.max() <= 4
        assert pacer.tokens == run.size
    assert loops_of(written(weights, Bounded(LoopBudget(3.0), 2))).min() >= 2
    first = written(weights, LoopBudget(1.0))[0]
    assert (first.exit_loop, first.loops_run) == (LOOPS - 1, LOOPS)


def test_rules_that_read_predictions_are_paced_too(weights: Weights) -> None:
    rule = LoopBudget(2.5, bind(TopProbability(0.5), weights))
    assert readout_of(rule) is not None
    run = loops_of(written(weights, rule))
    assert run.mean() <= 2.5


# ---- time


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def timed(limit: float, loop_ms: float, rest_ms: float, rule=None, tokens: int = 60, jitter: float = 0.0):  # type: ignore[no-untyped-def]
    """Tokens on a machine of known speed -> the pacer, loops run."""
    clock, rng, loops = Clock(), np.random.default_rng(0), 4
    pacer = TimeLimit(limit, rule or LearnedGate(1.0), clock)
    found = []
    pacer.count(loops)
    for _ in range(tokens):
        for run in range(1, loops + 1):
            clock.now += 1e-3 * loop_ms * rng.uniform(1 - jitter, 1 + jitter)
            state, gate = np.zeros((run, 1, 2), np.float32), np.zeros((run, 1), np.float32)
            if run == loops or pacer.stops(state, gate)[0]:
                break
        pacer.count(run)
        clock.now += 1e-3 * rest_ms
        found.append(run)
    return pacer, np.array(found)


@pytest.mark.parametrize(
    ("limit", "loops"), [(100.0, 4), (46.0, 4), (44.0, 3), (26.0, 2), (16.0, 1), (3.0, 1)], ids=str
)
def test_as_many_loops_as_the_time_allows(limit: float, loops: int) -> None:
    pacer, run = timed(limit, loop_ms=10.0, rest_ms=5.0)
    assert (run[4:] == loops).all()
    assert pacer.spent[10] == pytest.approx(10.0 * loops + 5.0)
    if limit > 15:
        assert all(ms <= limit for ms in pacer.spent[4:])


def test_slow_moments_do_not_change_what_is_usual() -> None:
    pacer, run = timed(36.0, loop_ms=10.0, rest_ms=5.0, jitter=0.2)
    assert np.median(run) == 3
    assert np.mean([ms <= 36.0 * 1.2 for ms in pacer.spent[4:]]) > 0.95


def test_a_rule_under_a_time_limit_may_stop_earlier(weights: Weights) -> None:
    _, run = timed(1000.0, 10.0, 5.0, rule=LearnedGate(0.3))
    assert (run == 1).all()
    assert written(weights, TimeLimit(1e6, LearnedGate(0.5))) == written(weights, LearnedGate(0.5))
    tight = loops_of(written(weights, Bounded(TimeLimit(1e-6, LearnedGate(1.0)), min_loops=2)))
    assert (tight[1:] == 2).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoopBudget(0.5), "0.5 loops per token"),
        (lambda: LoopBudget(float("inf")), "inf loops"),
        (lambda: LoopBudget(float("nan")), "nan loops"),
        (lambda: TimeLimit(0.0, LearnedGate(1.0)), "0 ms"),
        (lambda: TimeLimit(float("nan"), LearnedGate(1.0)), "nan ms"),
    ],
)
def test_what_cannot_be_kept_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=message) as error:
        make()
    assert error.value.hint


# ---- traces


def test_exits_are_those_of_the_trace(weights: Weights) -> None:
    exits = [3, 1, LOOPS, 2, 2, 5, 1, 1, 4]
    tokens = written(weights, ExitTrace(exits), tokens=len(exits))
    assert [token.exit_loop + 1 for token in tokens] == exits
    assert loops_of(tokens).tolist() == exits[1:]  # and no loop more was run
    beyond = written(weights, ExitTrace([1, 2]), tokens=4)
    assert [token.exit_loop + 1 for token in beyond] == [1, 2, LOOPS, LOOPS]
    assert written(weights, ExitTrace([2] * 9), tokens=9) != written(weights, ExitTrace([3] * 9), tokens=9)


def test_a_trace_may_go_deeper_than_the_model() -> None:
    assert ExitTrace([1, 7]).deepest(4) == 7
    assert ExitTrace([1, 2]).deepest(4) == 4


@pytest.mark.parametrize("text", ["[3, 1, 2]", "3\n1\n2\n", " 3 1\n2"])
def test_a_trace_is_a_list_or_lines(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text, encoding="utf-8")
    assert read_exit_trace(path, 3).exits == (3, 1, 2)
    assert read_exit_trace(path, 2).exits == (3, 1, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2", "not a list of numbers"),
        (b"one", "not a list of numbers"),
        (b"[1, 0]", "exit 2 of"),
        (b"[1, 2.5]", "2.5, not a loop"),
        (b"[true, 1]", "True, not a loop"),
        (b"[[1], 2]", "exit 1 of"),
        (b"1 -2", "-2, not a loop"),
        (b"[1]", "1 exits, fewer than the 2 tokens"),
        (b"", "0 exits"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "not a list of numbers"),
    ],
)
def test_a_trace_that_is_none_is_refused(tmp_path: pathlib.Path, content: bytes, message: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    assert message in refused(read_exit_trace, path, 2)[0]
    assert "No such file" in refused(read_exit_trace, tmp_path / "gone", 2)[0]
    assert "Is a directory" in refused(read_exit_trace, tmp_path, 2)[0]
