"""From logits to the next token.  Chance comes in as a number, so that everything here is a pure function."""

import dataclasses

import numpy as np

from .arrays import Array, Floats
from .errors import DataError, UsageError
from .kernels import choice

LIKELY = 256  # tokens among which those that reach top_p are looked for, before all are sorted
COLDEST = 1e-3  # a temperature whose inverse float32 exponentials still bear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose among the logits, in the order the settings are applied.

    Raises: UsageError if a value is out of range, naming it.
    """

    repetition_penalty: float = 1.0  # above 1: tokens seen before become less likely
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 0  # only the k most likely (and ties with the last of them); 0: all
    top_p: float = 1.0  # only the most likely tokens that together reach this probability
    min_p: float = 0.0  # only tokens at least this fraction as likely as the most likely one

    def __post_init__(self) -> None:
        for name, fits, cure in (
            ("repetition_penalty", 0.0 < self.repetition_penalty < np.inf, "1 means none, 1.1 discourages repeats"),
            ("temperature", 0.0 <= self.temperature < np.inf, "0 is greedy, e.g. 0.8 is lively"),
            ("top_k", self.top_k >= 0, "0 means all tokens"),
            ("top_p", 0.0 <= self.top_p <= 1.0, "1 means all tokens"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "0 means all tokens"),
        ):
            if not fits:
                raise UsageError(f"{name}={getattr(self, name)} cannot be used", cure)

    @property
    def plain(self) -> bool:
        """Whether only the temperature counts, so that the kernel can choose."""
        cut = self.top_k or self.top_p < 1.0 or self.min_p
        return self.repetition_penalty == 1.0 and not cut and (self.temperature == 0.0 or self.temperature >= COLDEST)


GREEDY = Sampling(temperature=0.0)


def probabilities(logits: Floats, sampling: Sampling, seen: Array | None = None) -> Array:
    """The distribution a token is drawn from.  logits: V, seen: V (true for tokens that were there before) -> prob: V.

    Raises: DataError if the logits are not finite numbers.
    """
    score = logits.astype(np.float64)
    if seen is not None and sampling.repetition_penalty != 1.0:
        # Towards less likely from both sides of zero: a plain factor would reward negative logits.
        penalty, before = sampling.repetition_penalty, score[seen]
        score[seen] = np.where(before > 0.0, before / penalty, before * penalty)
    highest = score.max()
    if not np.isfinite(highest):
        raise DataError(f"the model's logits reach {highest}, which is no probability", "its weights may hold NaN")
    if sampling.temperature == 0.0:
        prob = np.zeros_like(score)
        prob[score.argmax()] = 1.0
        return prob
    with np.errstate(over="ignore"):  # at a tiny temperature all but the highest become -inf: probability 0
        score = (score - highest) / sampling.temperature
    if 0 < sampling.top_k < score.size:
        border = score.size - sampling.top_k
        score[score < np.partition(score, border)[border]] = -np.inf
    prob = np.exp(score)
    prob /= prob.sum()
    if sampling.top_p < 1.0:
        prob = _most_likely(prob, sampling.top_p)
    if sampling.min_p > 0.0:
        prob[prob < sampling.min_p * prob.max()] = 0.0
    return prob / prob.sum()


def _most_likely(prob: Array, top_p: float) -> Array:
    """Zero but for the most likely tokens that together reach `top_p`, of equal ones those of lower ids.  V -> V"""
    border = np.partition(prob, -LIKELY)[-LIKELY] if prob.size > LIKELY else 0.0
    likely = np.flatnonzero(prob >= border)
    if prob[likely].sum() < top_p + 1e-9:  # not these alone, or not beyond what rounding does
        likely = np.flatnonzero(prob)
    likely = likely[np.argsort(-prob[likely], kind="stable")]
    enough = np.cumsum(prob[likely]) >= top_p
    likely = likely[: 1 + (int(enough.argmax()) if enough[-1] else likely.size)]
    kept = np.zeros_like(prob)
    kept[likely] = prob[likely]
    return kept


def draw(prob: Array, coin: float) -> int:
    """The token whose share of [0, 1), laid out in the order of ids, `coin` falls into; never one of probability 0."""
    border = np.cumsum(prob)
    # A sum of 1 + 1e-16 times a coin just below 1 may round up to the sum itself.
    place = min(coin * border[-1], np.nextafter(border[-1], 0.0))
    return int(np.searchsorted(border, place, side="right"))


def choose(logits: Floats, sampling: Sampling, coin: float, seen: Array | None = None) -> tuple[int, float]:
    """The next token, and its log-probability under the model itself (nats, before any setting).  logits: V."""
    if sampling.plain:
        token_id, logprob = choice.choose(np.ascontiguousarray(logits, np.float32), sampling.temperature, coin)
        if token_id >= 0:
            return token_id, logprob
    token_id = draw(probabilities(logits, sampling, seen), coin)
    return token_id, log_probability(logits, token_id)


def log_probability(logits: Floats, token_id: int) -> float:
    """Of one token under the model itself, nats.  logits: V."""
    return float(logits[token_id]) - float(choice.log_total(np.ascontiguousarray(logits, np.float32)))


def accepts(prob: Array, guess: Array, token_id: int, coin: float) -> bool:
    """Whether a token drawn from `guess` stands as one drawn from `prob`: with probability min(1, prob / guess).

    prob, guess: V.  Together with `remainder` for the tokens refused, what stands is distributed as `prob`.
    """
    return bool(coin * guess[token_id] < prob[token_id])


def remainder(prob: Array, guess: Array) -> Array:
    """The distribution to draw from after a refusal: what `prob` has more than `guess`.  V"""
    more = np.maximum(prob - guess, 0.0)
    total = more.sum()
    return more / total if total > 0.0 else prob  # equal but for rounding
