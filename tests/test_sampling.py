"""Sampling: distributions against numbers worked by hand, and the coin that chooses from them."""

import numpy as np
import pytest

from looplm.errors import DataError, UsageError
from looplm.sampling import GREEDY, Sampling, choose, draw, probabilities

# Probabilities 1/2, 1/4, 1/8, 1/8 at temperature 1, shifted by a constant that must not matter.
LOGITS = (np.log(np.array([0.25, 0.5, 0.125, 0.125])) + 3.0).astype(np.float32)


def prob_of(**settings: float) -> np.ndarray:
    return probabilities(LOGITS, Sampling(**{"temperature": 1.0, **settings}))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.25, 0.5, 0.125, 0.125]),
        ({"temperature": 0.5}, np.array([4, 16, 1, 1]) / 22),  # squares
        ({"temperature": 2.0}, np.array([2**0.5, 2, 1, 1]) / (2**0.5 + 4)),  # square roots
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 1e-310}, [0, 1, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [1 / 3, 2 / 3, 0, 0]),
        ({"top_k": 3}, [0.25, 0.5, 0.125, 0.125]),  # a tie with the third stays
        ({"top_k": 9}, [0.25, 0.5, 0.125, 0.125]),
        ({"top_p": 0.0}, [0, 1, 0, 0]),
        ({"top_p": 0.49}, [0, 1, 0, 0]),
        ({"top_p": 0.51}, [1 / 3, 2 / 3, 0, 0]),  # the token that crosses the border stays
        ({"top_p": 0.8}, [2 / 7, 4 / 7, 1 / 7, 0]),  # of equal tokens the lower id first
        ({"min_p": 0.3}, [1 / 3, 2 / 3, 0, 0]),
        ({"min_p": 0.2}, [0.25, 0.5, 0.125, 0.125]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # top-p sees 1/3, 2/3, not 1/4, 1/2
        ({"temperature": 0.5, "min_p": 0.2}, [0.2, 0.8, 0, 0]),  # min-p sees the sharpened distribution
    ],
)
def test_distribution(settings: dict[str, float], expected: list[float]) -> None:
    np.testing.assert_allclose(prob_of(**settings), expected, atol=1e-7)


def test_top_p_that_is_reached_exactly_needs_no_further_token() -> None:
    prob = probabilities(np.zeros(4, np.float32), Sampling(temperature=1.0, top_p=0.5))
    np.testing.assert_array_equal(prob, [0.5, 0.5, 0, 0])


def test_repetition_penalty_makes_seen_tokens_less_likely_on_both_sides_of_zero() -> None:
    logits = np.array([2.0, -1.0, 0.5, -3.0], np.float32)
    seen = np.array([True, True, False, False])
    prob = probabilities(logits, Sampling(temperature=1.0, repetition_penalty=2.0), seen)
    expected = np.exp([1.0, -2.0, 0.5, -3.0])
    np.testing.assert_allclose(prob, expected / expected.sum(), rtol=1e-6)


def test_repetition_penalty_acts_on_greedy_choice_too() -> None:
    seen = np.array([False, True, False, False])
    assert choose(LOGITS, Sampling(temperature=0.0, repetition_penalty=5.0), 0.5, seen)[0] == 0
    assert choose(LOGITS, GREEDY, 0.5, seen)[0] == 1


