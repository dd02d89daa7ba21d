"""Cached decode against the full forward pass, rows of different length, exits that really save loops, the cache."""

import dataclasses

import numpy as np
import pytest

from looplm.cache import KeyValueCache
from looplm.decoder import Decoder
from looplm.errors import DataError
from looplm.exits import ExitRule, FixedDepth, LearnedGate
from looplm.generation import Session
from looplm.model import forward
from looplm.sizes import memory
from looplm.weights import Weights
from random_models import CONFIG, random_ids, random_weights, relative_error

TOLERANCE = 1e-5
ALL_LOOPS = LearnedGate(1.0)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


def decode(session: Session, input_ids: np.ndarray, rule: ExitRule = ALL_LOOPS) -> np.ndarray:
    """Advance through all columns of input_ids: BS -> hidden: RBSD."""
    states = []
    for column in np.ascontiguousarray(input_ids.T):
        session.advance(column, rule)
        states.append(session.hidden.copy())
    return np.stack(states, axis=2)


# ---- cached decode against the full forward pass


def worst_prefix_error(weights: Weights, input_ids: np.ndarray) -> float:
    """Prefill every possible part of the rows and decode the rest."""
    expected, worst = forward(weights, input_ids).hidden, 0.0
    length = input_ids.shape[1]
    for prefix in range(length + 1):
        session = Session(weights, batch=input_ids.shape[0], capacity=1)
        parts = []
        if prefix:
            parts.append(session.feed(input_ids[:, :prefix]).hidden)
        if prefix < length:
            parts.append(decode(session, input_ids[:, prefix:]))
        worst = max(worst, relative_error(np.concatenate(parts, axis=2), expected))
    return worst


@pytest.mark.kernels
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 4}, {"total_ut_steps": 1}, {"tie_word_embeddings": True, "num_hidden_layers": 1}],
    ids=str,
)
def test_cached_decode_is_the_full_forward_for_every_prefix(changes: dict[str, int]) -> None:
    assert worst_prefix_error(random_weights(dataclasses.replace(CONFIG, **changes)), random_ids(2, 9)) < TOLERANCE


def test_prefill_in_chunks_is_the_full_forward(weights: Weights) -> None:
    input_ids = random_ids(2, 16)
    expected = forward(weights, input_ids)
    session = Session(weights, batch=2)
    traces = [session.feed(part) for part in np.split(input_ids, [1, 3, 9, 10], axis=1)]
    for name in ("hidden", "gate_logit"):
        found = np.concatenate([getattr(trace, name) for trace in traces], axis=2)
        assert relative_error(found, getattr(expected, name)) < TOLERANCE


def test_a_slot_shared_by_all_loops_is_noticed(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeyValueCache, "first_slot", lambda cache, loop: 0)
    assert worst_prefix_error(weights, random_ids(2, 5)) > 1e-2


# ---- rows of different length


def padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows side by side, padded on the left with an arbitrary id -> input_ids: BS, start: B."""
    longest = max(row.size for row in rows)
    start = np.array([longest - row.size for row in rows])
    return np.stack([np.pad(row, (longest - row.size, 0), constant_values=7) for row in rows]), start


@pytest.mark.parametrize("rule", [ALL_LOOPS, LearnedGate(0.6)], ids=str)
@pytest.mark.parametrize("prefill", [0, 3, 6])
def test_a_left_padded_batch_is_its_single_rows(weights: Weights, rule: LearnedGate, prefill: int) -> None:
    rows = [random_ids(size, seed=size) for size in (9, 6, 4)]
    input_ids, start = padded(rows)
    together = Session(weights, batch=3, start=start, capacity=2)
    if prefill:
        together.feed(input_ids[:, :prefill])
    exits = [together.advance(column, rule) for column in np.ascontiguousarray(input_ids[:, prefill:].T)]
    found = together.logits(exits[-1])

    for b, row in enumerate(rows):
        alone, fed = Session(weights), max(0, prefill - start[b])
        if fed:
            alone.feed(row[None, :fed])
        single = [alone.advance(row[s : s + 1], rule)[0] for s in range(fed, row.size)]
        assert [exit_at[b] for exit_at in exits][-len(single) :] == single
        assert relative_error(found[b], alone.logits(np.array(single[-1:]))[0]) < TOLERANCE
    if rule is not ALL_LOOPS:
        assert any(len(set(exit_at)) > 1 for exit_at in exits), "the rows never stopped at different loops"


def test_positions_that_ignore_padding_are_noticed(weights: Weights) -> None:
    row = random_ids(6)
    input_ids, start = padded([row, random_ids(9, seed=9)])
    session = Session(weights, batch=2, start=start + np.array([-1, 0]))  # one padding token taken for text
    hidden = session.feed(input_ids).hidden[:, 0, 3:]
    assert relative_error(hidden, forward(weights, row[None]).hidden[:, 0]) > 1e-2


# ---- stopping


@pytest.fixture
def loops_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of every loop, as they happen."""
    calls, real = [], Decoder.run_loop

    def counted(decoder: Decoder, r: int, batch: int, length: int) -> None:
        calls.append(batch * length)
        real(decoder, r, batch, length)

    monkeypatch.setattr(Decoder, "run_loop", counted)
    return calls


