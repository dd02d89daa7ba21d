"""Draft and verify: the text of full decoding to the bit, the distribution of sampling, and versions that are wrong."""

import itertools

import numpy as np
import pytest

from looplm.arrays import Floats
from looplm.decoder import Decoder
from looplm.draft_plans import FLOW, DraftAccount, Drafts, Length, Planner
from looplm.drafting import Drafter, generate_drafted
from looplm.errors import DataError, UsageError
from looplm.exits import FixedDepth, LearnedGate
from looplm.generation import Generated, generate
from looplm.model import forward
from looplm.sampling import GREEDY, Sampling, accepts, draw, probabilities, remainder
from looplm.weights import Weights
from random_models import CONFIG, random_ids, random_weights
from stored_models import in_format

FULL = CONFIG.total_ut_steps


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


def drafted(weights, prompt, drafts: Drafts, **changes) -> list[Generated]:  # type: ignore[no-untyped-def]
    settings = {"rng": np.random.default_rng(0), "sampling": GREEDY, "max_new_tokens": 24}
    return list(generate_drafted(weights, prompt, drafts, **{**settings, **changes}))


def plain(weights, prompt, **changes) -> list[Generated]:  # type: ignore[no-untyped-def]
    settings = {"rule": LearnedGate(1.0), "rng": np.random.default_rng(0), "sampling": GREEDY, "max_new_tokens": 24}
    return list(generate(weights, prompt, **{**settings, **changes}))


SHAPES = [
    (1, 1),
    (1, 4),
    (2, 3),
    (FULL - 1, 23),
    (3, None),
    (None, 2),
    (None, None),
    *((r, FLOW) for r in range(1, FULL)),
]


@pytest.mark.parametrize(("loops", "tokens"), SHAPES, ids=str)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text_is_that_of_full_decoding_to_the_bit(
    weights: Weights, loops: int | None, tokens: Length | None, penalty: float
) -> None:
    sampling, account = Sampling(temperature=0.0, repetition_penalty=penalty), DraftAccount()
    for seed in range(3):
        prompt = random_ids(5, seed=seed)
        expected = plain(weights, prompt, sampling=sampling)
        # Equal log-probabilities as well: they depend on every logit.
        assert drafted(weights, prompt, Drafts(loops, tokens), sampling=sampling, account=account) == expected
    if (loops, tokens) in ((2, 3), (2, FLOW)):  # both ways a round can go were seen
        assert 0 < account.accepted < account.drafted


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4"])
def test_so_it_is_in_every_format(name: str, dtype: str, threads: int) -> None:
    stored, _ = in_format(name)
    same = {"kv_dtype": dtype, "threads": threads}
    assert drafted(stored, random_ids(6), Drafts(2, 3), **same) == plain(stored, random_ids(6), **same)


def test_more_loops_than_trained(weights: Weights) -> None:
    prompt = random_ids(5)
    found = drafted(weights, prompt, Drafts(FULL, 3), loops=FULL + 2)
    ids = np.array([*prompt, *(token.token_id for token in found)])
    logits = forward(weights, ids[None], loops=FULL + 2).logits(FULL + 1)[0]
    assert logits[prompt.size - 1 : -1].argmax(-1).tolist() == ids[prompt.size :].tolist()
    # So many loops that not every position in flight finds room in a pass.
    many = {"max_new_tokens": 32}
    assert drafted(weights, prompt, Drafts(1, FLOW), loops=30, **many) == plain(
        weights, prompt, rule=FixedDepth(30), **many
    )


def test_the_states_and_keys_left_are_those_of_full_decoding(weights: Weights) -> None:
    sessions: list[Drafter] = []

    class Kept(Drafter):
        def __init__(self, *args: object, **settings: object) -> None:
            super().__init__(*args, **settings)  # type: ignore[arg-type]
            sessions.append(self)

    prompt = random_ids(5)
    tokens = drafted(weights, prompt, Drafts(2, 3), kind=Kept)
    session = sessions[0]
    other = Drafter(weights)
    ids = np.array([*prompt, *(token.token_id for token in tokens)])
    other.feed(ids[None, : prompt.size])
    for token in ids[prompt.size : session.filled]:
        other.advance(np.array([token]), LearnedGate(1.0))
    held = slice(0, session.filled)
    for name in ("keys", "values"):
        mine, theirs = (getattr(one.cache, name)[..., held, :] for one in (session, other))
        np.testing.assert_array_equal(mine, theirs)