def test_draw_lays_tokens_out_in_order_of_ids() -> None:
    prob = np.array([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    coins = [0.0, 0.2499, 0.25, 0.7499, 0.75, np.nextafter(1.0, 0.0)]
    assert [draw(prob, coin) for coin in coins] == [1, 1, 3, 3, 4, 4]


def test_draw_never_leaves_the_vocabulary_where_the_sum_rounds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        prob = rng.random(7)
        prob[-1] = 0.0
        assert draw(prob / prob.sum(), np.nextafter(1.0, 0.0)) == 5


def test_many_draws_follow_the_distribution() -> None:
    rng = np.random.default_rng(1)
    counts = np.bincount([draw(prob_of(), rng.random()) for _ in range(20_000)], minlength=4)
    # four standard deviations of a share of one half
    np.testing.assert_allclose(counts / 20_000, prob_of(), atol=4 * 0.5 / np.sqrt(20_000))


@pytest.mark.parametrize("temperature", [1.0, 0.8, 3.0, 0.05, 0.0])
@pytest.mark.parametrize("size", [1, 7, 256, 1000, 4099])
def test_the_kernel_draws_as_the_distribution_says(size: int, temperature: float) -> None:
    """The same token for the same coin, but where the coin falls within rounding of a border."""
    rng, settings = np.random.default_rng(size), Sampling(temperature=temperature)
    for number in range(60):
        logits = (rng.standard_normal(size) * 4).astype(np.float32)
        logits[rng.random(size) < 0.1] = -np.inf
        logits[rng.integers(size)] = 3.0
        prob = probabilities(logits, settings)
        coin = (0.0, np.nextafter(1.0, 0.0), rng.random())[min(number, 2)]
        token, logprob = choose(logits, settings, coin)
        borders = np.concatenate(([0.0], np.cumsum(prob)))
        assert prob[token] > 0.0
        assert borders[token] - 2e-6 <= coin < borders[token + 1] + 2e-6 or temperature == 0.0
        assert logprob == pytest.approx(np.log(probabilities(logits, Sampling(temperature=1.0))[token]), abs=2e-6)
        if temperature == 0.0:
            assert token == logits.argmax()


def test_the_general_way_chooses_alike() -> None:
    """A setting that changes nothing but the way: no token is as unlikely as that."""
    rng, agreed = np.random.default_rng(2), 0
    for _ in range(200):
        logits, coin = rng.standard_normal(600).astype(np.float32), rng.random()
        agreed += choose(logits, Sampling(), coin)[0] == choose(logits, Sampling(min_p=1e-12), coin)[0]
    assert agreed >= 199


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 0.999999])
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
def test_top_p_of_a_large_vocabulary_is_as_if_all_were_sorted(spread: float, top_p: float) -> None:
    logits = np.round(np.random.default_rng(3).standard_normal(5000) * spread, 1).astype(np.float32)  # with ties
    prob = probabilities(logits, Sampling(temperature=1.0))
    order = np.argsort(-prob, kind="stable")
    count = 1 + int((np.cumsum(prob[order]) < top_p).sum())
    found = probabilities(logits, Sampling(temperature=1.0, top_p=top_p))
    assert abs(np.count_nonzero(found) - count) <= (0 if spread else 1)  # equal shares: the sum may round
    np.testing.assert_array_equal(np.flatnonzero(found), np.sort(order[: np.count_nonzero(found)]))


def test_logprob_is_the_models_own_whatever_the_settings() -> None:
    token, logprob = choose(LOGITS, Sampling(temperature=0.3, top_k=1), 0.9)
    assert token == 1
    assert logprob == pytest.approx(np.log(0.5), abs=1e-6)


def test_inputs_come_back_unchanged() -> None:
    logits, seen = LOGITS.copy(), np.array([True, False, True, False])
    probabilities(logits, Sampling(top_k=2, top_p=0.5, min_p=0.1, repetition_penalty=1.3), seen)
    np.testing.assert_array_equal(logits, LOGITS)
    np.testing.assert_array_equal(seen, [True, False, True, False])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(value: float) -> None:
    with pytest.raises(DataError, match=str(value)):
        probabilities(np.array([0.0, value, 1.0], np.float32), GREEDY)
    for settings in (GREEDY, Sampling()):
        with pytest.raises(DataError, match=str(value)):
            choose(np.array([0.0, value, 1.0], np.float32), settings, 0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": np.nan},
        {"temperature": np.inf},
        {"top_k": -1},
        {"top_p": 1.1},
        {"top_p": np.nan},
        {"min_p": -0.1},
        {"min_p": np.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": np.nan},
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, float]) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(UsageError, match=f"{name}={value}") as error:
        Sampling(**settings)
    assert error.value.hint
