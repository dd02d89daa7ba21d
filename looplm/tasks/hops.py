"""p-hop induction: the task on which loops visibly pay.  Generator, scorer, and prompts one can type.

A sequence is a digit p and random letters.  One hop from position i goes to the position after the last earlier
occurrence of the letter at i; the target at i is the letter reached after p hops, and -1 where a hop has nowhere to go.
(A letter twice in a row makes its second place hop to itself.)  Worked, for p = 1 and p = 2:

    place   0 1 2 3 4 5 6          place   0 1 2 3 4 5 6
    letter  1 a b c a c b          letter  2 a b c a c b
    target  . . . . b a c          target  . . . . . b .

At 5, "c" was last seen at 3, so one hop goes to 4, "a"; "a" at 4 was last seen at 1, so the second goes to 2, "b".

Ids: the digits first (p is id p - 1), then the letters.  A target is the answer at its place, not the next token.
"""

import string
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..arrays import Array, Ints
from ..data import Batch
from ..errors import DataError

if TYPE_CHECKING:
    from ..text import Tokenizer

ALPHABET = 8  # letters
MAX_HOPS = 3
MIN_LENGTH = 3  # a digit, and a letter twice
VALIDATION_BATCHES = 32  # what validation() gives when it is not told how many
_VALIDATION_STREAM = 2**31  # above any optimizer step, so no training sequence is drawn from it


def tokens(alphabet: int = ALPHABET, max_hops: int = MAX_HOPS) -> str:
    """The vocabulary in the order of its ids: "123abcdefgh".  Raises: DataError if digits or letters do not suffice."""
    if not 1 <= max_hops <= 9:
        raise DataError(f"hops: max_hops={max_hops} is outside 1..9", "one digit says how many hops")
    if not 2 <= alphabet <= len(string.ascii_lowercase):
        raise DataError(f"hops: alphabet={alphabet} is outside 2..26", "the letters are a to z")
    return string.digits[1 : max_hops + 1] + string.ascii_lowercase[:alphabet]


def sample(
    rng: np.random.Generator, batch_size: int, seq_len: int, alphabet: int = ALPHABET, max_hops: int = MAX_HOPS
) -> tuple[Ints, Ints]:
    """Draw sequences, every number of hops equally likely.  -> input_ids: BS, target: BS"""
    input_ids = max_hops + rng.integers(0, alphabet, (batch_size, seq_len))
    input_ids[:, 0] = rng.integers(0, max_hops, batch_size)
    return input_ids, targets(input_ids, alphabet, max_hops)


def targets(input_ids: Ints, alphabet: int = ALPHABET, max_hops: int = MAX_HOPS) -> Ints:
    """The answers.  input_ids: BS -> target: BS

    Raises: DataError if a row is not a digit's id followed by letters' ids.
    """
    _check_ids(input_ids, alphabet, max_hops)
    place = np.arange(input_ids.shape[1])
    # last_seen[b, i, letter]: the latest place up to i that holds the letter, -1 if none does
    here = input_ids[..., None] == max_hops + np.arange(alphabet)
    last_seen = np.maximum.accumulate(np.where(here, place[:, None], -1), axis=1)
    before = np.full(input_ids.shape, -1)
    before[:, 1:] = np.take_along_axis(last_seen[:, :-1], input_ids[:, 1:, None] - max_hops, axis=2)[..., 0]
    hop = np.where(before < 0, -1, before + 1)

    reached = np.broadcast_to(place, input_ids.shape)
    target = np.full(input_ids.shape, -1)
    for p in range(max_hops):
        reached = np.where(reached < 0, -1, np.take_along_axis(hop, np.maximum(reached, 0), axis=1))
        answer = np.where(reached < 0, -1, np.take_along_axis(input_ids, np.maximum(reached, 0), axis=1))
        target = np.where(input_ids[:, :1] == p, answer, target)
    return target


