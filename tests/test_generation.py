"""Cached decode against the full forward pass, early exit that really saves loops, and the stream of new tokens."""

import dataclasses
import itertools

import numpy as np
import pytest

from looplm import generation
from looplm.cache import KeyValueCache
from looplm.config import ModelConfig
from looplm.errors import DataError, UsageError
from looplm.exits import Bounded, ExitRule, FixedDepth, LearnedGate, choose_rule, exit_index
from looplm.generation import Generated, Session, StopStrings, generate
from looplm.layer import Past
from looplm.model import forward
from looplm.sampling import GREEDY, Sampling
from looplm.settings import InitConfig
from looplm.sizes import memory
from looplm.weights import Weights, initialise

CONFIG = ModelConfig(
    vocab_size=53,
    hidden_size=20,
    intermediate_size=36,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    total_ut_steps=5,
    max_position_embeddings=40,
    rms_norm_eps=1e-3,
    rope_theta=100.0,
)
TOLERANCE = 1e-5
ALL_LOOPS = LearnedGate(1.0)


def random_weights(config: ModelConfig = CONFIG, seed: int = 0) -> Weights:
    """Weights far from trained, with gates that differ from token to token and loop to loop."""
    weights = initialise(config, InitConfig(post_norm=0.7, embedding_std=1.0, weight_std=0.3), seed)
    rng = np.random.default_rng(seed)
    for name, tensor in weights.tensors.items():
        if "norm" in name:
            tensor *= rng.uniform(0.5, 1.5, tensor.shape).astype(np.float32)
    weights.gate_weight[...] = rng.standard_normal(weights.gate_weight.shape) * 0.6
    weights.gate_bias[...] = -1.0
    return weights


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


def random_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    difference = actual.astype(np.float64) - expected
    error = np.sqrt(np.mean(difference**2) / np.mean(expected.astype(np.float64) ** 2))
    return float(error) if np.isfinite(error) else np.inf


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


def test_a_long_prompt_is_fed_in_chunks(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_ids(11)
    whole = list(new_tokens(weights, prompt, max_new_tokens=4))
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 4)
    monkeypatch.setattr(generation, "PREALLOCATED", 1)
    chunked = list(new_tokens(weights, prompt, max_new_tokens=4))
    assert [token.token_id for token in chunked] == [token.token_id for token in whole]


