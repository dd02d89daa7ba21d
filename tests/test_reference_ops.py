"""The reference operations against numbers worked out by hand.  Their gradients are checked in test_contract.py."""

import math

import numpy as np
import pytest

from looplm_reference import ops


def column(*values: float) -> np.ndarray:
    """R values -> R x 1 x 1: one position."""
    return np.array(values, np.float64).reshape(-1, 1, 1)


def logit(probability: float) -> float:
    return math.log(probability / (1.0 - probability))


# ---- the exit law


def test_the_exit_law_with_hazards_of_a_half_a_quarter_and_anything() -> None:
    prob, log_prob = ops.exit_distribution_forward(column(logit(0.5), logit(0.25), 3.0))
    assert prob.ravel() == pytest.approx([0.5, 0.125, 0.375])  # the last takes the remainder, whatever its gate says
    assert log_prob.ravel() == pytest.approx(np.log([0.5, 0.125, 0.375]))


def test_saturated_gates_are_exact() -> None:
    prob, log_prob = ops.exit_distribution_forward(column(-1e4, 1e4, 1e4, -1e4))
    assert prob.ravel().tolist() == [0.0, 1.0, 0.0, 0.0]
    assert log_prob.ravel().tolist() == [-1e4, 0.0, -1e4, -2e4]
    (gradient,) = ops.exit_distribution_backward(column(1.0, 2.0, 3.0, 4.0), column(-1e4, 1e4, 1e4, -1e4))
    assert gradient.ravel().tolist() == [0.0, 0.0, 0.0, 0.0]


def test_one_loop_exits_there_and_its_gate_learns_nothing() -> None:
    prob, log_prob = ops.exit_distribution_forward(column(-7.0))
    assert (prob.item(), log_prob.item()) == (1.0, 0.0)
    assert ops.exit_distribution_backward(column(5.0), column(-7.0))[0].item() == 0.0


def test_exit_probabilities_sum_to_one() -> None:
    gates = np.random.default_rng(0).normal(0.0, 4.0, (6, 3, 5))
    assert ops.exit_distribution_forward(gates)[0].sum(0) == pytest.approx(np.ones((3, 5)), abs=1e-14)


@pytest.mark.parametrize(
    ("threshold", "loop"),
    [(0.0, 0), (0.25, 0), (0.26, 1), (0.5, 1), (0.75, 2), (0.76, 3), (0.999, 3), (1.0, 3), (2.0, 3)],
)
def test_exit_is_the_first_loop_whose_sum_reaches_the_threshold(threshold: float, loop: int) -> None:
    assert ops.exit_loop(column(0.25, 0.25, 0.25, 0.25), threshold)[0].item() == loop


def test_a_threshold_of_one_means_all_loops_even_for_a_certain_gate() -> None:
    certain = column(1.0, 0.0, 0.0)
    assert ops.exit_loop(certain, 1.0)[0].item() == 2
    assert ops.exit_loop(certain, np.nextafter(1.0, 0.0))[0].item() == 0


def test_a_sum_that_never_reaches_the_threshold_means_the_last_loop() -> None:
    assert ops.exit_loop(column(0.1, 0.1, 0.1), 0.9)[0].item() == 2


# ---- losses


def test_cross_entropy_by_hand_and_not_counted() -> None:
    logits = np.log(np.array([[[1.0, 2.0, 5.0], [1.0, 1.0, 2.0]]]))
    loss, lse = ops.cross_entropy_forward(logits, np.array([[2, -1]]))
    assert loss.ravel() == pytest.approx([math.log(8.0 / 5.0), 0.0])
    assert lse.ravel() == pytest.approx([math.log(8.0), math.log(4.0)])
    (dlogits,) = ops.cross_entropy_backward(np.array([[2.0, 3.0]]), logits, np.array([[2, -1]]), lse)
    assert dlogits[0] == pytest.approx(np.array([[0.25, 0.5, -0.75], [0.0, 0.0, 0.0]]))


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    loss, _ = ops.cross_entropy_forward(np.array([[[1e5, 0.0]]]), np.array([[1]]))
    assert loss.item() == 1e5


def test_stage1_is_expected_loss_minus_entropy() -> None:
    gates, loss = column(0.0, 0.0, 0.0), column(3.0, 2.0, 1.0)  # p = 1/2, 1/4, 1/4
    entropy = 0.5 * math.log(2.0) + 0.5 * math.log(4.0)
    objective, prob = ops.stage1_forward(loss, gates, np.zeros(3), 0.1)
    assert prob.ravel() == pytest.approx([0.5, 0.25, 0.25])
    assert objective.item() == pytest.approx(2.25 - 0.1 * entropy)


