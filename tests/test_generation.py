"""New tokens: the same as by recomputation, fewer loops at smaller thresholds, reasons to end, stop strings."""

import dataclasses
import itertools

import numpy as np
import pytest

from looplm import generation
from looplm.decoder import Decoder
from looplm.errors import DataError, UsageError
from looplm.exits import FixedDepth, LearnedGate
from looplm.generation import Generated, StopStrings, generate
from looplm.model import forward
from looplm.sampling import GREEDY, Sampling
from looplm.weights import Weights
from random_models import CONFIG, random_ids, random_weights

ALL_LOOPS = LearnedGate(1.0)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


@pytest.fixture
def loops_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of every loop, as they happen."""
    calls, real = [], Decoder.run_loop

    def counted(decoder: Decoder, r: int, batch: int, length: int) -> None:
        calls.append(batch * length)
        real(decoder, r, batch, length)

    monkeypatch.setattr(Decoder, "run_loop", counted)
    return calls


def new_tokens(weights: Weights, prompt_ids: np.ndarray, **changes):  # type: ignore[no-untyped-def]
    settings = {"rule": ALL_LOOPS, "rng": np.random.default_rng(0), "sampling": GREEDY, "max_new_tokens": 12}
    return generate(weights, prompt_ids, **{**settings, **changes})


def test_generating_at_a_smaller_threshold_costs_fewer_loops(weights: Weights, loops_run: list[int]) -> None:
    cost = []
    for q in (0.3, 0.6, 1.0):
        loops_run.clear()
        tokens = list(new_tokens(weights, random_ids(5), rule=LearnedGate(q), max_new_tokens=20))
        decoded = loops_run.count(1)
        assert decoded == sum(token.loops_run for token in tokens[1:])
        cost.append(decoded)
    assert cost[0] < cost[1] < cost[2] == 19 * CONFIG.total_ut_steps


def test_a_long_prompt_is_fed_in_chunks(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_ids(11)
    whole = list(new_tokens(weights, prompt, max_new_tokens=4))
    monkeypatch.setattr(generation, "PREFILL_ROWS", 4)
    monkeypatch.setattr(generation, "PREALLOCATED", 1)
    chunked = list(new_tokens(weights, prompt, max_new_tokens=4))
    assert [token.token_id for token in chunked] == [token.token_id for token in whole]


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


def test_tokens_come_one_at_a_time(weights: Weights, loops_run: list[int]) -> None:
    stream = new_tokens(weights, random_ids(4))
    assert not loops_run
    assert isinstance(next(stream), Generated)
    assert set(loops_run) == {4}


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
    weights: Weights, loops_run: list[int], prompt: np.ndarray, message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        new_tokens(weights, prompt)
    assert error.value.hint
    assert not loops_run


def test_weights_that_are_no_numbers_are_an_error_not_a_token() -> None:
    broken = random_weights()
    broken.norm[0] = np.nan
    with pytest.raises(DataError, match="nan"):
        list(new_tokens(broken, random_ids(3)))


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
