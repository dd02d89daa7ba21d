"""Batches whose rows come and go: every row to the bit as alone, nobody waits, and mistakes that must show."""

import dataclasses
import heapq
from collections.abc import Callable

import numpy as np
import pytest

from looplm.arrays import aligned_empty
from looplm.batching import Batch, Request, useful_threads
from looplm.cache import KeyValueCache
from looplm.decoder import Decoder
from looplm.errors import DataError, UsageError
from looplm.exits import Bounded, ExitRule, FixedDepth, LearnedGate, bind, make_rule
from looplm.generation import Generated, generate
from looplm.kernels import plan as field
from looplm.memory import resident
from looplm.sampling import GREEDY, Sampling
from looplm.stored import StoredMatrix, StoredWeights
from looplm.weights import Weights
from random_models import CONFIG, random_ids, random_weights
from stored_models import in_format

LIVELY = Sampling(temperature=1.2, repetition_penalty=1.1)
STOPS = {5, 11}


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


def requests(count: int, seed: int = 0, most: int = 30) -> list[Request]:
    """Prompts and texts of random lengths; some prompts long enough to be fed through panels, some fill the context."""
    rng = np.random.default_rng(seed)
    sizes = [int(size) for size in rng.choice([1, 2, 3, 7, 12, 26, 40], count)]
    lengths = [int(length) for length in rng.integers(1, most, count)]
    return [
        Request(random_ids(size, seed=100 * seed + number), np.random.default_rng(seed + number), length)
        for number, (size, length) in enumerate(zip(sizes, lengths, strict=True))
    ]


def together(weights: Weights | StoredWeights, wanted: list[Request], **settings) -> list[list[Generated]]:  # type: ignore[no-untyped-def]
    texts: list[list[Generated]] = [[] for _ in wanted]
    for number, token in Batch(weights, wanted, **settings):
        texts[number].append(token)
    return texts


def alone(weights: Weights | StoredWeights, wanted: list[Request], **settings) -> list[list[Generated]]:  # type: ignore[no-untyped-def]
    settings.pop("rows", None)
    return [
        list(generate(weights, r.prompt_ids, rng=r.rng, max_new_tokens=r.max_new_tokens, **settings)) for r in wanted
    ]


def assert_same(weights: Weights | StoredWeights, count: int, seed: int = 0, **settings) -> list[list[Generated]]:  # type: ignore[no-untyped-def]
    """Token, exit loop, loops run, log-probability and reason to end, all to the bit."""
    texts = together(weights, requests(count, seed), **settings)
    assert texts == alone(weights, requests(count, seed), **settings)
    return texts


RULES: list[ExitRule] = [LearnedGate(0.0), LearnedGate(0.3), LearnedGate(0.6), LearnedGate(1.0), FixedDepth(2)]
RULES += [Bounded(LearnedGate(0.5), 2, 7), make_rule("change", 0.4)]
READING = ["kl:0.05", "top:0.3", "margin:0.5", "stable:2"]


@pytest.mark.kernels
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_row_is_to_the_bit_what_it_is_alone(weights: Weights, rule: ExitRule) -> None:
    assert_same(weights, 9, rule=rule, rows=4, sampling=LIVELY, stop_ids=STOPS)


@pytest.mark.parametrize("wish", READING)
def test_so_it_is_under_rules_that_read_predictions(weights: Weights, wish: str) -> None:
    name, _, threshold = wish.partition(":")
    for rule in (make_rule(name, float(threshold)), Bounded(make_rule(name, float(threshold)), 2, 4)):
        texts = assert_same(weights, 7, rule=bind(rule, weights), rows=3, sampling=LIVELY)
        assert len({token.exit_loop for text in texts for token in text}) > 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["last-exited", "full"])
def test_so_it_is_for_every_cache_and_number_of_threads(
    weights: Weights, policy: str, kv_dtype: str, threads: int
) -> None:
    settings = {"policy": policy, "kv_dtype": kv_dtype, "threads": threads}
    texts = assert_same(weights, 8, 3, rule=LearnedGate(0.5), rows=3, sampling=LIVELY, **settings)
    assert {token.loops_run for text in texts for token in text[1:]} == ({5} if policy == "full" else {1, 2, 3, 4, 5})


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_so_it_is_for_every_format_of_weights(kind: str) -> None:
    assert_same(in_format(kind)[0], 5, rule=LearnedGate(0.5), rows=3, sampling=LIVELY)


@pytest.mark.parametrize("rows", [1, 2, 24])
def test_so_it_is_with_any_number_of_places(weights: Weights, rows: int) -> None:
    for seed in range(3):
        assert_same(weights, 26, seed, rule=LearnedGate(0.6), rows=rows, sampling=GREEDY)