def test_stage1_is_smallest_against_a_prior_where_the_exit_law_equals_it() -> None:
    prior = np.array([0.2, 0.3, 0.5])
    at_prior = column(logit(0.2), logit(0.3 / 0.8), 0.0)
    objective, _ = ops.stage1_forward(column(1.0, 1.0, 1.0), at_prior, np.log(prior), 0.7)
    assert objective.item() == pytest.approx(1.0)  # the divergence is zero
    _, dgate = ops.stage1_backward(np.ones((1, 1)), column(1.0, 1.0, 1.0), at_prior, np.log(prior), 0.7)
    assert dgate == pytest.approx(np.zeros((3, 1, 1)), abs=1e-15)


def test_stage1_gradient_is_the_formula_of_two_loops() -> None:
    # Two loops: dL/dz = hazard (1 - hazard) (loss_1 - loss_2 + w (log p_1 - log p_2)).
    hazard, weight = 0.3, 0.4
    _, dgate = ops.stage1_backward(np.ones((1, 1)), column(2.0, 5.0), column(logit(hazard), 9.0), np.zeros(2), weight)
    expected = hazard * (1 - hazard) * (2.0 - 5.0 + weight * (math.log(hazard) - math.log(1 - hazard)))
    assert dgate.ravel() == pytest.approx([expected, 0.0])


def test_stage1_of_saturated_gates_is_finite() -> None:
    gates, loss = column(1e4, -1e4, 1e4), column(1.0, 2.0, 3.0)
    assert ops.stage1_forward(loss, gates, np.zeros(3), 0.1)[0].item() == 1.0
    dloss, dgate = ops.stage1_backward(np.ones((1, 1)), loss, gates, np.zeros(3), 0.1)
    assert dloss.ravel().tolist() == [1.0, 0.0, 0.0]
    assert dgate.ravel().tolist() == [0.0, 0.0, 0.0]


def test_continue_target_looks_back_in_the_paper_and_ahead_on_request() -> None:
    loss = column(3.0, 2.0, 2.5)  # loop 2 gains 1, loop 3 gains nothing
    gained, nothing = 1.0 / (1.0 + math.exp(-50.0 * 0.995)), 1.0 / (1.0 + math.exp(0.25))
    wish, counted = ops.continue_target(loss, 50.0, 0.005, "paper")
    assert (wish.ravel().tolist()[0], counted.tolist()) == (0.0, [0.0, 1.0, 1.0])
    assert wish.ravel()[1:] == pytest.approx([gained, nothing])
    wish, counted = ops.continue_target(loss, 50.0, 0.005, "look-ahead")
    assert (wish.ravel().tolist()[2], counted.tolist()) == (0.0, [1.0, 1.0, 0.0])
    assert wish.ravel()[:2] == pytest.approx([gained, nothing])
    assert nothing == pytest.approx(0.4378, abs=1e-4)  # so that the best hazard is never above 0.5622


def test_stage2_divides_by_all_loops_though_one_gate_is_not_counted() -> None:
    gates, wish, counted = column(5.0, logit(0.25), 0.0), column(0.0, 0.6, 0.5), np.array([0.0, 1.0, 1.0])
    expected = -(0.6 * math.log(0.75) + 0.4 * math.log(0.25) + math.log(0.5)) / 3.0
    assert ops.stage2_forward(gates, wish, counted)[0].item() == pytest.approx(expected)
    (dgate,) = ops.stage2_backward(np.ones((1, 1)), gates, wish, counted)
    assert dgate.ravel() == pytest.approx([0.0, (0.25 - 0.4) / 3.0, 0.0])


def test_stage2_of_one_loop_is_nothing() -> None:
    wish, counted = ops.continue_target(column(3.0), 50.0, 0.005, "look-ahead")
    assert ops.stage2_forward(column(1.0), wish, counted)[0].item() == 0.0


# ---- layers


def test_rmsnorm_by_hand() -> None:
    y, rrms = ops.rmsnorm_forward(np.array([[[3.0, 4.0]]]), np.array([1.0, 10.0]), 3.5)  # mean square 12.5
    assert rrms.item() == pytest.approx(0.25)
    assert y.ravel() == pytest.approx([0.75, 10.0])
    y, _ = ops.rmsnorm_residual_forward(np.array([[[3.0, 4.0]]]), np.array([[[1.0, 2.0]]]), np.array([1.0, 10.0]), 3.5)
    assert y.ravel() == pytest.approx([1.75, 12.0])


