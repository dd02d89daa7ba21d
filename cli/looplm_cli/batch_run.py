"""`looplm generate --prompts`: many prompts, their answers as JSON lines, and an account of all."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looplm.errors import DataError, UsageError
from looplm_cli.prompt_file import Entry
from looplm_cli.render import Progress, exit_histogram, say, stdout
from looplm_cli.written import Written

if TYPE_CHECKING:
    from looplm.arrays import Ints
    from looplm.batching import Batch, Request
    from looplm_cli.inputs import Opened

TOLD_EVERY = 0.5  # seconds between two words on the progress


def check_combination(prompts: str | None, of_many: Mapping[str, object], of_one: Mapping[str, object]) -> None:
    """Raises: UsageError for an option, by its name and value, that says nothing about what was asked for."""
    wrong = of_many if prompts is None else of_one
    name = next((name for name, value in wrong.items() if value is not None), None)
    if name is not None and prompts is None:
        raise UsageError(f"{name} is about many prompts", "give a file of them with --prompts")
    if name is not None:
        raise UsageError(
            f"--prompts and {name} exclude each other", "the prompts are those of the file, and answers are JSON lines"
        )


def check_out(out: Path | None) -> None:
    """Raises: UsageError for a folder."""
    if out is not None and out.is_dir():
        raise UsageError(f"--out {out} is a folder", f"name a file, e.g. {out / 'answers.jsonl'}")


def encode_entries(opened: "Opened", entries: Sequence[Entry]) -> "list[Ints]":
    """Token ids of every prompt.  Raises: DataError that names the first line whose prompt does not fit the model."""
    from looplm.generation import check_prompt
    from looplm_cli.inputs import prompt_ids

    found = []
    for entry in entries:
        try:
            found.append(prompt_ids(opened, entry.prompt))
            check_prompt(found[-1], opened.config)
        except DataError as error:
            raise DataError(f"{entry.where}: {error}", error.hint) from error
    return found


class Answers:
    """The texts of a batch while they are written, and what is told of them."""

    def __init__(self, opened: "Opened", entries: Sequence[Entry], stop: Sequence[str], seed: int, depth: int) -> None:
        from looplm.generation import StopStrings

        self.seeds = [seed + number if entry.seed is None else entry.seed for number, entry in enumerate(entries)]
        self._entries, self._ids, self._done = entries, encode_entries(opened, entries), 0
        self._written = [Written(depth) for _ in entries]
        self._readers = [(opened.tokenizer.stream(), StopStrings(stop)) for _ in entries]

    def __len__(self) -> int:
        return len(self._entries)

    def requests(self, max_new_tokens: int) -> "list[Request]":
        """What the engine is asked for."""
        import numpy as np

        from looplm.batching import Request

        return [
            Request(ids, np.random.default_rng(seed), entry.max_new_tokens or max_new_tokens)
            for ids, seed, entry in zip(self._ids, self.seeds, self._entries, strict=True)
        ]

    def run(self, batch: "Batch", progress: Progress) -> Iterator[int]:
        """Write all texts -> numbers of the prompts, each once its text is whole."""
        begun = told = time.perf_counter()
        for count, (number, token) in enumerate(batch, 1):
            written, (decoder, guard) = self._written[number], self._readers[number]
            written.add(token, guard.push(decoder.push(token.token_id)), shown=False)
            now = written.moments[-1]
            whole = guard.found or token.finish is not None
            if whole:
                batch.stop(number)
                written.end(guard.push(decoder.flush()) + guard.flush(), guard.found, shown=False)
                self._done += 1
            if whole or now - told >= TOLD_EVERY:
                told = now
                rate = count / max(now - begun, 1e-9)
                progress.update(self._done, f"{count:,} tokens, {rate:,.1f} tokens/s, {batch.in_flight} in flight")
            if whole:
                yield number

    def line(self, number: int) -> str:
        """One answer as JSON; prompts and loops counted from 1."""
        entry, written = self._entries[number], self._written[number]
        answer: dict[str, Any] = {"index": number + 1, "id": entry.id, "prompt": entry.prompt}
        answer |= {"prompt_tokens": int(self._ids[number].size), "seed": self.seeds[number], **written.account()}
        answer["logprob"] = round(sum(token.logprob for token in written.tokens), 5)
        return json.dumps(answer, allow_nan=False) + "\n"

    def summary(self, batch: "Batch", seconds: float) -> str:
        every = Written(self._written[0].depth, tokens=[token for text in self._written for token in text.tokens])
        count = len(every.tokens)
        return (
            f"{self._done} of {len(self._entries)} prompts, {count:,} tokens in {seconds:.1f} s, "
            f"{count / seconds:,.1f} tokens/s; {batch.rows_run / max(1, batch.passes):.1f} rows in flight on average\n"
            f"loops {every.mean_loops:.2f} of {every.depth} on average, {100 * every.loops_saved:.0f} % saved; "
            f"read after loop {exit_histogram(every.exits)}"
        )


def run_prompts(answers: Answers, batch: "Batch", out: Path | None, unordered: bool, quiet: bool) -> None:
    """Write all answers; the account goes to stderr, also of what an interrupt leaves.

    Raises: CheckpointError, before anything is written, if there can be no file `out`; its folder is made.
    """
    from looplm.atomic import make_folder

    if out is not None:
        make_folder(out.parent)
    begun = time.perf_counter()
    beside = out is None and stdout().is_terminal  # answers that are seen need no bar between them
    try:
        with Progress(len(answers), "prompt", quiet=quiet or beside) as progress:
            done = answers.run(batch, progress)
            write_lines(map(answers.line, done if unordered else in_order(done)), out)
    finally:
        if not quiet:
            say(answers.summary(batch, time.perf_counter() - begun))


def in_order(numbers: Iterable[int]) -> Iterator[int]:
    """0, 1, 2, ..., each as soon as it and all before it have come."""
    come: set[int] = set()
    due = 0
    for number in numbers:
        come.add(number)
        while due in come:
            come.remove(due)
            yield due
            due += 1


def write_lines(lines: Iterable[str], out: Path | None) -> None:
    """To stdout as they come, or to a file once all are there.  Raises: CheckpointError if it cannot be written."""
    from looplm.atomic import write_text

    if out is not None:
        write_text(out, "".join(lines))
        return
    for line in lines:
        sys.stdout.write(line)
        sys.stdout.flush()
