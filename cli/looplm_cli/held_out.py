"""Text or sequences that a model was not trained on, cut into batches: what `eval` and `calibrate` measure on."""

import dataclasses
from typing import TYPE_CHECKING

from looplm.errors import DataError, UsageError
from looplm_cli.inputs import Opened

if TYPE_CHECKING:
    from looplm.data import Batch
    from looplm.tasks.hops import HopsSource

LONGEST_WINDOW = 256  # tokens of context when nothing says what the model was trained with


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Data to measure on."""

    name: str
    batches: "list[Batch]"
    bytes_per_token: float | None  # None where bits per byte mean nothing
    max_hops: int = 0  # above 0 on the hops task


def held_out(
    model: Opened, corpus: list[str], seq_len: int | None, batch_size: int, encoding: str, errors: str
) -> HeldOut:
    """What to measure a model on: a corpus, or what its run held out, or new sequences of its task.

    Raises: DataError for a corpus that cannot be read or has nothing to predict, UsageError if there is none, or for
    `errors` that are no way to read one.
    """
    from looplm.settings import ON_ERRORS

    if errors not in ON_ERRORS:
        raise UsageError(f"--errors {errors!r} is not known", f"use one of {', '.join(ON_ERRORS)}")
    length = seq_len or _trained_length(model)
    context = model.config.max_position_embeddings
    if length > context:
        raise UsageError(f"--seq-len {length} is more than the model's context of {context}", f"use at most {context}")
    if model.task == "hops":
        if corpus not in ([], ["builtin:hops"]):
            raise DataError(f"{model.folder} was trained on the task hops, not on text", "leave the corpus out")
        found = _hops(model, length, batch_size)
    elif corpus:
        found = _text(model, corpus, length, batch_size, encoding, errors)
    else:
        found = _run_held_out(model, length, batch_size)
    if not any((batch.target >= 0).any() for batch in found.batches):
        raise DataError(f"{found.name} has no token to predict", "give a longer text")
    return found


def _trained_length(model: Opened) -> int:
    if model.task_settings.get("seq_len"):
        return int(model.task_settings["seq_len"])
    if model.run is not None:
        from looplm.settings import from_yaml

        return from_yaml(model.run / "config.yaml").train.seq_len
    return min(LONGEST_WINDOW, model.config.max_position_embeddings)


def hops_source(model: Opened, length: int | None = None, batch_size: int = 16) -> "HopsSource":
    """Sequences of the task a model was trained on."""
    from looplm.tasks.hops import HopsSource

    return HopsSource(batch_size, length or _trained_length(model), seed=0, **model.hops_alphabet())


def _hops(model: Opened, length: int, batch_size: int) -> HeldOut:
    source = hops_source(model, length, batch_size)
    return HeldOut("builtin:hops, new sequences", list(source.validation()), None, source.settings["max_hops"])


def _text(model: Opened, corpus: list[str], length: int, batch_size: int, encoding: str, errors: str) -> HeldOut:
    from looplm.corpus import read_corpus
    from looplm.data import encode_corpus, windows

    documents = read_corpus(corpus, encoding, errors).documents
    ids = encode_corpus(model.tokenizer, documents)
    size = sum(len(document.encode()) for document in documents)
    return HeldOut(", ".join(corpus), list(windows(ids, batch_size, length)), size / len(ids))


def _run_held_out(model: Opened, length: int, batch_size: int) -> HeldOut:
    from looplm.data import load_tokens, windows

    path = None if model.run is None else model.run / "data" / "val.npy"
    if path is None or not path.exists():
        raise UsageError(f"{model.folder} has no held-out text beside it", "name a text: looplm eval FILE")
    ids = load_tokens(path)
    size = len(model.tokenizer.decode(ids.tolist()).encode())
    return HeldOut(f"held-out text of {model.run}", list(windows(ids, batch_size, length)), size / len(ids))


def halves(batches: "list[Batch]") -> "tuple[list[Batch], list[Batch]]":
    """The first and the second half of all windows: one to fit on, one to judge on."""
    middle, seen = sum(len(batch.input_ids) for batch in batches) // 2, 0
    first: list[Batch] = []
    second: list[Batch] = []
    for batch in batches:
        cut = min(max(middle - seen, 0), len(batch.input_ids))
        seen += len(batch.input_ids)
        for half, rows in ((first, slice(cut)), (second, slice(cut, None))):
            if len(batch.input_ids[rows]):
                half.append(batch.rows(rows))
    return first, second


def pieces(batches: "list[Batch]", count: int) -> "list[Batch]":
    """Up to `count` windows from all over the data to decode, of equal length and without padding, a row each."""
    import numpy as np

    from looplm.data import Batch

    ids, target = (np.concatenate([getattr(b, name) for b in batches]) for name in ("input_ids", "target"))
    whole = target[:, -1] >= 0
    if whole.any():
        every = Batch(ids[whole], target[whole])
    else:
        every = Batch(ids, target).positions(int(np.flatnonzero((target >= 0).any(axis=0))[-1]) + 1)
    numbers = np.unique(np.linspace(0, len(every.input_ids) - 1, count).astype(int))
    return [every.rows(slice(i, i + 1)) for i in numbers]


def two_halves(data: HeldOut) -> "tuple[list[Batch], list[Batch]]":
    """The same of data to measure on.  Raises: DataError if there are not two windows."""
    first, second = halves(data.batches)
    if not first or not second:
        raise DataError(
            f"{data.name} is too short: one half teaches the gate, the other judges it", "give a longer text"
        )
    return first, second
