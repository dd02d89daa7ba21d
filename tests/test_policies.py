"""Cache policies: what they keep, that `exact` is `full` to the bit, and that sharing really gives memory back."""

import tracemalloc

import numpy as np
import pytest

from looplm.cache import POLICIES, SHARED, KeyValueCache, Policy
from looplm.decoder import Decoder
from looplm.deferral import MOST_DEFERRED, Deferral, Waiting
from looplm.errors import UsageError
from looplm.exits import ExitRule, FixedDepth, LearnedGate
from looplm.generation import Generated, Session, generate, rewind
from looplm.policies import figures, walk_all
from looplm.sampling import GREEDY
from looplm.sharing import SharedCache
from looplm.sizes import key_value_bytes_by_policy
from looplm.weights import Weights
from random_models import CONFIG, batch_of, random_ids, random_weights

LOOPS, LAYERS = CONFIG.total_ut_steps, CONFIG.num_hidden_layers
BOUNDS = (1, 2, 7, 16, MOST_DEFERRED)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


def written(weights: Weights, prompt: np.ndarray, policy: Policy, **changes) -> list[Generated]:  # type: ignore[no-untyped-def]
    settings = {"rule": LearnedGate(0.5), "rng": np.random.default_rng(0), "sampling": GREEDY, "max_new_tokens": 14}
    return list(generate(weights, prompt, policy=policy, **{**settings, **changes}))


def read(tokens: list[Generated]) -> list[tuple[int, int, float]]:
    """All of a text but what it cost; the log-probability tells bits apart."""
    return [(token.token_id, token.exit_loop, token.logprob) for token in tokens]


def poisoned(weights: Weights, policy: Policy, **more: object) -> Session:
    """A session in which keys and values that were never computed show."""
    session = Session(weights, policy=policy, capacity=40, **more)  # type: ignore[arg-type]
    for array in (session.cache.keys, session.cache.values):
        array[...] = np.nan if array.dtype == np.float32 else 0x7FC0
    return session