def parse_prompt(text: str, alphabet: int = ALPHABET, max_hops: int = MAX_HOPS) -> Ints:
    """A typed sequence such as "2abcacb"; white space is ignored.  -> input_ids: BS with one row

    Raises: DataError if it does not start with a digit in range, or goes on with anything but letters.
    """
    known = tokens(alphabet, max_hops)
    digits, letters = known[:max_hops], known[max_hops:]
    typed = "".join(text.split())
    example = f"e.g. {digits[-1]}{letters[:3] * 3}"
    if not typed:
        raise DataError("the prompt is empty", example)
    if typed[0] not in digits:
        raise DataError(
            f"the prompt starts with {typed[0]!r}: the first letter must be one of {' '.join(digits)}", example
        )
    for number, letter in enumerate(typed[1:], 2):
        if letter not in letters:
            raise DataError(f"letter {number} of the prompt is {letter!r}", f"use {' '.join(letters)}, {example}")
    return np.array([[known.index(letter) for letter in typed]], np.int64)


def hops_of(input_ids: Ints) -> Ints:
    """How many hops each row asks for, 1 and up.  input_ids: BS -> hops: B"""
    return input_ids[:, 0] + 1


def accuracy_by_hop_and_loop(predictions: Ints, target: Ints, hops: Ints, max_hops: int = MAX_HOPS) -> Array:
    """Share of right answers where there is one to give, NaN where there is none.

    predictions: RBS, target: BS, hops: B -> one row per number of hops, one column per loop
    """
    right = (predictions == target).astype(np.float64)
    return np.stack([mean_by_hop(loop, target, hops, max_hops) for loop in right], axis=1)


def mean_by_hop(values: Array, target: Ints, hops: Ints, max_hops: int = MAX_HOPS) -> Array:
    """Mean of anything per position (exit loops, say) over the positions that have a target, NaN where none has.

    values: BS, target: BS, hops: B -> one number per number of hops
    """
    means = np.full(max_hops, np.nan)
    for p in range(max_hops):
        counted = (target >= 0) & (hops == p + 1)[:, None]
        if counted.any():
            means[p] = values[counted].mean()
    return means


class HopsSource:
    """Fresh sequences each step, a pure function of (seed, step), and a fixed stream of others to validate on."""

    kind = "hops"
    bytes_per_token: float | None = None  # the answers are no text: bits per byte would mean nothing

    def __init__(
        self, batch_size: int, seq_len: int, seed: int, alphabet: int = ALPHABET, max_hops: int = MAX_HOPS
    ) -> None:
        if seq_len < MIN_LENGTH:
            raise DataError(f"hops: a sequence of {seq_len} has no question", f"use at least {MIN_LENGTH} positions")
        self.vocab_size = len(tokens(alphabet, max_hops))
        self.settings = {"alphabet": alphabet, "max_hops": max_hops, "seq_len": seq_len}
        self._batch_size, self._seed = batch_size, seed

    def tokenizer(self) -> "Tokenizer":
        """One token per digit and letter."""
        from ..text import letter_tokenizer

        return letter_tokenizer(tokens(self.settings["alphabet"], self.settings["max_hops"]))

    def batch(self, step: int) -> Batch:
        """The sequences of an optimizer step.  input_ids: BS, target: BS"""
        rng = np.random.default_rng([self._seed, step])
        settings = self.settings
        return Batch(*sample(rng, self._batch_size, settings["seq_len"], settings["alphabet"], settings["max_hops"]))

    def validation(self, max_batches: int | None = None) -> Iterator[Batch]:
        """Sequences that no step trains on, always the same; `hops_of` tells their rows apart."""
        for number in range(VALIDATION_BATCHES if max_batches is None else max_batches):
            yield self.batch(_VALIDATION_STREAM + number)


def _check_ids(input_ids: Ints, alphabet: int, max_hops: int) -> None:
    first, letters = input_ids[:, :1], input_ids[:, 1:]
    for name, ids, low, high in (
        ("first id", first, 0, max_hops),
        ("id after the first", letters, max_hops, max_hops + alphabet),
    ):
        outside = ids[(ids < low) | (ids >= high)]
        if outside.size:
            raise DataError(f"hops: {name} {outside[0]} is outside {low}..{high - 1}", "one digit, then letters")