def test_a_slot_shared_by_all_loops_is_noticed(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_slot(cache: KeyValueCache, loop: int, layer: int) -> Past:
        return Past(cache.keys[layer], cache.values[layer], cache.filled)

    monkeypatch.setattr(KeyValueCache, "slot", wrong_slot)
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
def layer_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every application of a layer, as they happen."""
    calls, real = [], generation.layer_forward

    def counted(layer, config, x, *rest):  # type: ignore[no-untyped-def]
        calls.append(x.shape[0])
        return real(layer, config, x, *rest)

    monkeypatch.setattr(generation, "layer_forward", counted)
    return calls


@pytest.mark.parametrize("policy", ["last-exited", "full"])
def test_an_exit_really_stops_the_loops(weights: Weights, layer_calls: list[int], policy: str) -> None:
    session = Session(weights, policy=policy)
    session.feed(random_ids(1, 4))
    for loops in range(1, CONFIG.total_ut_steps + 1):
        layer_calls.clear()
        exit_at = session.advance(random_ids(1, seed=loops), FixedDepth(loops))
        run = loops if policy == "last-exited" else CONFIG.total_ut_steps
        assert exit_at[0] == loops - 1
        assert session.loops_run == run
        assert len(layer_calls) == run * CONFIG.num_hidden_layers


def test_generating_at_a_smaller_threshold_costs_fewer_layers(weights: Weights, layer_calls: list[int]) -> None:
    cost = []
    for q in (0.3, 0.6, 1.0):
        layer_calls.clear()
        tokens = list(new_tokens(weights, random_ids(5), rule=LearnedGate(q), max_new_tokens=20))
        decoded = layer_calls.count(1)
        assert decoded == CONFIG.num_hidden_layers * sum(token.loops_run for token in tokens[1:])
        cost.append(decoded)
    assert cost[0] < cost[1] < cost[2] == 19 * CONFIG.total_ut_steps * CONFIG.num_hidden_layers


def test_slots_of_loops_that_did_not_run_hold_the_exited_loops(weights: Weights) -> None:
    session = Session(weights, batch=2, capacity=8)
    session.feed(random_ids(2, 3))
    session.cache.keys[:, :, 3:] = session.cache.values[:, :, 3:] = np.nan
    rule, exit_at = LearnedGate(0.5), np.zeros(2, np.int64)
    for column in random_ids(4, 2, seed=5):
        exit_at = session.advance(column, rule)
        at = session.filled - 1
        for cached in (session.cache.keys, session.cache.values):
            by_loop = cached.reshape(CONFIG.total_ut_steps, CONFIG.num_hidden_layers, *cached.shape[1:])[:, :, :, at]
            assert np.isfinite(by_loop).all()
            for b, r in enumerate(exit_at):
                for deeper in range(r + 1, CONFIG.total_ut_steps):
                    np.testing.assert_array_equal(by_loop[deeper, :, b], by_loop[r, :, b])
                for earlier in range(r):
                    assert relative_error(by_loop[earlier, :, b], by_loop[r, :, b]) > 1e-3
    assert np.isnan(session.cache.keys[:, :, session.filled :]).all()


def test_with_the_full_policy_every_loop_keeps_its_own(weights: Weights) -> None:
    input_ids = random_ids(1, 6)
    session = Session(weights, policy="full")
    hidden = decode(session, input_ids, LearnedGate(0.4))
    assert relative_error(hidden, forward(weights, input_ids).hidden) < TOLERANCE


# ---- exit rules


def test_the_gate_stops_where_the_whole_trace_would(weights: Weights) -> None:
    trace = forward(weights, random_ids(1, 30))
    for q in (0.0, 0.2, 0.5, 0.8, 0.999, 1.0):
        found = exit_index(LearnedGate(q), trace.hidden[:, 0], trace.gate_logit[:, 0])
        np.testing.assert_array_equal(found, trace.exit_index(q)[0])


def test_the_gate_at_hand_worked_probabilities() -> None:
    # hazards 1/2, 1/2, 3/4: cumulated 1/2, 3/4, 15/16
    gate_logit = np.array([[0.0], [0.0], [np.log(3.0)]], np.float32)
    hidden = np.zeros((3, 1, 2), np.float32)
    for q, loops in ((0.0, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.93, 3), (0.94, None), (1.0, None)):
        first = next((r for r in range(1, 4) if LearnedGate(q).stops(hidden[:r], gate_logit[:r])[0]), None)
        assert first == loops


def test_a_saturated_gate_does_not_stop_at_threshold_one() -> None:
    assert not LearnedGate(1.0).stops(np.zeros((1, 1, 2), np.float32), np.full((1, 1), 200.0, np.float32))[0]


def test_exits_move_only_deeper_as_the_threshold_grows(weights: Weights) -> None:
    trace = forward(weights, random_ids(1, 30))
    found = [exit_index(LearnedGate(q), trace.hidden[:, 0], trace.gate_logit[:, 0]) for q in np.linspace(0, 1, 21)]
    assert all((low <= high).all() for low, high in itertools.pairwise(found))
    assert found[0].max() == 0
    assert found[-1].min() == CONFIG.total_ut_steps - 1
    assert len(set(found[10])) > 2


def test_bounds_hold_the_gate() -> None:
    hidden, eager = np.zeros((5, 2, 3), np.float32), np.full((5, 2), 9.0, np.float32)
    assert exit_index(LearnedGate(0.5), hidden, eager).tolist() == [0, 0]
    assert exit_index(Bounded(LearnedGate(0.5), min_loops=3), hidden, eager).tolist() == [2, 2]
    assert exit_index(Bounded(LearnedGate(0.5), max_loops=3), hidden, -eager).tolist() == [2, 2]
    assert Bounded(LearnedGate(0.5), max_loops=8).deepest(4) == 8
    assert Bounded(LearnedGate(0.5), min_loops=6).deepest(4) == 6
    assert Bounded(LearnedGate(0.5)).deepest(4) == 4


def test_wishes_become_rules() -> None:
    assert choose_rule(None, None, 0.9) == LearnedGate(0.9)
    assert choose_rule(0.5, None, 0.9) == LearnedGate(0.5)
    assert choose_rule(None, 6, 0.9) == FixedDepth(6)
    assert choose_rule(0.5, 6, 0.9) == Bounded(LearnedGate(0.5), max_loops=6)


@pytest.mark.parametrize("q", [-0.1, 1.1, np.nan])
def test_a_threshold_that_is_no_probability_is_refused(q: float) -> None:
    with pytest.raises(UsageError, match="outside"):
        LearnedGate(q)


def test_impossible_depths_are_refused() -> None:
    with pytest.raises(UsageError, match="loop 0"):
        FixedDepth(0)
    with pytest.raises(UsageError, match="between loop 3 and loop 2"):
        Bounded(ALL_LOOPS, min_loops=3, max_loops=2)


# ---- generate


def new_tokens(weights: Weights, prompt_ids: np.ndarray, **changes):  # type: ignore[no-untyped-def]
    settings = {"rule": ALL_LOOPS, "rng": np.random.default_rng(0), "sampling": GREEDY, "max_new_tokens": 12}
    return generate(weights, prompt_ids, **{**settings, **changes})


def greedy_by_recomputation(weights: Weights, prompt_ids: np.ndarray, q: float, count: int) -> list[tuple[int, int]]:
    """(token, exit loop) pairs; the whole text through all loops for every token."""
    ids, found = list(prompt_ids), []
    for _ in range(count):
        trace = forward(weights, np.array(ids)[None])
        r = int(trace.exit_index(q)[0, -1])
        ids.append(int(trace.logits(r)[0, -1].argmax()))
        found.append((ids[-1], r))
    return found


@pytest.mark.parametrize("prompt_size", [1, 7])
def test_at_threshold_one_it_is_greedy_decoding_by_recomputation(weights: Weights, prompt_size: int) -> None:
    prompt = random_ids(prompt_size)
    found = [(token.token_id, token.exit_loop) for token in new_tokens(weights, prompt)]
    assert found == greedy_by_recomputation(weights, prompt, 1.0, 12)


def test_with_the_full_policy_the_exit_only_chooses_the_state(weights: Weights) -> None:
    prompt = random_ids(5)
    found = [(n.token_id, n.exit_loop) for n in new_tokens(weights, prompt, rule=LearnedGate(0.5), policy="full")]
    assert found == greedy_by_recomputation(weights, prompt, 0.5, 12)
    assert len({exit_at for _, exit_at in found}) > 1


def test_the_first_token_follows_the_same_rule(weights: Weights) -> None:
    prompt = random_ids(5)
    for q in (0.2, 0.5, 0.8):
        first = next(new_tokens(weights, prompt, rule=LearnedGate(q)))
        assert (first.token_id, first.exit_loop) == greedy_by_recomputation(weights, prompt, q, 1)[0]
        assert first.loops_run == CONFIG.total_ut_steps


def test_fixed_depth_is_the_model_with_that_many_loops(weights: Weights) -> None:
    prompt = random_ids(5)
    for loops in (1, 3, 7):
        other = Weights.from_tensors(dataclasses.replace(CONFIG, total_ut_steps=loops), weights.tensors)
        fixed = list(new_tokens(weights, prompt, rule=FixedDepth(loops)))
        assert fixed == list(new_tokens(other, prompt))
        assert {token.loops_run for token in fixed} == {loops}


def test_logprob_is_that_of_the_state_it_was_read_from(weights: Weights) -> None:
    prompt = random_ids(5)
    first = next(new_tokens(weights, prompt, rule=LearnedGate(0.5)))
    logits = forward(weights, prompt[None]).logits(first.exit_loop)[0, -1].astype(np.float64)
    assert first.logprob == pytest.approx(logits.max() - np.log(np.exp(logits).sum()), rel=1e-5)


def sampled(weights: Weights, seed: int) -> list[int]:
    rng, sampling = np.random.default_rng(seed), Sampling(temperature=1.0)
    return [n.token_id for n in new_tokens(weights, random_ids(4), sampling=sampling, rng=rng, rule=LearnedGate(0.6))]


def test_a_seed_fixes_the_text(weights: Weights) -> None:
    assert sampled(weights, 3) == sampled(weights, 3)
    assert sampled(weights, 3) != sampled(weights, 4)


def test_the_repetition_penalty_knows_prompt_and_new_tokens(weights: Weights) -> None:
    prompt = random_ids(4)
    ids = [token.token_id for token in new_tokens(weights, prompt, sampling=Sampling(temperature=0.0))]
    assert len(set(ids)) < len(ids)
    never_again = Sampling(temperature=0.0, repetition_penalty=1e6)
    penalised = [n.token_id for n in new_tokens(weights, prompt, sampling=never_again, max_new_tokens=12)]
    assert len({*penalised, *prompt}) == 12 + len(set(prompt))


def test_the_last_token_says_why(weights: Weights) -> None:
    prompt = random_ids(4)
    tokens = list(new_tokens(weights, prompt))
    assert [token.finish for token in tokens] == [None] * 11 + ["max_new_tokens"]

    stop = tokens[5].token_id
    stopped = list(new_tokens(weights, prompt, stop_ids={stop}))
    assert (stopped[-1].token_id, stopped[-1].finish) == (stop, "stop token")
    assert len(stopped) <= 6

    to_the_end = list(new_tokens(weights, prompt, max_new_tokens=1000))
    assert len(to_the_end) == CONFIG.max_position_embeddings - prompt.size + 1
    assert to_the_end[-1].finish == "context full"

    brim = random_ids(CONFIG.max_position_embeddings)
    assert [token.finish for token in new_tokens(weights, brim)] == ["context full"]
    assert list(new_tokens(weights, prompt, max_new_tokens=0)) == []


def test_tokens_come_one_at_a_time(weights: Weights, layer_calls: list[int]) -> None:
    stream = new_tokens(weights, random_ids(4))
    assert not layer_calls
    assert isinstance(next(stream), Generated)
    assert set(layer_calls) == {4}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (np.zeros(41, np.int64), "41 tokens, but the model's context is 40"),
        (np.array([1, 53]), "token id 53 is outside the model's vocabulary of 53"),
        (np.array([-1, 3]), "token id -1"),
        (np.empty(0, np.int64), "no tokens"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_before_anything_runs(
    weights: Weights, layer_calls: list[int], prompt: np.ndarray, message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        new_tokens(weights, prompt)
    assert error.value.hint
    assert not layer_calls


def test_a_session_does_not_go_beyond_the_context(weights: Weights) -> None:
    session = Session(weights)
    session.feed(random_ids(1, 40))
    for more in (lambda: session.advance(random_ids(1), ALL_LOOPS), lambda: session.feed(random_ids(1, 1))):
        with pytest.raises(DataError, match="41 tokens are more than the model's context of 40"):
            more()


def test_weights_that_are_no_numbers_are_an_error_not_a_token() -> None:
    broken = random_weights()
    broken.norm[0] = np.nan
    with pytest.raises(DataError, match="nan"):
        list(new_tokens(broken, random_ids(3)))


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
    np.testing.assert_array_equal(session.cache.keys[:, :, :3], keys)


def test_the_cache_takes_the_memory_that_is_stated() -> None:
    cache = KeyValueCache(CONFIG, batch=1, loops=CONFIG.total_ut_steps, capacity=10)
    assert cache.keys.nbytes + cache.values.nbytes == 10 * memory(CONFIG)["key_value_per_token"]


# ---- stop strings


def cut_letter_by_letter(text: str, stops: list[str]) -> str:
    """The definition: read on until some stop string is complete; the longest of those that end there is cut off."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@pytest.mark.parametrize("stops", [["ab"], ["aab", "ba"], ["abc", "b"], ["aaa"], ["bca", "ca", "cab"], []], ids=str)
def test_stop_strings_cut_the_same_place_however_the_text_arrives(stops: list[str]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(list("abc"), rng.integers(0, 12)))
        expected = cut_letter_by_letter(text, stops)
        borders = [0, *sorted(rng.integers(0, len(text) + 1, rng.integers(0, 6))), len(text)]
        guard, shown = StopStrings(stops), ""
        for begin, end in itertools.pairwise(borders):
            shown += guard.push(text[begin:end])
            assert expected.startswith(shown), "a part of a stop string got out"
        assert shown + guard.flush() == expected
        assert guard.found == (expected != text)


def test_text_that_cannot_begin_a_stop_string_is_not_held_back() -> None:
    guard = StopStrings(["\n\nEND"])
    assert [guard.push(part) for part in ("one", " two\n", "\n", "EN", "x")] == ["one", " two", "", "", "\n\nENx"]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopStrings(["a", ""])
