"""What `looplm verify` checks of drafting: text and probabilities against greedy decoding by full recomputation in
float64, the distribution of what stands, and wrong versions that these checks must catch."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from looplm.arrays import Array, Floats, Ints
from looplm.config import model_config_from_json
from looplm.draft_plans import FLOW, Drafts, Length
from looplm.drafting import Drafter, generate_drafted
from looplm.errors import DataError
from looplm.sampling import GREEDY, accepts, remainder
from looplm.weights import Weights
from looplm_reference import judge, ops
from looplm_reference.contract import Row, first_failure, relative_error
from looplm_reference.model import LoopLM

PROMPT, NEW = 5, 16
ROOM = 128  # positions: wrong versions may use up more than they should
LENGTHS: tuple[Length, ...] = (1, 2, 5, FLOW)  # drafts between two checks
COINS = 1000
MODELS = {name: {**config, "max_position_embeddings": ROOM} for name, config in judge.MODELS.items()}


def compare(name: str, kind: type[Drafter] = Drafter, lengths: tuple[Length, ...] = LENGTHS) -> Iterator[Row]:
    """One of the judge's models, drafted in every depth and some lengths; a model of one loop has nothing to draft."""
    config = MODELS[name]
    tensors = judge.random_tensors(config)
    floats = {key: np.asarray(value, np.float32) for key, value in tensors.items()}
    weights = Weights.from_tensors(model_config_from_json(config, "the judge's model"), floats)
    for seed in range(2):
        prompt = np.random.default_rng(seed).integers(0, config["vocab_size"], PROMPT)
        tokens, logprobs = _reference(LoopLM(tensors, config), prompt)
        for loops, count in itertools.product(range(1, config["total_ut_steps"]), lengths):
            place = f"{name}: text {seed + 1}, drafts of {loops} loops by {count}"
            try:
                found = _drafted(weights, prompt, Drafts(loops, count), kind)
            except DataError as error:  # a wrong version may read memory that nothing was written to
                yield Row(f"{place}.tokens", math.inf, 0.0, str(error))
                continue
            wrong = float(np.mean([token.token_id for token in found] != tokens))
            yield Row(f"{place}.tokens", wrong, 0.0)
            given = np.array([token.logprob for token in found])
            yield Row(f"{place}.logprobs", relative_error(logprobs, given), judge.TOLERANCE)


def _drafted(weights: Weights, prompt: Ints, drafts: Drafts, kind: type[Drafter]) -> list[Any]:
    rng = np.random.default_rng(0)
    tokens = generate_drafted(
        weights, prompt, drafts, rng=rng, sampling=GREEDY, max_new_tokens=ROOM - PROMPT, kind=kind
    )
    return list(itertools.islice(tokens, NEW))


def _reference(model: LoopLM, prompt: Ints) -> tuple[Ints, Array]:
    """Greedy tokens after all loops, recomputed one by one, and their log-probabilities."""
    ids = model.greedy(prompt[None], 1.0, NEW)
    logits = model.forward(ids[:, :-1])["logits"][-1, 0, PROMPT - 1 :]
    tokens = ids[0, PROMPT:]
    loss, _ = ops.cross_entropy_forward(logits[None], tokens[None])
    return tokens, -loss[0]


Accepts = Callable[[Array, Array, int, float], bool]
Remainder = Callable[[Array, Array], Array]


def compare_distributions(accepted: Accepts = accepts, drawn_again: Remainder = remainder) -> Iterator[Row]:
    """What stands after one draft: q times the coins that accept it, the rest drawn again, has to be p."""
    rng = np.random.default_rng(0)
    coins = (np.arange(COINS) + 0.5) / COINS
    for number in range(1, 4):
        prob, guess = (np.exp(2.0 * rng.standard_normal(6 + number)) for _ in range(2))
        prob, guess = prob / prob.sum(), guess / guess.sum()
        prob[number], guess[-number] = 0.0, 0.0  # as filters leave them
        prob, guess = prob / prob.sum(), guess / guess.sum()
        chance = np.array([np.mean([accepted(prob, guess, one, coin) for coin in coins]) for one in range(prob.size)])
        stands = guess * chance
        stands += (1.0 - stands.sum()) * drawn_again(prob, guess)
        yield Row(f"distribution {number}", relative_error(prob, stands), 2.0 / COINS)


# ---- wrong versions


class _AcceptsEverything(Drafter):
    def _accepts(self, prob: Array, guess: Array, token: int) -> bool:
        return True


class _ForgetsToRewind(Drafter):
    def _keep(self, count: int, run: int) -> None:
        self.cache.append(run)


class _ChecksWithTheShallowHead(Drafter):
    def check(self, loops: int, count: int) -> None:
        super().check(loops, count)
        self._drafted_with = loops

    def _read(self, loops: int, row: int, count: int) -> Floats:
        return super()._read(self._drafted_with if loops == self.loops else loops, row, count)


class _OnePositionEarly(Drafter):
    def _positions(self, count: int) -> Ints:
        return super()._positions(count) - 1


class _DraftsInOnePlace(Drafter):
    """Every draft overwrites the position of the one before."""

    def _run_first_loops(self, token: int, row: int, loops: int) -> None:
        super()._run_first_loops(token, 0, loops)
        self._decoder.states[loops - 1, row] = self._decoder.states[loops - 1, 0]


@dataclasses.dataclass(frozen=True)
class DraftMutant:
    """A mistake in drafting."""

    name: str
    rows: Callable[[], Iterator[Row]]

    def first_failure(self) -> Row | None:
        """The first row that catches it, if any does."""
        with np.errstate(all="ignore"):
            return first_failure(self.rows())


def _wrong(kind: type[Drafter], *lengths: Length) -> Callable[[], Iterator[Row]]:
    return lambda: itertools.chain.from_iterable(compare(name, kind, lengths or LENGTHS) for name in MODELS)


MUTANTS = (
    DraftMutant("accepts everything", _wrong(_AcceptsEverything)),
    DraftMutant("forgets to rewind", _wrong(_ForgetsToRewind)),
    DraftMutant("checks with the shallow head", _wrong(_ChecksWithTheShallowHead)),
    DraftMutant("checks one position early", _wrong(_OnePositionEarly)),
    DraftMutant("drafts all in one place", _wrong(_DraftsInOnePlace)),
    DraftMutant("flow: accepts everything", _wrong(_AcceptsEverything, FLOW)),
    DraftMutant("flow: forgets to rewind", _wrong(_ForgetsToRewind, FLOW)),
    DraftMutant("flow: one position early", _wrong(_OnePositionEarly, FLOW)),
    DraftMutant("accepts whatever q drew", lambda: compare_distributions(accepted=lambda *_: True)),
    DraftMutant("accepts with p alone", lambda: compare_distributions(lambda p, q, token, coin: coin < p[token])),
    DraftMutant("draws again from p", lambda: compare_distributions(drawn_again=lambda p, q: p)),
)


def draft_checks() -> Iterator[tuple[str, list[Row]]]:
    """A name and the comparisons behind it."""
    for name, config in MODELS.items():
        if config["total_ut_steps"] > 1:
            yield f"{name}: tokens and probabilities", list(compare(name))
    yield "what stands is distributed as the full model", list(compare_distributions())


def draft_mutants() -> Iterator[tuple[str, Row | None]]:
    """Each mistake, and the row that caught it."""
    return ((mutant.name, mutant.first_failure()) for mutant in MUTANTS)
