"""Threads that take items of a plan: none is waited for that has taken nothing, and no bit depends on who does what."""

import dataclasses
import threading

import numpy as np
import pytest

from looplm import generation
from looplm.generation import Session
from looplm.kernels import team as kernel
from looplm.kernels.product.stored import FEW_ROWS
from looplm.stored import FORMATS, Format, StoredWeights
from looplm.threads import Team, even_shares
from random_models import CONFIG, random_ids, random_weights
from stored_models import in_format
from test_session import decode

LARGE = dataclasses.replace(CONFIG, hidden_size=96, intermediate_size=320, vocab_size=600, max_position_embeddings=200)


def states(weights: StoredWeights, monkeypatch: pytest.MonkeyPatch, team: Team, length: int) -> np.ndarray:
    """A prompt, then tokens one by one, with a team of the test's own."""
    monkeypatch.setattr(generation, "team", lambda threads: team)
    session = Session(weights, threads=team.threads)
    fed = session.feed(random_ids(1, length)).hidden
    return np.concatenate([fed, decode(session, random_ids(1, 5, seed=1))], axis=2)


@pytest.fixture
def small_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("looplm.decoder.ITEM_BYTES", 1000)


@pytest.mark.kernels
@pytest.mark.usefixtures("small_items")
@pytest.mark.parametrize("length", [3, FEW_ROWS + 10])
@pytest.mark.parametrize("name", FORMATS)
def test_a_helper_that_never_comes_is_not_waited_for(
    name: Format, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, _ = in_format(name, random_weights(LARGE))
    expected = states(weights, monkeypatch, Team(1), length)
    lonely = Team(3)
    lonely._wake = []  # whoever sleeps goes on sleeping
    np.testing.assert_array_equal(states(weights, monkeypatch, lonely, length), expected)


@pytest.mark.kernels
@pytest.mark.usefixtures("small_items")
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_no_bit_depends_on_who_does_what(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, _ = in_format("bfloat16", random_weights(LARGE))
    expected = states(weights, monkeypatch, Team(1), 3)
    several = Team(threads)
    for _ in range(30):
        np.testing.assert_array_equal(states(weights, monkeypatch, several, 3), expected)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_every_item_is_taken_once(parts: int, count: int) -> None:
    control = kernel.control_words(parts)
    taken: list[list[int]] = [[] for _ in range(parts)]

    def take(part: int) -> None:
        while (item := kernel._take(control, part)) >= 0:
            taken[part].append(item)

    for phase in range(3):
        kernel._offer(control, phase, count)
        crowd = [threading.Thread(target=take, args=(part,)) for part in range(parts)]
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join()
        assert sorted(item for own in taken for item in own) == sorted([*range(count)] * (phase + 1))


def test_an_own_part_comes_first() -> None:
    control = kernel.control_words(2)
    kernel._offer(control, 0, 6)
    assert [kernel._take(control, 1) for _ in range(7)] == [3, 4, 5, 0, 1, 2, -1]


def test_a_helper_that_comes_late_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for the items of a command that is over, while the next one has not begun."""
    weights, _ = in_format("float32")
    team = Team(2)
    expected = states(weights, monkeypatch, team, 3)
    assert kernel.work.call(team._at, int(team._control[kernel.OVER]), 1) == 0
    np.testing.assert_array_equal(states(weights, monkeypatch, team, 3), expected)


def test_work_is_shared_out_evenly() -> None:
    sizes = {"a": 1, "b": 6, "c": 2, "d": 4, "e": 3}
    shares = even_shares(sizes, 2)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    assert [sum(map(sizes.get, share)) for share in shares] == [8, 8]
    assert even_shares({"a": 5}, 3) == [["a"], [], []]
