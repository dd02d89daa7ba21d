"""Priors over loops, and the two objectives as the training loops use them."""

import math

import numpy as np
import pytest

from looplm.errors import ConfigError
from looplm.kernels import exit_distribution_forward
from looplm.objectives import STAGE2_TARGETS, StageOne, StageTwo, entropy, log_prior

RNG = np.random.default_rng(3)
LOSS = RNG.uniform(0.5, 4.0, (4, 6)).astype(np.float32)
GATE_LOGIT = RNG.normal(0.0, 1.5, (4, 6)).astype(np.float32)


def kl_objective(loss: np.ndarray, gate_logit: np.ndarray, prior: list[float], weight: float) -> np.ndarray:
    """Expected loss + weight * KL(exit distribution || prior), written out in float64."""
    stop = 1.0 / (1.0 + np.exp(-gate_logit.astype(np.float64)))
    stop[-1] = 1.0
    going = np.concatenate([np.ones_like(stop[:1]), np.cumprod(1.0 - stop[:-1], axis=0)])
    p = stop * going
    return (p * (loss + weight * (np.log(p) - np.log(prior)[:, None]))).sum(0)


# ---- priors


def test_the_uniform_prior_is_zero_so_that_kl_is_minus_entropy() -> None:
    assert log_prior("uniform", 3).tolist() == [0.0, 0.0, 0.0]
    value, _ = StageOne(0.7, log_prior("uniform", 4)).value_and_dgate(LOSS, GATE_LOGIT)
    p, log_p = (x.astype(np.float64) for x in exit_distribution_forward(GATE_LOGIT))
    np.testing.assert_allclose(value, (p * LOSS).sum(0) + 0.7 * (p * log_p).sum(0), rtol=1e-5)


def test_the_geometric_prior_is_truncated_and_sums_to_one() -> None:
    found = np.exp(log_prior("geometric:0.3", 3).astype(np.float64))
    np.testing.assert_allclose(found, np.array([0.3, 0.21, 0.147]) / 0.657, rtol=1e-6)
    assert log_prior("geometric:0.3", 3).dtype == np.float32


def test_a_list_is_scaled_to_sum_one() -> None:
    np.testing.assert_allclose(np.exp(log_prior("1,2, 5", 3)), [0.125, 0.25, 0.625], rtol=1e-6)
    assert log_prior("7", 1).tolist() == [0.0]