def test_it_ends_as_plain_decoding_does(weights: Weights) -> None:
    prompt = random_ids(4)
    stop = plain(weights, prompt)[7].token_id
    for changes in ({"stop_ids": {stop}}, {"max_new_tokens": 1}, {"max_new_tokens": 2}, {"max_new_tokens": 500}):
        assert drafted(weights, prompt, Drafts(3, 5), **changes) == plain(weights, prompt, **changes), changes
    assert drafted(weights, prompt, Drafts(3, 5), max_new_tokens=500)[-1].finish == "context full"
    assert drafted(weights, prompt, Drafts(1, 1), max_new_tokens=0) == []
    brim = random_ids(CONFIG.max_position_embeddings)
    assert [token.finish for token in drafted(weights, brim, Drafts(1, 2))] == ["context full"]


class AcceptsAll(Drafter):
    def _accepts(self, prob: np.ndarray, guess: np.ndarray, token: int) -> bool:
        return True


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The loops of the rows of every pass after the prompt, as they happen."""
    found: list[list[int]] = []
    run_loop, run_rows = Decoder.run_loop, Decoder.run_rows

    def loop(decoder: Decoder, r: int, batch: int, length: int) -> None:
        if length == 1:
            found.append([r] * batch)
        run_loop(decoder, r, batch, length)

    def rows(decoder: Decoder, loops: np.ndarray, *arrays: np.ndarray) -> None:
        found.append(loops.tolist())
        run_rows(decoder, loops, *arrays)

    monkeypatch.setattr(Decoder, "run_loop", loop)
    monkeypatch.setattr(Decoder, "run_rows", rows)
    return found


def test_passes_are_what_drafting_says(weights: Weights, passes: list[list[int]]) -> None:
    account = DraftAccount()
    drafted(weights, random_ids(5), Drafts(2, 3), account=account, max_new_tokens=9)
    assert passes[:11] == [[0], [1]] * 4 + [[2] * 4, [3] * 4, [4] * 4]
    assert account.rounds == sum(account.choices.values())
    assert account.tokens == 8


def test_a_flow_checks_while_it_drafts(weights: Weights, passes: list[list[int]]) -> None:
    account = DraftAccount()
    drafted(weights, random_ids(5), Drafts(2, FLOW), account=account, max_new_tokens=9, kind=AcceptsAll)
    assert passes[:6] == [[0], [1], [2, 0], [3, 1], [4, 2, 0], [3, 1]]
    assert len(passes) == 2 * 7 + FULL  # eight tokens, two passes apart
    assert sum(map(len, passes)) == 8 * FULL  # and no loop in vain
    assert (account.rounds, account.tokens, account.accepted) == (1, 8, 7)


# ---- sampling


def chi_square_limit(free: int) -> float:
    """What chance exceeds once in about 30,000 times (Wilson and Hilferty)."""
    return float(free * (1 - 2 / (9 * free) + 4.0 * np.sqrt(2 / (9 * free))) ** 3)


def chi_square(counts: np.ndarray, prob: np.ndarray) -> tuple[float, float]:
    """The statistic over outcomes expected at least five times (the others as one), and its limit."""
    expected = prob.reshape(-1) * counts.sum()
    often = expected >= 5
    seen, wanted = counts.reshape(-1)[often], expected[often]
    if expected[~often].sum() >= 1:
        seen = np.append(seen, counts.reshape(-1)[~often].sum())
        wanted = np.append(wanted, expected[~often].sum())
    assert counts.reshape(-1)[prob.reshape(-1) == 0].sum() == 0
    return float(((seen - wanted) ** 2 / wanted).sum()), chi_square_limit(len(wanted) - 1)


def step(prob: np.ndarray, guess: np.ndarray, rng: np.random.Generator, how: str) -> int:
    """One draft and its judgement."""
    token = draw(guess, rng.random())
    if how == "accepts everything" or accepts(prob, guess, token, rng.random()):
        return token
    return draw(prob if how == "draws again from p" else remainder(prob, guess), rng.random())


@pytest.mark.parametrize("how", ["right", "accepts everything", "draws again from p"])
def test_what_stands_is_distributed_as_the_full_model(how: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 7)).astype(np.float32) * 1.5
    for sampling in (
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=4),
        Sampling(temperature=1.3, top_p=0.8),
    ):
        prob, guess = (probabilities(row, sampling) for row in logits)
        counts = np.bincount([step(prob, guess, rng, how) for _ in range(20_000)], minlength=7)
        if how == "right":
            found, limit = chi_square(counts, prob)
            assert found < limit
        else:
            expected = np.maximum(prob, 1e-12) * counts.sum()
            assert ((counts - expected) ** 2 / expected).sum() > 3 * chi_square_limit(6)


def test_equal_distributions_always_stand_and_remainders_are_distributions() -> None:
    prob = np.array([0.2, 0.5, 0.3])
    assert all(accepts(prob, prob, 1, coin) for coin in (0.0, 0.5, np.nextafter(1.0, 0.0)))
    assert not accepts(np.array([0.0, 1.0]), np.array([1.0, 0.0]), 0, 0.0)
    np.testing.assert_allclose(remainder(prob, np.array([0.4, 0.4, 0.2])), [0.0, 0.5, 0.5])
    np.testing.assert_array_equal(remainder(prob, prob), prob)


@pytest.mark.parametrize("kind", [Drafter, AcceptsAll])
@pytest.mark.parametrize(("drafts", "penalty"), [((2, 2), 1.0), ((2, 2), 1.4), ((2, FLOW), 1.4)], ids=str)
def test_sampled_tokens_have_the_models_joint_distribution(
    kind: type[Drafter], drafts: tuple[int, Length], penalty: float
) -> None:
    """A vocabulary of 53 cut to the 3 likeliest: 27 outcomes of three tokens, of which two may be drafts."""
    weights, prompt = random_weights(), random_ids(3)
    sampling = Sampling(temperature=1.5, top_k=3, repetition_penalty=penalty)
    joint, outcomes = exact_joint(weights, prompt, sampling)
    counts, rng = np.zeros(len(joint)), np.random.default_rng(1)
    for _ in range(1500):
        tokens = generate_drafted(
            weights, prompt, Drafts(*drafts), rng=rng, sampling=sampling, max_new_tokens=3, kind=kind
        )
        found = tuple(token.token_id for token in tokens)
        if found not in outcomes:
            assert kind is AcceptsAll
            return
        counts[outcomes[found]] += 1
    found_square, limit = chi_square(counts, joint)
    assert (found_square < limit) == (kind is Drafter)


def exact_joint(weights: Weights, prompt: np.ndarray, sampling: Sampling) -> tuple[Floats, dict[tuple[int, ...], int]]:
    """Probabilities of all continuations of three tokens by full recomputation."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for tokens, chance in found.items():
            ids = np.array([*prompt, *tokens])
            seen = np.zeros(CONFIG.vocab_size, np.bool_)
            seen[ids] = True
            prob = probabilities(forward(weights, ids[None]).logits(FULL - 1)[0, -1], sampling, seen)
            longer |= {(*tokens, int(one)): chance * prob[one] for one in np.flatnonzero(prob)}
        found = longer
    return np.array(list(found.values())), {tokens: index for index, tokens in enumerate(found)}