def advance(session: Session, ids: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """Decode ids: N, each to its own depth (N) -> the state it was read from: ND."""
    found = []
    for token, depth in zip(ids, depths, strict=True):
        exit_at = session.advance(np.array([token]), FixedDepth(int(depth)))
        found.append(session.hidden[exit_at[0], 0].copy())
    return np.stack(found)


def by_loop(session: Session) -> list[np.ndarray]:
    """Keys and values of the positions known: R x L x B x G x P x K each."""
    arrays = (session.cache.keys, session.cache.values)
    return [array.reshape(LOOPS, LAYERS, *array.shape[1:])[..., : session.filled, :] for array in arrays]


# ---- exact


def different(weights: Weights, rule: ExitRule, prompts: int, **changes: object) -> list[int]:
    """Seeds of the prompts that `exact` does not continue as `full` does, bit by bit."""
    found = []
    for seed in range(prompts):
        prompt = random_ids(1 + seed % 9, seed=seed)
        full = read(written(weights, prompt, "full", rule=rule))
        if read(written(weights, prompt, "exact", rule=rule, **changes)) != full:
            found.append(seed)
    return found


@pytest.mark.parametrize("bound", BOUNDS)
def test_exact_is_full_token_by_token(weights: Weights, bound: int) -> None:
    for q in (0.3, 0.5, 0.8):
        assert different(weights, LearnedGate(q), 12, max_deferred=bound) == []


def test_exact_is_full_under_every_kind_of_rule_and_cache(weights: Weights) -> None:
    from looplm.exits import Bounded, bind, make_rule

    for name, threshold in (("change", 0.5), ("kl", 0.1), ("top", 0.3), ("margin", 0.5), ("stable", 2)):
        assert different(weights, bind(make_rule(name, threshold), weights), 4) == []
    assert different(weights, Bounded(LearnedGate(0.4), min_loops=2), 4) == []
    assert different(weights, LearnedGate(0.5), 2, threads=2) == []
    prompt = random_ids(4)
    full, exact = (written(weights, prompt, policy, kv_dtype="bfloat16") for policy in ("full", "exact"))
    assert read(exact) == read(full)


def test_a_deferral_that_goes_wrong_is_noticed(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Deferral._late

    def skipped(deferral: Deferral, r: int) -> list[Waiting]:
        return real(deferral, r)[1:]

    def unturned(deferral: Deferral, r: int) -> list[Waiting]:
        return [each._replace(position=each.position - 1) for each in real(deferral, r)]

    def stale(deferral: Deferral, r: int) -> list[Waiting]:
        return [each._replace(state=np.roll(each.state, 1)) for each in real(deferral, r)]

    def never(deferral: Deferral, r: int) -> list[Waiting]:
        return []

    ids, depths = random_ids(25, seed=1), np.random.default_rng(0).integers(1, LOOPS + 1, 25)
    expected = advance(poisoned(weights, "full"), ids, depths)
    for wrong in (real, skipped, unturned, stale, never):
        monkeypatch.setattr(Deferral, "_late", wrong)
        found = advance(poisoned(weights, "exact", max_deferred=7), ids, depths)
        assert np.array_equal(found, expected) == (wrong is real), wrong.__name__


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deferred_keys_and_values_are_those_of_running_every_loop(weights: Weights, bound: int, dtype: str) -> None:
    ids, depths = random_ids(25, seed=1), np.random.default_rng(bound).integers(1, LOOPS + 1, 25)
    kept, states = [], []
    for policy in ("full", "exact"):
        session = poisoned(weights, policy, max_deferred=bound, kv_dtype=dtype)  # type: ignore[arg-type]
        session.feed(random_ids(1, 5))
        states.append(advance(session, ids, depths))
        if session.deferral:
            assert len(session.deferral.waiting) < bound
            session.deferral.catch_up()
            assert not session.deferral.waiting
        kept.append(by_loop(session))
    np.testing.assert_array_equal(states[1], states[0])
    for full, exact in zip(*kept, strict=True):
        np.testing.assert_array_equal(exact, full)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(position, loop) of every row of every pass of decoding, as they happen."""
    found: list[tuple[int, int]] = []
    rows, loop = Decoder.run_rows, Decoder.run_loop

    def run_rows(decoder: Decoder, loops: np.ndarray, *more: np.ndarray) -> None:
        from looplm.kernels.plan import ROW_POSITION

        found.extend(zip(decoder._places[: len(loops), ROW_POSITION].tolist(), loops.tolist(), strict=True))
        rows(decoder, loops, *more)

    def run_loop(decoder: Decoder, r: int, batch: int, length: int) -> None:
        from looplm.kernels.plan import ROW_POSITION

        found.extend((position, r) for position in decoder._places[: batch * length, ROW_POSITION].tolist())
        loop(decoder, r, batch, length)

    monkeypatch.setattr(Decoder, "run_rows", run_rows)
    monkeypatch.setattr(Decoder, "run_loop", run_loop)
    return found


@pytest.mark.parametrize("bound", BOUNDS)
def test_no_loop_of_a_token_is_computed_twice_nor_before_it_is_needed(
    weights: Weights, computed: list[tuple[int, int]], bound: int
) -> None:
    depths = np.random.default_rng(3).integers(1, LOOPS + 1, 30)
    session = Session(weights, policy="exact", max_deferred=bound)
    advance(session, random_ids(30), depths)
    assert len(computed) == len(set(computed))
    deepest = [max(depths[position:]) for position in range(30)]  # what some token from there on asks for
    if bound == MOST_DEFERRED:
        assert {(p, r) for p in range(30) for r in range(deepest[p])} <= set(computed)
    assert session.deferral is not None
    session.deferral.catch_up()
    assert sorted(computed) == [(position, r) for position in range(30) for r in range(LOOPS)]
    assert session.deferral.rows_run == 30 * LOOPS - depths.sum()


def test_what_waits_runs_in_one_pass_with_the_token_that_needs_it(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    rows, loop = Decoder.run_rows, Decoder.run_loop
    monkeypatch.setattr(Decoder, "run_rows", lambda d, loops, *more: (passes.append(len(loops)), rows(d, loops, *more)))
    monkeypatch.setattr(Decoder, "run_loop", lambda d, r, b, length: (passes.append(b), loop(d, r, b, length)))
    session = Session(weights, policy="exact")
    advance(session, random_ids(4), np.array([1, 2, 1, LOOPS]))
    assert passes == [1, *[1, 2], 1, *[1, 2, 4, 4, 4]]
    assert session.deferral is not None
    assert session.deferral.waiting == []
    assert session.deferral.passes == 0


def test_a_bound_makes_all_that_wait_catch_up(weights: Weights) -> None:
    session = Session(weights, policy="exact", max_deferred=3)
    assert session.deferral is not None
    seen = []
    for token in random_ids(7):
        session.advance(np.array([token]), FixedDepth(1))
        seen.append(len(session.deferral.waiting))
    assert seen == [1, 2, 0, 1, 2, 0, 1]
    assert session.deferral.passes == 2 * (LOOPS - 1)


@pytest.mark.parametrize("bound", [0, -1, MOST_DEFERRED + 1])
def test_a_bound_that_no_pass_can_take_is_refused(weights: Weights, bound: int) -> None:
    with pytest.raises(UsageError, match=f"{bound} tokens cannot wait") as error:
        Session(weights, policy="exact", max_deferred=bound)
    assert error.value.hint == f"use a number from 1 to {MOST_DEFERRED}"


@pytest.mark.parametrize("policy", ["exact", "shared-last", "average", "first", "last-exited"])
def test_a_session_rewound_is_one_that_never_went_on(weights: Weights, policy: Policy) -> None:
    ids, depths = random_ids(12, seed=4), np.random.default_rng(4).integers(1, LOOPS + 1, 12)
    found = []
    for astray in (False, True):
        session = Session(weights, policy=policy, max_deferred=5)
        session.feed(random_ids(1, 4))
        states = [advance(session, ids[:6], depths[:6])]
        if astray:
            advance(session, ids[8:], depths[8:])
            rewind(session, 10)
        states.append(advance(session, ids[6:], depths[6:]))
        if astray:  # and once more in a second prompt
            session.feed(random_ids(1, 3, seed=9))
            rewind(session, 16)
        session.feed(random_ids(1, 3, seed=8))
        states.append(advance(session, ids[:3], depths[:3]))
        found.append(np.concatenate(states))
    np.testing.assert_array_equal(found[1], found[0])


def test_an_interrupted_token_leaves_no_trace(weights: Weights) -> None:
    """As when Ctrl-C comes between two loops: the position is begun anew."""
    ids, depths = random_ids(10, seed=4), np.random.default_rng(5).integers(1, LOOPS + 1, 10)
    found = []
    for interrupted in (False, True):
        session = Session(weights, policy="exact")
        states = [advance(session, ids[:5], depths[:5])]
        if interrupted:
            session.begin(np.array([1]))
            session.next_loop()
            session.next_loop()
        found.append(np.concatenate([*states, advance(session, ids[5:], depths[5:])]))
    np.testing.assert_array_equal(found[1], found[0])


# ---- all policies


def one_loop() -> Weights:
    import dataclasses

    return random_weights(dataclasses.replace(CONFIG, total_ut_steps=1))


@pytest.mark.parametrize("policy", POLICIES)
def test_with_one_loop_every_policy_is_full(policy: Policy) -> None:
    weights, prompt = one_loop(), random_ids(5)
    for dtype in ("float32", "bfloat16"):
        full = written(weights, prompt, "full", kv_dtype=dtype)
        assert read(written(weights, prompt, policy, kv_dtype=dtype)) == read(full)


@pytest.mark.parametrize("policy", POLICIES)
def test_all_loops_always_is_no_approximation_unless_slots_are_shared(weights: Weights, policy: Policy) -> None:
    rule, prompt = LearnedGate(1.0), random_ids(5)
    same = read(written(weights, prompt, policy, rule=rule)) == read(written(weights, prompt, "full", rule=rule))
    assert same == (policy not in SHARED)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_position_takes_the_memory_that_is_stated(weights: Weights, policy: Policy, dtype: str) -> None:
    session = Session(weights, policy=policy, capacity=12, kv_dtype=dtype)  # type: ignore[arg-type]
    session.feed(random_ids(1, 6))
    advance(session, random_ids(6), np.full(6, 2))
    stated = key_value_bytes_by_policy(CONFIG, LOOPS, dtype)
    assert session.cache.keys.nbytes + session.cache.values.nbytes == 12 * stated[policy]
    assert stated["full"] == LOOPS * stated["shared-last"]


@pytest.mark.parametrize("policy", SHARED)
def test_memory_is_really_given_back(policy: Policy) -> None:
    tracemalloc.start()
    try:
        cache = SharedCache(CONFIG, 1, LOOPS, 20_000, policy)
        cache.append(100)
        apart, _ = tracemalloc.get_traced_memory()
        assert cache.reserve(1)
        united, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert united / apart == pytest.approx(1 / LOOPS, rel=0.02)


@pytest.mark.parametrize("policy", SHARED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_slot_holds_what_the_policy_says_of_prompt_and_tokens(policy: Policy, dtype: str) -> None:
    config, rng = CONFIG, np.random.default_rng(0)
    cache = SharedCache(config, 2, LOOPS, 8, policy, dtype)  # type: ignore[arg-type]
    by_position = rng.standard_normal((LOOPS, LAYERS, 2, config.num_key_value_heads, 5, config.head_dim))
    numbers = np.asarray(by_position, np.float32)
    if dtype == "bfloat16":
        from looplm.safetensors_file import round_to_bfloat16, widen_bfloat16

        stored = round_to_bfloat16(numbers)
        numbers = widen_bfloat16(stored)
    else:
        stored = numbers
    for array in (cache.keys, cache.values):
        array[..., :4, :] = stored[..., :4, :].reshape(LOOPS * LAYERS, *stored.shape[2:4], 4, -1)
    cache.append(4)
    cache.reserve(1)
    for r in range(3):
        assert cache.first_slot(r) == 0
        cache.keys[..., 4, :] = cache.values[..., 4, :] = stored[r, ..., 4, :]
        cache.ran(r)
    cache.append_exited(np.array([1, 2]))
    choose = {"first": lambda x: x[0], "shared-last": lambda x: x[-1], "average": lambda x: x.mean(axis=0)}[policy]
    prompt = choose(numbers[..., :4, :])
    token = np.stack([choose(numbers[: r + 1, :, row, :, 4]) for row, r in ((0, 1), (1, 2))], axis=1)
    expected = np.concatenate([prompt, token[..., None, :]], axis=3)
    for array in (cache.keys, cache.values):
        held = array if dtype == "float32" else widen_bfloat16(array)
        np.testing.assert_allclose(held[..., :5, :], expected, rtol=1e-5 if dtype == "float32" else 2**-8)
    assert cache.filled == 5


def test_a_second_prompt_sees_what_is_left_of_the_first_in_every_loop(weights: Weights) -> None:
    session = Session(weights, policy="shared-last", capacity=20)
    session.feed(random_ids(1, 4))
    advance(session, random_ids(3), np.array([2, 5, 1]))
    held = session.cache.keys.copy()
    session.feed(random_ids(1, 2))
    for loop in by_loop(session)[0]:
        np.testing.assert_array_equal(loop[..., :7, :], held[..., :7, :])
    advance(session, random_ids(1), np.array([1]))
    np.testing.assert_array_equal(session.cache.keys[..., :7, :], held[..., :7, :])
    assert session.cache.keys.shape[0] == LAYERS


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_a_batch_are_what_they_are_alone(weights: Weights, policy: Policy) -> None:
    ids, rule = random_ids(2, 14, seed=6), LearnedGate(0.5)
    together = Session(weights, batch=2, policy=policy, max_deferred=5)
    together.feed(ids[:, :4])
    exits = [together.advance(column, rule) for column in np.ascontiguousarray(ids[:, 4:].T)]
    found = together.logits(exits[-1])
    for row in range(2):
        alone = Session(weights, policy=policy, max_deferred=5)
        alone.feed(ids[row : row + 1, :4])
        single = [alone.advance(ids[row, s : s + 1], rule) for s in range(4, 14)]
        assert [e[row] for e in exits] == [e[0] for e in single]
        np.testing.assert_array_equal(found[row], alone.logits(single[-1])[0])


# ---- compared


def test_figures_are_against_full_on_the_same_texts(weights: Weights) -> None:
    texts = [batch_of(ids) for ids in random_ids(3, 21, seed=2)]
    *_, walks = walk_all(weights, LearnedGate(0.5), texts, 6)
    found = {each.policy: each for each in figures(walks)}
    full, exact = found["full"], found["exact"]
    assert list(found) == list(POLICIES)
    assert (full.loss_change, full.agreement, full.speed, full.mean_loops, full.passes) == (0.0, 1.0, 1.0, LOOPS, LOOPS)
    assert (exact.loss, exact.loss_change, exact.agreement) == (full.loss, 0.0, 1.0)
    assert 1 < exact.mean_loops <= exact.passes <= LOOPS
    assert found["first"].loss_change != 0.0
    assert full.bytes_per_token == LOOPS * found["average"].bytes_per_token
    for each in found.values():
        expected = np.mean([walk.loss.mean(dtype=np.float64) for walk in walks[each.policy]])
        assert each.loss == pytest.approx(expected)
        assert each.loss_change == pytest.approx(expected - full.loss)
        assert each.tokens_per_s > 0


def test_every_policy_has_its_turn_and_the_order_is_turned_round(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    from looplm import policies

    order, real = [], policies.decode

    def watched(*given, policy, **more):  # type: ignore[no-untyped-def]
        order.append(policy)
        return real(*given, policy=policy, **more)

    monkeypatch.setattr(policies, "decode", watched)
    list(walk_all(weights, LearnedGate(1.0), [batch_of(ids) for ids in random_ids(2, 8)], 3))
    assert order == [*POLICIES, *POLICIES, *reversed(POLICIES)]


def test_caches_that_share_nothing_are_untouched_by_the_question(weights: Weights) -> None:
    cache = KeyValueCache(CONFIG, 1, LOOPS, 4)
    assert not cache.reserve(4)
    assert not cache.reserve(4, fed=True)
    assert cache.first_slot(2) == 2 * LAYERS
