"""What holds of exits, cache policies and deferral on any model: many small random ones, in lockstep and in batches.

Of each property there is a wrong version of the engine under which it must not hold.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest

from looplm import batching, exits
from looplm.batching import SERVED, Batch, Request
from looplm.cache import POLICIES, KeyValueCache, Policy
from looplm.config import ModelConfig
from looplm.decoder import Decoder
from looplm.deferral import Deferral, Waiting
from looplm.exits import ExitRule, LearnedGate, exit_index
from looplm.generation import Generated, Session
from looplm.kernels.plan import ROW_B, ROW_POSITION
from looplm.sampling import GREEDY
from looplm.weights import Weights
from random_models import random_weights

MODELS = 12
Q = (0.0, 1e-6, 0.1, 0.35, 0.5, 0.75, 0.95, 0.999999, 1.0)
ROWS, PROMPT, NEW = 3, 4, 9
Patch = pytest.MonkeyPatch


def config_of(seed: int, loops: int | None = None) -> ModelConfig:
    rng = np.random.default_rng(seed)
    groups, per_group = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    return ModelConfig(
        vocab_size=int(rng.integers(11, 60)),
        hidden_size=int(rng.integers(3, 12)) * 2,
        intermediate_size=int(rng.integers(5, 40)),
        num_hidden_layers=int(rng.integers(1, 4)),
        num_attention_heads=groups * per_group,
        num_key_value_heads=groups,
        head_dim=2 * int(rng.integers(1, 5)),
        total_ut_steps=int(rng.integers(2, 7)) if loops is None else loops,
        max_position_embeddings=40,
        rms_norm_eps=1e-3,
        rope_theta=100.0,
    )


def model(seed: int, loops: int | None = None) -> Weights:
    """Undecided gates, and of every third model one that is sure: of stopping, or of going on."""
    weights = random_weights(config_of(seed, loops), seed)
    weights.gate_bias[...] = {0: 200.0, 1: -200.0}.get(seed % 6, -1.0)
    return weights


def ids_of(weights: Weights, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, weights.config.vocab_size, shape)


def lockstep(weights: Weights, rule: ExitRule, policy: Policy, **more: object) -> tuple[Session, np.ndarray, list[int]]:
    """Rows that decode given tokens together -> the session, exits: NB, passes of each token."""
    ids = ids_of(weights, ROWS, PROMPT + NEW)
    session = Session(weights, batch=ROWS, policy=policy, loops=rule.deepest(weights.config.total_ut_steps), **more)  # type: ignore[arg-type]
    session.feed(np.ascontiguousarray(ids[:, :PROMPT]))
    found, run = [], []
    for column in np.ascontiguousarray(ids[:, PROMPT:].T):
        found.append(session.advance(column, rule))
        run.append(session.loops_run)
    return session, np.stack(found), run


def forced(weights: Weights, rule: ExitRule, policy: Policy, patch: Patch) -> list[list[Generated]]:
    """A batch whose texts are given, so that exits under several rules are of the same tokens; rows come and go."""
    given = ids_of(weights, 2 * ROWS, NEW, seed=1)
    count = [0] * len(given)
    texts: list[list[Generated]] = [[] for _ in given]
    real = batching.choose

    def choose(logits: np.ndarray, sampling: object, number: float, seen: np.ndarray) -> tuple[int, float]:
        row = int(number)
        count[row] += 1
        return int(given[row, count[row] - 1]), float(logits.max())

    patch.setattr(batching, "choose", choose)
    wanted = [
        Request(ids_of(weights, 1 + row % 4, seed=row), _Numbered(row), NEW - row % 3)  # type: ignore[arg-type]
        for row in range(len(given))
    ]
    for number, token in Batch(weights, wanted, rule=rule, rows=ROWS, policy=policy, sampling=GREEDY):
        texts[number].append(token)
    patch.setattr(batching, "choose", real)
    return texts


class _Numbered:
    """In the place of a source of chance: tells whose token is chosen."""

    def __init__(self, number: int) -> None:
        self.number = number

    def random(self) -> float:
        return float(self.number)


def exits_of(texts: list[list[Generated]]) -> np.ndarray:
    return np.array([token.exit_loop for text in texts for token in text])


# ---- the threshold


def check_rising_q(seed: int, patch: Patch) -> None:
    """Raising q lowers no exit, q = 0 stops after loop 1, q = 1 never before the last.

    Where every loop's keys and values are there (full, exact) exits at two thresholds are of the same states.
    """
    weights = model(seed)
    last = weights.config.total_ut_steps - 1
    ways: list[Callable[[ExitRule], np.ndarray]] = [
        lambda rule: lockstep(weights, rule, "full")[1],
        lambda rule: lockstep(weights, rule, "exact")[1],
        lambda rule: exits_of(forced(weights, rule, "full", patch)),
    ]
    for way in ways:
        found = [way(LearnedGate(q)) for q in Q]
        assert all((low <= high).all() for low, high in itertools.pairwise(found))
        assert (found[0] == 0).all()
        assert (found[-1] == last).all()
    for policy in POLICIES:
        for q, loop in ((0.0, 0), (1.0, last)):
            _, stopped, run = lockstep(weights, LearnedGate(q), policy)
            assert (stopped == loop).all()
            assert set(run) == {last + 1 if policy == "full" else loop + 1}
    for policy in SERVED:
        for q, loop in ((0.0, 0), (1.0, last)):
            texts = forced(weights, LearnedGate(q), policy, patch)
            assert (exits_of(texts) == loop).all()
            assert {token.loops_run for text in texts for token in text[1:]} == {
                last + 1 if policy == "full" else loop + 1
            }


@pytest.mark.parametrize("seed", range(MODELS))
def test_raising_q_lowers_no_exit_and_its_ends_are_the_first_and_the_last_loop(seed: int, monkeypatch: Patch) -> None:
    check_rising_q(seed, monkeypatch)


def test_exits_differ_between_thresholds_and_tokens() -> None:
    """Else the properties would say little."""
    varied = [len(np.unique(lockstep(model(seed), LearnedGate(0.5), "full")[1])) for seed in range(MODELS)]
    assert sum(count > 1 for count in varied) >= MODELS // 2


def _the_other_way_round(patch: Patch) -> None:
    real = exits.has_exited
    patch.setattr(exits, "has_exited", lambda gate_logit, q: real(gate_logit, 1.0 - q))


def _sure_gates_stop_whatever_q_says(patch: Patch) -> None:
    patch.setattr(LearnedGate, "stops", lambda rule, hidden, gate: exits.has_exited(gate, rule.exit_threshold))


def _only_above_q(patch: Patch) -> None:
    """What a gate that is sure of going on would need to stop at q = 0 as well."""
    real = exits.has_exited
    patch.setattr(exits, "has_exited", lambda gate_logit, q: real(gate_logit, max(q, 1e-30)))


def _rows_of_a_batch_run_a_loop_more(patch: Patch) -> None:
    real = Batch._decide

    def decide(batch: Batch, places: np.ndarray) -> None:
        real(batch, places[batch._loops_run[places] > 1])

    patch.setattr(Batch, "_decide", decide)


def _rows_of_a_batch_never_run_the_last_loop(patch: Patch) -> None:
    real = Batch._decide

    def decide(batch: Batch, places: np.ndarray) -> None:
        real(batch, places)
        done = places[(batch._exit_at[places] < 0) & (batch._loops_run[places] == batch._loops - 1)]
        batch._exit_at[done] = batch._loops - 2

    patch.setattr(Batch, "_decide", decide)


MISREAD = [
    _the_other_way_round,
    _sure_gates_stop_whatever_q_says,
    _only_above_q,
    _rows_of_a_batch_run_a_loop_more,
    _rows_of_a_batch_never_run_the_last_loop,
]


def check_all_models(patch: Patch) -> None:
    for seed in range(MODELS):
        check_rising_q(seed, patch)


@pytest.mark.parametrize("mistake", MISREAD)
def test_a_threshold_that_is_misread_is_noticed(mistake: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        check_all_models(monkeypatch)


# ---- one loop


def check_one_loop(seed: int, patch: Patch) -> None:
    """With R = 1 there is nothing to share, to copy or to defer: every policy reads what `full` reads."""
    weights = model(seed, loops=1)
    rule = LearnedGate(0.5)
    for dtype in ("float32", "bfloat16"):
        expected = lockstep(weights, rule, "full", kv_dtype=dtype)[0]
        for policy in POLICIES:
            session, stopped, _ = lockstep(weights, rule, policy, kv_dtype=dtype)
            assert (stopped == 0).all()
            np.testing.assert_array_equal(session.hidden, expected.hidden)
            np.testing.assert_array_equal(session.logits(stopped[-1]), expected.logits(stopped[-1]))
    first, *others = (forced(weights, rule, policy, patch) for policy in SERVED)
    assert all(other == first for other in others)  # log-probabilities too, to the bit


@pytest.mark.parametrize("seed", range(MODELS))
def test_with_one_loop_every_policy_is_full(seed: int, monkeypatch: Patch) -> None:
    check_one_loop(seed, monkeypatch)


def test_a_policy_that_changes_the_only_loop_is_noticed(monkeypatch: Patch) -> None:
    def blurred(cache: KeyValueCache, exit_index: np.ndarray) -> None:
        if cache.policy == "last-exited":
            cache.values[..., cache.filled, :] = cache.values[..., cache.filled - 1, :]
        cache.filled += 1

    monkeypatch.setattr(KeyValueCache, "append_exited", blurred)
    with pytest.raises(AssertionError):
        check_one_loop(2, monkeypatch)


def test_a_batch_that_changes_the_only_loop_is_noticed(monkeypatch: Patch) -> None:
    def shifted(cache: KeyValueCache, rows: np.ndarray, positions: np.ndarray, exit_index: np.ndarray) -> None:
        if cache.policy == "last-exited":
            cache.values[:, rows, :, positions] = 0.0

    monkeypatch.setattr(KeyValueCache, "leave", shifted)
    with pytest.raises(AssertionError):
        check_one_loop(2, monkeypatch)


# ---- deferral


class Given:
    """Row b of token n stops after loop exits[n, b] (from 0), whatever it sees."""

    def __init__(self, exits: np.ndarray) -> None:
        self.rows = iter(exits)
        self.now = exits[0]

    def deepest(self, loops: int) -> int:
        return loops

    def stops(self, hidden: np.ndarray, gate_logit: np.ndarray) -> np.ndarray:
        if len(gate_logit) == 1:
            self.now = next(self.rows)
        stopping: np.ndarray = self.now < len(gate_logit)
        return stopping


@dataclasses.dataclass
class Watch:
    """(row, position, loop) of everything a decoder computes."""

    seen: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)

    def watch(self, patch: Patch) -> None:
        rows, loop = Decoder.run_rows, Decoder.run_loop

        def run_rows(decoder: Decoder, loops: np.ndarray, *more: np.ndarray) -> None:
            self.note(decoder, loops.tolist())
            rows(decoder, loops, *more)

        def run_loop(decoder: Decoder, r: int, batch: int, length: int) -> None:
            self.note(decoder, [r] * (batch * length))
            loop(decoder, r, batch, length)

        patch.setattr(Decoder, "run_rows", run_rows)
        patch.setattr(Decoder, "run_loop", run_loop)

    def note(self, decoder: Decoder, loops: list[int]) -> None:
        places = decoder._places[: len(loops)]
        self.seen += zip(places[:, ROW_B].tolist(), places[:, ROW_POSITION].tolist(), loops, strict=True)


def exits_for(seed: int, loops: int) -> np.ndarray:
    """Of rows in lockstep, NB: one row of each token the deepest, of any depth, so that many tokens wait."""
    rng = np.random.default_rng(seed)
    deepest = rng.integers(0, loops, (NEW, 1))
    found = rng.integers(0, deepest + 1, (NEW, ROWS))
    np.put_along_axis(found, rng.integers(0, ROWS, (NEW, 1)), deepest, axis=1)
    return found


def check_deferral(seed: int, bound: int) -> None:
    """No loop of a token twice, none left out in the end; keys, values and states those of running every loop."""
    weights = model(seed)
    loops, layers = weights.config.total_ut_steps, weights.config.num_hidden_layers
    exits_given = exits_for(seed, loops)
    ways: list[tuple[Policy, dict[str, int]]] = [("full", {}), ("exact", {"max_deferred": bound})]
    found = {}
    for policy, more in ways:
        with pytest.MonkeyPatch.context() as inner:
            watch = Watch()
            watch.watch(inner)
            session, stopped, run = lockstep(weights, Given(exits_given), policy, **more)
            states = session.hidden[: exits_given[-1].max() + 1].copy()
            if session.deferral:
                session.deferral.catch_up()
        whole = {(b, s, r) for b in range(ROWS) for s in range(PROMPT + NEW) for r in range(loops)}
        assert len(watch.seen) == len(set(watch.seen)), "computed twice"
        assert set(watch.seen) == whole
        if policy == "exact":
            assert run == (exits_given.max(axis=1) + 1).tolist()
        arrays = (session.cache.keys, session.cache.values)
        kept = [array.reshape(loops, layers, *array.shape[1:])[..., : session.filled, :].copy() for array in arrays]
        found[policy] = [stopped, states, *kept]
    for full, exact in zip(found["full"], found["exact"], strict=True):
        np.testing.assert_array_equal(exact, full)


@pytest.mark.parametrize("bound", [1, 3, 23])
@pytest.mark.parametrize("seed", range(MODELS))
def test_deferral_computes_every_loop_once_and_to_the_bit(seed: int, bound: int) -> None:
    check_deferral(seed, bound)


def _runs_again(patch: Patch) -> None:
    """Forgets that those that waited have run."""
    real = Deferral._run

    def run(deferral: Deferral, r: int, late: list[Waiting], present: list[Waiting]) -> tuple[np.ndarray, np.ndarray]:
        before = deferral.waiting
        found = real(deferral, r, late, present)
        deferral.waiting = before if r == 1 and len(before) > 1 else deferral.waiting
        return found

    patch.setattr(Deferral, "_run", run)


def _last_loop_left_out(patch: Patch) -> None:
    real = Deferral._late
    patch.setattr(Deferral, "_late", lambda deferral, r: real(deferral, r) if r < deferral._cache.loops - 1 else [])


def _rows_swapped(patch: Patch) -> None:
    real = Deferral._late

    def late(deferral: Deferral, r: int) -> list[Waiting]:
        return [each._replace(state=each.state[::-1].copy()) for each in real(deferral, r)]

    patch.setattr(Deferral, "_late", late)


def _one_position_early(patch: Patch) -> None:
    real = Deferral._late
    patch.setattr(Deferral, "_late", lambda d, r: [each._replace(position=each.position - 1) for each in real(d, r)])


@pytest.mark.parametrize("mistake", [_runs_again, _last_loop_left_out, _rows_swapped, _one_position_early])
def test_a_deferral_that_is_wrong_is_noticed(mistake: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        check_deferral(2, 3)


def test_exits_of_a_session_are_those_of_the_whole_trace() -> None:
    """Else `full` itself would be no measure."""
    from looplm.model import forward

    for seed in range(MODELS):
        weights = model(seed)
        trace = forward(weights, ids_of(weights, ROWS, PROMPT + NEW))
        _, stopped, _ = lockstep(weights, LearnedGate(0.5), "full")
        for row in range(ROWS):
            expected = exit_index(LearnedGate(0.5), trace.hidden[:, row], trace.gate_logit[:, row])
            np.testing.assert_array_equal(stopped[:, row], expected[PROMPT:])