def test_a_seed_fixes_a_sampled_text(weights: Weights) -> None:
    texts = [
        [
            token.token_id
            for token in drafted(
                weights, random_ids(5), Drafts(2, 3), sampling=Sampling(), rng=np.random.default_rng(s)
            )
        ]
        for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


# ---- what is chosen, and what is said


def planner(single: float, further: float, drafts: Drafts | None = None) -> Planner:
    account = DraftAccount(full=4)
    account.single_pass.add(single)
    account.further_row.add(further)
    return Planner(drafts or Drafts(), 4, account)


def settle(chosen: Planner, chances: dict[int, float], rounds: int = 300) -> list[tuple[int, Length]]:
    """Choices against drafts that stand with these chances by depth."""
    rng, found = np.random.default_rng(0), []
    for _ in range(rounds):
        loops, length = chosen.choose()
        count = 50 if length == FLOW else length
        stood = next((i for i in range(count) if rng.random() >= chances[loops]), count)
        chosen._account.judged += min(count, stood + 1)
        chosen._account.accepted += stood
        found.append((loops, length))
    return found[rounds // 2 :]


def most_common(found: list[tuple[int, Length]]) -> tuple[int, Length]:
    return max(set(found), key=found.count)


def test_good_shallow_drafts_flow_and_bad_ones_are_not_made() -> None:
    assert most_common(settle(planner(1.0, 0.1), {1: 0.95, 2: 0.97, 3: 0.98})) == (1, FLOW)
    assert most_common(settle(planner(1.0, 0.8), {1: 0.05, 2: 0.1, 3: 0.15}))[1] == 0
    assert most_common(settle(planner(1.0, 0.1), {1: 0.2, 2: 0.95, 3: 0.96}))[0] == 2


def test_what_is_given_is_not_chosen() -> None:
    assert set(settle(planner(1.0, 0.5, Drafts(2, 3)), {2: 0.1})) == {(2, 3)}
    assert {loops for loops, _ in settle(planner(1.0, 0.1, Drafts(3)), {3: 0.9})} == {3}
    assert {count for _, count in settle(planner(1.0, 0.1, Drafts(None, 5)), {1: 0.5, 2: 0.6, 3: 0.7})} == {5}
    assert {length for _, length in settle(planner(1.0, 0.1, Drafts(None, FLOW)), {1: 0.5, 2: 0.6, 3: 0.7})} == {FLOW}


def test_the_account(weights: Weights) -> None:
    account = DraftAccount()
    assert (account.acceptance, account.speedup) == (None, None)
    tokens = drafted(weights, random_ids(5), Drafts(2, 3), account=account)
    assert account.rounds + account.accepted == len(tokens) - 1
    assert account.drafted <= 3 * account.rounds
    assert account.acceptance == account.accepted / account.drafted
    account = DraftAccount(full=4, rounds=2)
    account.single_pass.add(2.0, 2)
    account.check.add(0.5)
    account.new_tokens.add(9.0, 3)
    assert account.speedup == 4.5 / 3.0


@pytest.mark.parametrize(
    ("drafts", "message"),
    [((0, 1), "0 loops"), ((1, 0), "0 drafted tokens"), ((1, 24), "24 drafted tokens"), ((FULL, 2), "full depth of 5")],
    ids=str,
)
def test_drafts_that_cannot_be_are_refused(weights: Weights, drafts: tuple[int, int], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        generate_drafted(weights, random_ids(4), Drafts(*drafts), rng=np.random.default_rng(0))
    assert error.value.hint
    with pytest.raises(UsageError, match="full depth of 1"):
        Drafts().depths(1)
    with pytest.raises(DataError, match="no tokens"):
        generate_drafted(weights, random_ids(0), Drafts(), rng=np.random.default_rng(0))


def test_every_combination_of_small_drafts_gives_the_same_text(weights: Weights) -> None:
    prompt = random_ids(7, seed=9)
    expected = plain(weights, prompt, max_new_tokens=12)
    for loops, tokens in itertools.product(range(1, FULL), range(1, 7)):
        assert drafted(weights, prompt, Drafts(loops, tokens), max_new_tokens=12) == expected