@pytest.mark.parametrize(
    "prior",
    [
        *("", "unifrm", "uniform:2", "geometric", "geometric:", "geometric:x", "geometric:0", "geometric:1"),
        *("geometric:1.5", "geometric:-0.2", "geometric:nan", "0.5,0.5", "1,1,1,1", "0.5,0.5,0", "1,1,-1"),
        *("1,nan,1", "1,inf,1", "1,,1"),
    ],
)
def test_what_is_no_prior_over_the_loops_is_refused(prior: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.prior=") as caught:
        log_prior(prior, 3)
    assert repr(prior) in str(caught.value)
    assert "geometric:0.3" in caught.value.hint


# ---- Stage I


@pytest.mark.parametrize("prior", ["geometric:0.4", "0.1,0.2,0.3,0.4"])
def test_any_prior_is_the_kl_form(prior: str) -> None:
    objective = StageOne(0.3, log_prior(prior, 4))
    plain = list(np.exp(log_prior(prior, 4).astype(np.float64)))
    value, dgate_logit = objective.value_and_dgate(LOSS, GATE_LOGIT)
    np.testing.assert_allclose(value, kl_objective(LOSS, GATE_LOGIT, plain, 0.3), rtol=1e-5)
    for r in range(4):
        nudge = np.zeros((4, 1))
        nudge[r] = 1e-5
        high, low = (kl_objective(LOSS, GATE_LOGIT + sign * nudge, plain, 0.3) for sign in (1, -1))
        np.testing.assert_allclose(dgate_logit[r], (high - low) / 2e-5, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(objective.loss_weight(GATE_LOGIT), exit_distribution_forward(GATE_LOGIT)[0])


def test_a_prior_draws_the_exit_distribution_to_itself() -> None:
    """With equal losses the KL term alone is left, and its minimum is the prior."""
    wanted = np.array([0.1, 0.2, 0.3, 0.4])
    objective = StageOne(1.0, log_prior("0.1,0.2,0.3,0.4", 4))
    gate_logit = np.zeros((4, 1), np.float32)
    for _ in range(2000):
        gate_logit -= np.float32(0.5) * objective.value_and_dgate(np.ones((4, 1), np.float32), gate_logit)[1]
    np.testing.assert_allclose(objective.loss_weight(gate_logit)[:, 0], wanted, atol=1e-4)


# ---- Stage II


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="'ahead' is not known") as caught:
        StageTwo("ahead")
    assert caught.value.hint == "use paper, look-ahead or best-later"


def test_the_two_targets_differ_in_which_gate_learns_from_which_improvement() -> None:
    """Only loop 3 helps (loops counted from 1): "paper" tells gate 3 to go on, "look-ahead" gate 2."""
    loss = np.array([[2.0], [2.0], [1.0], [1.0]], np.float32)
    gate_logit = np.zeros((4, 1), np.float32)
    go_on, stop = 1.0, -1.0  # sign of the derivative: descent lowers the logit of a gate that is to go on
    paper = np.sign(StageTwo("paper").value_and_dgate(loss, gate_logit)[1][:, 0])
    ahead = np.sign(StageTwo("look-ahead").value_and_dgate(loss, gate_logit)[1][:, 0])
    assert paper.tolist() == [0.0, stop, go_on, stop]
    assert ahead.tolist() == [stop, go_on, stop, 0.0]


def test_the_best_later_loop_counts_even_if_the_next_one_harms() -> None:
    """Loop 2 harms, loop 3 more than makes up for it: "look-ahead" would stop at once, "best-later" goes on."""
    loss = np.array([[2.0], [2.5], [1.0], [1.2]], np.float32)
    gate_logit = np.zeros((4, 1), np.float32)
    ahead = np.sign(StageTwo("look-ahead").value_and_dgate(loss, gate_logit)[1][:, 0])
    later = np.sign(StageTwo("best-later").value_and_dgate(loss, gate_logit)[1][:, 0])
    go_on, stop = 1.0, -1.0
    assert ahead.tolist() == [stop, go_on, stop, 0.0]
    assert later.tolist() == [go_on, go_on, stop, 0.0]


@pytest.mark.parametrize("target", STAGE2_TARGETS)
def test_stage_two_agrees_with_finite_differences(target: str) -> None:
    objective = StageTwo(target, 3.0, 0.05)
    _, dgate_logit = objective.value_and_dgate(LOSS, GATE_LOGIT)
    for r in range(4):
        nudge = np.zeros((4, 1), np.float32)
        nudge[r] = 1e-2
        high, low = (objective.value_and_dgate(LOSS, GATE_LOGIT + sign * nudge)[0] for sign in (1, -1))
        np.testing.assert_allclose(dgate_logit[r], (high - low) / 2e-2, rtol=1e-3, atol=1e-4)


def test_slope_and_threshold_say_what_an_improvement_is() -> None:
    """-(1/R) sum [w log(1 - lambda) + (1 - w) log lambda], w = sigmoid(k (improvement - gamma)), lambda = 1/2."""
    loss = np.array([[1.0], [0.9]], np.float32)
    gate_logit = np.array([[0.4], [0.0]], np.float32)
    value, dgate_logit = StageTwo("look-ahead", 3.0, 0.05).value_and_dgate(loss, gate_logit)
    wanted, stop = 1.0 / (1.0 + math.exp(-3.0 * (0.1 - 0.05))), 1.0 / (1.0 + math.exp(-0.4))
    expected = -0.5 * (wanted * math.log(1.0 - stop) + (1.0 - wanted) * math.log(stop))
    assert value[0] == pytest.approx(expected, rel=1e-5)
    assert dgate_logit[0, 0] == pytest.approx(0.5 * (stop - (1.0 - wanted)), rel=1e-4)


# ---- entropy


def test_entropy_of_certain_and_uniform() -> None:
    assert entropy(np.array([0.0, 1.0, 0.0], np.float32)) == 0.0
    assert entropy(np.full(4, 0.25, np.float32)) == pytest.approx(math.log(4.0))