def test_a_cache_that_has_to_grow_changes_nothing(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("looplm.batching.PREALLOCATED", 1)
    monkeypatch.setattr("looplm.generation.PREALLOCATED", 1)
    assert_same(weights, 7, rule=LearnedGate(0.5), rows=3, sampling=LIVELY)


def test_every_reason_to_end_occurs(weights: Weights) -> None:
    texts = assert_same(weights, 20, rule=LearnedGate(0.5), rows=4, sampling=LIVELY, stop_ids=STOPS)
    assert {text[-1].finish for text in texts} == {"stop token", "max_new_tokens", "context full"}
    assert all(token.finish is None for text in texts for token in text[:-1])


def test_a_text_that_is_stopped_leaves_its_place_at_once(weights: Weights) -> None:
    """As whoever finds a stop string does: at the token, whatever has been begun behind it."""
    whole = together(weights, requests(6), rule=LearnedGate(0.5), rows=2)
    batch, texts = Batch(weights, requests(6), rule=LearnedGate(0.5), rows=2), [[] for _ in whole]
    for number, token in batch:
        texts[number].append(token)
        if len(texts[number]) == 3:
            batch.stop(number)
    assert texts == [text[:3] for text in whole]


def test_a_neighbour_may_be_stopped_in_the_middle_of_a_pass(weights: Weights) -> None:
    wanted = [dataclasses.replace(request, max_new_tokens=5) for request in requests(4, most=10)]
    batch, count = Batch(weights, wanted, rule=FixedDepth(1), rows=4), [0] * 4
    for number, _ in batch:
        count[number] += 1
        if count[number] == 2:
            for other in {0, 1, 2, 3} - {number}:
                batch.stop(other)
    assert count == [5, 1, 1, 1]


def test_no_prompts_are_no_tokens(weights: Weights) -> None:
    assert list(Batch(weights, [], rule=LearnedGate(1.0))) == []
    nothing = dataclasses.replace(requests(1)[0], max_new_tokens=0)
    assert list(Batch(weights, [nothing, nothing], rule=LearnedGate(1.0))) == []


def test_threads_are_worth_it_sooner_than_for_one_row(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = StoredWeights.of(weights)
    monkeypatch.setattr("looplm.batching.WORTH_SHARING", 5 * stored.bytes_per_token)
    monkeypatch.setattr("looplm.batching.available_threads", lambda: 7)
    assert [useful_threads(stored, rows) for rows in (1, 4, 5)] == [1, 1, 7]


# ---- nobody waits


def passes_without_waiting(texts: list[list[Generated]], rows: int) -> int:
    """Passes when each place takes the next prompt as soon as it is free, and a row runs one loop in every pass."""
    free = [0] * rows
    for text in texts:
        heapq.heappush(free, heapq.heappop(free) + sum(token.loops_run for token in text[1:]))
    return max(free)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_no_row_waits_for_a_deeper_one(weights: Weights, rows: int) -> None:
    for q in (0.3, 0.7):
        batch, texts = Batch(weights, requests(20), rule=LearnedGate(q), rows=rows), [[] for _ in range(20)]
        for number, token in batch:
            texts[number].append(token)
        assert batch.passes == passes_without_waiting(texts, rows)
        assert batch.rows_run == sum(token.loops_run for text in texts for token in text[1:])
        lockstep = sum(max(token.loops_run for token in pair) for pair in zip(*texts[:2], strict=False))
        assert lockstep > sum(token.loops_run for token in texts[0][: len(texts[1])])  # there was something to wait for


def test_the_weights_are_read_once_a_pass(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    run_rows, logits = Decoder.run_rows, Decoder.logits
    monkeypatch.setattr(
        Decoder, "run_rows", lambda self, loops, *a: calls.append(("loops", len(loops))) or run_rows(self, loops, *a)
    )
    monkeypatch.setattr(
        Decoder, "logits", lambda self, states: calls.append(("head", len(states))) or logits(self, states)
    )
    batch = Batch(weights, requests(8), rule=LearnedGate(0.5), rows=4)
    tokens = len(list(batch)) - 8  # without each prompt's own
    assert sum(what == "loops" for what, _ in calls) == batch.passes
    assert sum(rows for what, rows in calls if what == "head") == tokens
    assert sum(what == "head" for what, _ in calls) <= batch.passes


@pytest.mark.parametrize("wish", READING)
def test_a_rule_that_reads_predictions_multiplies_no_state_twice(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    name, _, threshold = wish.partition(":")
    states, fed, real, multiply = [], [], Decoder.logits, StoredMatrix.multiply
    monkeypatch.setattr(Decoder, "logits", lambda self, given: states.extend(given.copy()) or real(self, given))
    monkeypatch.setattr(
        StoredMatrix, "multiply", lambda self, x, threads=1: fed.append(len(x)) or multiply(self, x, threads)
    )
    batch = Batch(weights, requests(8), rule=bind(make_rule(name, float(threshold)), weights), rows=4)
    for _ in batch:
        pass
    assert len(states) == batch.rows_run == len({state.tobytes() for state in states})
    assert len(fed) <= 8 * CONFIG.total_ut_steps  # each prompt's last position, once in every loop


# ---- mistakes that must show


def _wrong_pass(patch: pytest.MonkeyPatch, spoil: Callable[[np.ndarray, np.ndarray], object]) -> None:
    """`spoil` changes the loops of a pass, or the places of its rows."""
    real = Decoder.run_rows

    def wrong(decoder: Decoder, loops: np.ndarray, *arrays: np.ndarray) -> None:
        loops = loops.copy()
        spoil(loops, decoder._places[: len(loops)])
        real(decoder, loops, *arrays)

    patch.setattr(Decoder, "run_rows", wrong)


def _position_of_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    _wrong_pass(patch, lambda _, at: at.__setitem__((..., field.ROW_POSITION), np.roll(at[:, field.ROW_POSITION], 1)))


def _cache_row_of_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    _wrong_pass(patch, lambda _, at: at.__setitem__((..., field.ROW_B), np.roll(at[:, field.ROW_B], 1)))


def _all_rows_at_one_loop(patch: pytest.MonkeyPatch) -> None:
    _wrong_pass(patch, lambda loops, _: loops.fill(loops[0]))


def _head_rows_swapped(patch: pytest.MonkeyPatch) -> None:
    real = Decoder.logits
    patch.setattr(Decoder, "logits", lambda self, states: real(self, states)[::-1])


def _deeper_slots_left(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KeyValueCache, "leave", lambda *_: None)


def _prompt_into_another_row(patch: pytest.MonkeyPatch) -> None:
    real = KeyValueCache.take_row
    patch.setattr(KeyValueCache, "take_row", lambda self, row, *a: real(self, (row + 1) % self.batch, *a))


def _exit_of_the_request_before(patch: pytest.MonkeyPatch) -> None:
    real = Batch._next_token

    def kept(self: Batch, place: int, *rest: object) -> object:
        found, before = real(self, place, *rest), self._exit_at[place]  # type: ignore[arg-type]
        self._exit_at[place] = max(before, found[1].exit_loop)
        return found

    patch.setattr(Batch, "_next_token", kept)


def zeros(shape: tuple[int, ...]) -> np.ndarray:
    made = aligned_empty(shape)
    made.fill(0.0)
    return made


MISTAKES = [
    _position_of_the_neighbour,
    _cache_row_of_the_neighbour,
    _all_rows_at_one_loop,
    _head_rows_swapped,
    _deeper_slots_left,
    _prompt_into_another_row,
    _exit_of_the_request_before,
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(weights: Weights, monkeypatch: pytest.MonkeyPatch, mistake) -> None:  # type: ignore[no-untyped-def]
    expected = alone(weights, requests(6), rule=LearnedGate(0.5), sampling=GREEDY)
    monkeypatch.setattr("looplm.cache.aligned_empty", zeros)  # what was never written is always the same
    mistake(monkeypatch)
    assert together(weights, requests(6), rule=LearnedGate(0.5), sampling=GREEDY, rows=3) != expected


# ---- refusals


@pytest.mark.parametrize("rows", [0, 25])
def test_rows_that_cannot_be_in_flight_are_refused(weights: Weights, rows: int) -> None:
    with pytest.raises(UsageError, match=f"{rows} prompts cannot be in flight at once") as error:
        Batch(weights, requests(2), rule=LearnedGate(1.0), rows=rows)
    assert "1 to 24" in error.value.hint


def test_other_cache_policies_are_refused(weights: Weights) -> None:
    with pytest.raises(UsageError, match="the cache policy first works on one prompt at a time") as error:
        Batch(weights, requests(2), rule=LearnedGate(1.0), policy="first")  # type: ignore[arg-type]
    assert error.value.hint == "use last-exited or full"


def test_prompts_that_do_not_fit_are_refused_before_anything_runs(weights: Weights) -> None:
    bad = dataclasses.replace(requests(1)[0], prompt_ids=np.array([1, CONFIG.vocab_size]))
    with pytest.raises(DataError, match=f"token id {CONFIG.vocab_size}"):
        Batch(weights, [*requests(3), bad], rule=LearnedGate(1.0))


def test_a_cache_that_cannot_fit_is_refused(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("looplm.generation.available_memory", lambda: (resident() or 0) + 10_000)
    with pytest.raises(DataError, match="keys and values of 5 x 40 tokens in 5 loops take ") as error:
        Batch(weights, requests(9, most=40), rule=LearnedGate(1.0), rows=4)
    assert "fewer rows at once" in error.value.hint