@pytest.mark.parametrize("policy", ["last-exited", "full"])
def test_an_exit_really_stops_the_loops(weights: Weights, loops_run: list[int], policy: str) -> None:
    session = Session(weights, policy=policy)
    session.feed(random_ids(1, 4))
    for loops in range(1, CONFIG.total_ut_steps + 1):
        loops_run.clear()
        exit_at = session.advance(random_ids(1, seed=loops), FixedDepth(loops))
        run = loops if policy == "last-exited" else CONFIG.total_ut_steps
        assert exit_at[0] == loops - 1
        assert session.loops_run == run
        assert len(loops_run) == run


def test_slots_of_loops_that_did_not_run_hold_the_exited_loops(weights: Weights) -> None:
    session = Session(weights, batch=2, capacity=8)
    session.feed(random_ids(2, 3))
    session.cache.keys[..., 3:, :] = session.cache.values[..., 3:, :] = np.nan
    rule, exit_at = LearnedGate(0.5), np.zeros(2, np.int64)
    for column in random_ids(4, 2, seed=5):
        exit_at = session.advance(column, rule)
        at = session.filled - 1
        for cached in (session.cache.keys, session.cache.values):
            by_loop = cached.reshape(CONFIG.total_ut_steps, CONFIG.num_hidden_layers, *cached.shape[1:])[..., at, :]
            assert np.isfinite(by_loop).all()
            for b, r in enumerate(exit_at):
                for deeper in range(r + 1, CONFIG.total_ut_steps):
                    np.testing.assert_array_equal(by_loop[deeper, :, b], by_loop[r, :, b])
                for earlier in range(r):
                    assert relative_error(by_loop[earlier, :, b], by_loop[r, :, b]) > 1e-3
    assert np.isnan(session.cache.keys[..., session.filled :, :]).all()


def test_with_the_full_policy_every_loop_keeps_its_own(weights: Weights) -> None:
    input_ids = random_ids(1, 6)
    session = Session(weights, policy="full")
    hidden = decode(session, input_ids, LearnedGate(0.4))
    assert relative_error(hidden, forward(weights, input_ids).hidden) < TOLERANCE


# ---- the cache


def test_the_cache_doubles_and_keeps_what_it_has(weights: Weights) -> None:
    session = Session(weights, capacity=3)
    session.feed(random_ids(1, 3))
    keys = session.cache.keys.copy()
    capacities = []
    for column in random_ids(6, 1):
        session.advance(column, ALL_LOOPS)
        capacities.append(session.cache.capacity)
    assert capacities == [6, 6, 6, 12, 12, 12]
    np.testing.assert_array_equal(session.cache.keys[..., :3, :], keys)


def test_the_cache_takes_the_memory_that_is_stated() -> None:
    cache = KeyValueCache(CONFIG, batch=1, loops=CONFIG.total_ut_steps, capacity=10)
    assert cache.keys.nbytes + cache.values.nbytes == 10 * memory(CONFIG)["key_value_per_token"]


def test_a_session_does_not_go_beyond_the_context(weights: Weights) -> None:
    session = Session(weights)
    session.feed(random_ids(1, 40))
    for more in (lambda: session.advance(random_ids(1), ALL_LOOPS), lambda: session.feed(random_ids(1, 1))):
        with pytest.raises(DataError, match="41 tokens are more than the model's context of 40"):
            more()