def test_rope_turns_channel_i_with_channel_i_plus_half() -> None:
    x = np.array([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    (y,) = ops.rope_forward(x, np.array([[2]]), 100.0)
    assert y.ravel() == pytest.approx([math.cos(2.0), 0.0, math.sin(2.0), 0.0])
    x = np.array([0.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    (y,) = ops.rope_forward(x, np.array([[2]]), 100.0)  # the second pair turns 100 ** (-1/2) as fast
    assert y.ravel() == pytest.approx([0.0, math.cos(0.2), 0.0, math.sin(0.2)])


def test_rope_scores_depend_on_distance_alone() -> None:
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 6))

    def score(at_q: int, at_k: int) -> float:
        turned = (ops.rope_forward(x, np.array([[at]]), 50.0)[0] for x, at in ((q, at_q), (k, at_k)))
        return float(np.sum(next(turned) * next(turned)))

    assert score(9, 4) == pytest.approx(score(25, 20))
    assert score(9, 4) != pytest.approx(score(4, 9))


def test_attention_by_hand() -> None:
    q, k = np.array([0.0, 2.0]).reshape(1, 2, 1, 1), np.array([5.0, 5.0 + math.log(3.0) / 2.0]).reshape(1, 2, 1, 1)
    v = np.array([8.0, 4.0]).reshape(1, 2, 1, 1)
    y, lse = ops.attention_forward(q, k, v, np.array([0]))
    assert y.ravel() == pytest.approx([8.0, 8.0 / 4.0 + 4.0 * 3.0 / 4.0])  # the first query sees one key, weights 1 : 3
    assert lse.ravel() == pytest.approx([0.0, 10.0 + math.log(4.0)])


def test_attention_scales_by_the_root_of_the_channels() -> None:
    q = np.ones((1, 1, 1, 4))
    _, lse = ops.attention_forward(q, q, q, np.array([0]))
    assert lse.item() == pytest.approx(2.0)


def test_attention_heads_share_their_group_and_padding_is_not_seen() -> None:
    q, k = np.zeros((1, 3, 4, 2)), np.zeros((1, 3, 2, 2))
    v = np.arange(6.0).reshape(1, 3, 2, 1) * np.ones(2)  # key p, group g holds 2 p + g
    y, lse = ops.attention_forward(q, k, v, np.array([1]))
    assert y[0, :, :, 0] == pytest.approx(np.array([[0, 0, 0, 0], [2, 2, 3, 3], [3, 3, 4, 4]], np.float64))
    assert lse[0, :, 0] == pytest.approx([0.0, 0.0, math.log(2.0)])
    dq, dk, dv = ops.attention_backward(np.ones_like(y), q, k, v, np.array([1]), y, lse)
    assert dv[0, :, :, 0] == pytest.approx(np.array([[0, 0], [3, 3], [1, 1]], np.float64))  # 2 heads x (1 + 1/2), x 1/2
    assert not dq[0, 0].any()
    assert not dk[0, 0].any()


def test_swiglu_by_hand_and_saturated() -> None:
    (y,) = ops.swiglu_forward(np.array([[[math.log(3.0), -1e4, 1e4]]]), np.array([[[4.0, 5.0, 6.0]]]))
    assert y.ravel() == pytest.approx([3.0 * math.log(3.0), 0.0, 6e4])


def test_a_repeated_token_collects_every_gradient() -> None:
    dy = np.array([[[1.0], [2.0], [4.0]]])
    (dweight,) = ops.embedding_backward(dy, np.array([[1, 0, 1]]), np.zeros((3, 1)))
    assert dweight.ravel().tolist() == [2.0, 5.0, 0.0]


def test_linear_and_gate_by_hand() -> None:
    (y,) = ops.linear_forward(np.array([[[1.0, 2.0]]]), np.array([[3.0, 4.0], [5.0, 6.0], [0.0, 1.0]]))
    assert y.ravel().tolist() == [11.0, 17.0, 2.0]
    (z,) = ops.gate_forward(np.array([[[[1.0, 2.0]]], [[[0.0, 1.0]]]]), np.array([[3.0, 4.0]]), np.array([0.5]))
    assert z.ravel().tolist() == [11.5, 4.5]


# ---- optimizer


def test_adamw_against_two_steps_by_hand() -> None:
    weight, first, second = np.array([2.0]), np.zeros(1), np.zeros(1)
    settings = {"learning_rate": 0.1, "beta1": 0.5, "beta2": 0.75, "eps": 1.0, "weight_decay": 0.2}
    ops.adamw_update(weight, np.array([4.0]), first, second, 1, **settings)
    assert (first.item(), second.item()) == (2.0, 4.0)
    # moments without bias: 4 and 16; 2 - 0.1 * (0.2 * 2 + 4 / (4 + 1))
    assert weight.item() == pytest.approx(1.88)
    ops.adamw_update(weight, np.array([0.0]), first, second, 2, **settings)
    assert (first.item(), second.item()) == (1.0, 3.0)
    # without bias: 1 / 0.75 and 3 / 0.4375
    assert weight.item() == pytest.approx(1.88 - 0.1 * (0.2 * 1.88 + (1 / 0.75) / (math.sqrt(3 / 0.4375) + 1.0)))


def test_gradient_norm_is_euclidean() -> None:
    assert ops.gradient_norm(np.array([3.0, 0.0, -4.0])) == (5.0,)
