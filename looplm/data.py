"""From documents to batches: encoding, token files, windows.

A batch is a pure function of (seed, step), so that a resumed run sees what the killed one would have seen.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import Array, Ints
from .corpus import read_corpus, split
from .errors import DataError

if TYPE_CHECKING:  # the tokenizer library costs 40 ms to import; a batch does not need it
    from .settings import DataConfig
    from .text import Tokenizer


@dataclasses.dataclass(frozen=True)
class Batch:
    """Ids and targets apart, so that a task's targets need not be the next token.

    input_ids: BS, target: BS, start: B.  A target of -1 is not counted; start is a row's first real position under left
    padding, None when there is none.
    """

    input_ids: Ints
    target: Ints
    start: Ints | None = None

    def rows(self, part: slice) -> "Batch":
        """Some of the rows, in place."""
        return Batch(self.input_ids[part], self.target[part], None if self.start is None else self.start[part])

    def positions(self, count: int) -> "Batch":
        """The first positions of every row, in place."""
        return Batch(self.input_ids[:, :count], self.target[:, :count], self.start)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A text ready for training, and where it came from (as in Corpus.origin)."""

    tokenizer: "Tokenizer"
    train_ids: Ints
    val_ids: Ints
    origin: list[dict[str, Any]]
    bytes_per_token: float  # of the held-out text; <|endoftext|> is a token of no bytes


def encode_corpus(tokenizer: "Tokenizer", documents: Sequence[str], continued: bool = False) -> Ints:
    """All documents' ids in one row, <|endoftext|> before each where the tokenizer has it.

    With `continued` the first document is the rest of one that started elsewhere, and gets none.
    """
    mark = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int64)
    rows = [np.zeros(0, np.int64)]
    for number, document in enumerate(documents):
        if number or not continued:
            rows.append(mark)
        rows.append(tokenizer.encode_long(document))
    return np.concatenate(rows)


def prepare_text(data: "DataConfig", seq_len: int, tokenizer: "Tokenizer | None" = None) -> Prepared:
    """Read, hold out, choose or train the tokenizer (on the training part only) and encode.

    `tokenizer`: a model's own, instead of the one that `data` asks for.

    Raises: DataError for what read_corpus refuses, a tokenizer that loses text, or too few tokens for one window.
    """
    corpus = read_corpus(data.corpus, data.encoding, data.errors)
    train, val = split(corpus, data.val_fraction)
    chosen = tokenizer or _choose_tokenizer(data, train)
    train_ids = encode_corpus(chosen, train)
    cut_inside = len(train) + len(val) > len(corpus.documents)
    val_ids = encode_corpus(chosen, val, continued=cut_inside)
    if tokenizer is None:
        _check_round_trip(chosen, [*train, *val], np.concatenate([train_ids, val_ids]), data.tokenizer)
    if len(train_ids) <= seq_len:
        raise DataError(
            f"the corpus is too small: {len(train_ids)} tokens ({_byte_count(train)} bytes) to train on, "
            f"{seq_len + 1} needed for train.seq_len={seq_len}",
            "add text" + (f", or use --set train.seq_len={len(train_ids) - 1}" if len(train_ids) > 2 else ""),
        )
    if len(val_ids) < 2:
        raise DataError(f"the held-out part has {len(val_ids)} token, 2 needed", "add text, or raise --val-fraction")
    return Prepared(chosen, train_ids, val_ids, corpus.origin, _byte_count(val) / len(val_ids))


def save_tokens(path: str | pathlib.Path, ids: Ints) -> None:
    """Write ids as .npy, two bytes each where they fit and else four; whole or not at all."""
    path = pathlib.Path(path)
    dtype = np.uint16 if ids.size == 0 or ids.max() < 1 << 16 else np.uint32
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            np.save(file, ids.astype(dtype))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        seen = error.strerror or str(error)  # NumPy's own, about space, has no errno
        raise DataError(f"cannot write {path}: {seen}", "free some space, or choose another folder") from error


def load_tokens(path: str | pathlib.Path) -> Array:
    """Ids written by save_tokens, mapped: uint16 or uint32.  Raises: DataError if the file is missing or damaged."""
    cure = "start the run anew from its corpus"
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read token file {path}: {' '.join(str(error).split())}", cure) from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype not in (np.uint16, np.uint32):
        raise DataError(f"{path} does not hold one row of token ids", cure)
    return ids


def windows(ids: Array, batch_size: int, seq_len: int, max_batches: int | None = None) -> Iterator[Batch]:
    """Cut ids into windows side by side, so that every id but the first is a target exactly once.

    input_ids: BS, target: BS.  The last window is padded on the right with target -1; the last batch may have fewer
    rows.  With `max_batches`, that many batches of windows spread evenly over the ids.
    """
    starts = np.arange(0, max(len(ids) - 1, 0), seq_len)
    if max_batches is not None and max_batches * batch_size < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, max_batches * batch_size).astype(np.int64)]
    for first in range(0, len(starts), batch_size):
        at = starts[first : first + batch_size, None] + np.arange(seq_len + 1)
        inside = at < len(ids)
        window = np.where(inside, ids[np.minimum(at, len(ids) - 1)].astype(np.int64), 0)
        yield Batch(window[:, :-1], np.where(inside[:, 1:], window[:, 1:], -1))


class TextSource:
    """Batches of a tokenised text: random windows to train on, windows side by side of what was held out."""

    kind = "text"

    def __init__(
        self,
        train_ids: Array,
        val_ids: Array,
        batch_size: int,
        seq_len: int,
        seed: int,
        bytes_per_token: float,
        vocab_size: int,
    ) -> None:
        self.bytes_per_token = bytes_per_token
        self.vocab_size = vocab_size
        self.val_tokens = max(len(val_ids) - 1, 0)  # the first has nothing before it to be predicted from
        self._train_ids, self._val_ids = train_ids, val_ids
        self._batch_size, self._seq_len, self._seed = batch_size, seq_len, seed

    def batch(self, step: int) -> Batch:
        """The windows of an optimizer step, a pure function of (seed, step).  input_ids: BS, target: BS"""
        rng = np.random.default_rng([self._seed, step])
        start = rng.integers(0, len(self._train_ids) - self._seq_len, self._batch_size)
        window = self._train_ids[start[:, None] + np.arange(self._seq_len + 1)].astype(np.int64)
        return Batch(window[:, :-1], window[:, 1:])

    def validation(self, max_batches: int | None = None) -> Iterator[Batch]:
        """The held-out text, always the same windows; all of it, or `max_batches` spread over it."""
        return windows(self._val_ids, self._batch_size, self._seq_len, max_batches)


def _choose_tokenizer(data: "DataConfig", train: list[str]) -> "Tokenizer":
    from . import text

    if data.tokenizer == "bytes":
        return text.byte_tokenizer()
    if data.tokenizer != "auto":
        return text.Tokenizer.from_file(data.tokenizer)
    return text.train_bpe(train, data.vocab_size or text.choose_vocab_size(_byte_count(train)))


def _byte_count(documents: list[str]) -> int:
    return sum(len(document.encode()) for document in documents)


def _check_round_trip(tokenizer: "Tokenizer", documents: list[str], ids: Ints, name: str) -> None:
    text, back = "".join(documents), tokenizer.decode(ids.tolist())
    if back == text:
        return
    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    raise DataError(
        f"tokenizer {name} does not give the text back: it differs at character {at} ({text[at : at + 1]!r})",
        "use --tokenizer auto or bytes, which lose nothing",
    )
