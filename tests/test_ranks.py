"""Several ranks train as one: the same losses, the same weights, one set of files, one message, one end.

Two threads of this process play two ranks.  test_mpi.py starts real ones.
"""

import dataclasses
import json
import pathlib
import re
import threading
import types
from typing import Any

import numpy as np
import pytest
import typer

import test_training
import tiny_training
from benchmarks import kill_resume
from looplm import ranks as ranks_module
from looplm.arrays import Floats
from looplm.data import Batch, TextSource
from looplm.errors import CheckpointError, DataError, TrainingError, UsageError
from looplm.ranks import ALONE, Ranks, SharedError, first_does, share
from looplm.run_folder import RunFolder
from looplm.settings import InitConfig, TrainConfig
from looplm.tasks.hops import HopsSource
from looplm.training import EvalReport, StepReport, Trainer
from looplm.training_run import resume_run, start_run
from looplm.weights import initialise
from looplm_cli.interrupts import Interrupted, ranks_as_one
from played_ranks import Meeting, Player, play

# ---- the same training


class Uneven(TextSource):
    """Rows of which some have many targets and some none, so that ranks differ in what they count."""

    def batch(self, step: int) -> Batch:
        batch = super().batch(step)
        row, position = np.ogrid[: len(batch.target), : batch.target.shape[1]]
        return dataclasses.replace(batch, target=np.where(position < 5 * row, batch.target, -1))


def trainer(ranks: Ranks, kind: str, **changes: Any) -> Trainer:
    """Two rows for each of two ranks, or four for one."""
    settings: dict[str, Any] = {"batch_size": 4 // ranks.size, "seq_len": 16, "threads": 1, "steps": 9, "eval_every": 4}
    settings |= {"precision": "fp32", **changes}  # where sums of other rows round to nearly the same
    config, model = TrainConfig(**settings, eval_tokens=64), test_training.MODEL
    rows, text = config.batch_size * ranks.size, test_training.TEXT
    if kind == "hops":
        source: Any = HopsSource(rows, config.seq_len, 0)
    else:  # held out are 9 windows: the last batch has one row, so that one rank has none
        source = (Uneven if kind == "uneven" else TextSource)(
            text, text[: 8 * 16 + 10], rows, config.seq_len, 0, 1.0, 20
        )
    return Trainer(initialise(model, InitConfig(), 0), source, config, ranks)


@pytest.mark.parametrize("kind", ["text", "uneven", "hops"])
def test_two_ranks_train_as_one_with_twice_the_rows(kind: str) -> None:
    def work(ranks: Ranks) -> tuple[list[Any], Floats]:
        run = trainer(ranks, kind)
        return list(run.run()), run.weights.contiguous()

    expected, weights = work(ALONE)
    (first, mine), (second, others) = play(2, work)
    np.testing.assert_array_equal(mine, others)
    np.testing.assert_allclose(mine, weights, atol=2e-5)
    for found, also, wanted in zip(first, second, expected, strict=True):
        assert type(found) is type(wanted)
        if isinstance(wanted, StepReport):
            for name in ("loss", "exit_prob", "objective", "entropy", "gradient_norm"):
                np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=2e-5, err_msg=name)
                assert getattr(found, name) == getattr(also, name)
            assert (found.tokens, found.learning_rate) == (wanted.tokens, wanted.learning_rate)
        else:
            assert isinstance(wanted, EvalReport)
            for name in ("tokens", "loss", "accuracy", "exit_prob", "hazard"):
                given = getattr(found.evaluation, name)
                np.testing.assert_allclose(given, getattr(wanted.evaluation, name), rtol=2e-5, err_msg=name)
            assert found.evaluation.bytes_per_token == wanted.evaluation.bytes_per_token
    assert len(first) == 12


def test_the_first_rank_times_a_budget_of_minutes_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that each measure for themselves would settle on different numbers of steps, and wait forever."""
    seconds = {"looplm-rank-0": 0.25, "looplm-rank-1": 0.5}
    now = threading.local()

    def look() -> float:
        now.time = getattr(now, "time", 0.0) + seconds[threading.current_thread().name]
        return now.time

    def work(ranks: Ranks) -> int:
        threading.current_thread().name = f"looplm-rank-{ranks.rank}"
        return len(list(trainer(ranks, "text", minutes=0.1, steps=0, eval_every=10**6).run()))

    monkeypatch.setattr(test_training.training, "time", types.SimpleNamespace(perf_counter=look))
    # 6 s: a first step that is not charged, two of 0.25 s, and as many as fill 5.4 s; then the evaluation
    assert play(2, work) == [1 + 2 + int((5.4 - 0.5) / 0.25) + 1] * 2


def test_a_loss_that_is_no_number_on_one_rank_stops_all_at_the_same_step() -> None:
    class Sick(TextSource):
        def batch(self, step: int) -> Batch:
            batch = super().batch(step)
            batch.input_ids[-1, 0] = 19 if step == 2 else 0  # a row of the second rank
            return batch

    def work(ranks: Ranks) -> Any:
        run = trainer(ranks, "text")
        run.source = Sick(test_training.TEXT[:300] % 19, test_training.TEXT, 4, 16, 0, 1.0, 20)
        run.weights.embedding[19] = np.nan
        try:
            with np.errstate(all="ignore"):
                list(run.run())
        except TrainingError as error:
            return run.progress.step, str(error)

    assert play(2, work) == [(2, "the loss became nan at step 3")] * 2


def test_threads_are_shared_out_where_no_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_training.training, "available_threads", lambda: 8)
    for sharing, given, used in ((1, 0, 8), (3, 0, 2), (16, 0, 1), (4, 5, 5)):
        assert trainer(Player(0, Meeting(2), sharing), "text", threads=given).threads == used


@pytest.mark.parametrize(("rows", "size"), [(8, 2), (7, 3), (1, 2), (5, 5)])
def test_every_row_is_one_ranks(rows: int, size: int) -> None:
    parts = [share(Player(rank, Meeting(size)), rows) for rank in range(size)]
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    assert max(len(range(rows)[part]) for part in parts) == -(-rows // size)


# ---- one folder


def settings(story: str, **train: Any) -> Any:
    return tiny_training.settings(story, **{"steps": 8, "checkpoint_every": 3, "batch_size": 2, **train})


def test_the_first_rank_writes_and_another_number_of_ranks_can_go_on(
    story: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calm = tmp_path / "run", tmp_path / "calm"
    with start_run(settings(story, batch_size=4), calm) as run:
        list(run.reports())

    def begin(ranks: Ranks) -> Floats:
        with start_run(settings(story), folder, ranks) as run:
            if ranks.rank == 1:
                monkeypatch.setattr(run.folder, "save_state", None)
            for report in run.reports():
                if report.step == 5:
                    break
            run.save()
            ranks.sum_small([0.0])
            return run.weights.contiguous().copy()

    mine, others = play(2, begin)
    np.testing.assert_array_equal(mine, others)
    assert json.loads((folder / "data" / "meta.json").read_text())["ranks"] == 2
    assert json.loads((folder / "model" / "looplm.json").read_text())["steps"] == 5

    def go_on(ranks: Ranks) -> tuple[int, int, int]:
        with resume_run(folder, 0, ranks) as run:
            began = run.trainer.progress.step
            reports = list(zip(range(1), run.reports(), strict=False))
            run.save()
            return began, run.config.train.batch_size, len(reports)

    assert play(2, go_on) == [(5, 2, 1)] * 2
    assert play(4, go_on) == [(6, 1, 1)] * 4
    with resume_run(folder) as run:
        assert run.config.train.batch_size == 4
        list(run.reports())
    shared, alone = kill_resume.read_log(folder), kill_resume.read_log(calm)
    assert [line["step"] for line in shared] == [line["step"] for line in alone] == [*range(1, 9), 8]
    for line, wanted in zip(shared[:-1], alone[:-1], strict=True):
        np.testing.assert_allclose(line["loss"], wanted["loss"], rtol=2e-5)


def test_a_number_of_ranks_that_does_not_divide_the_rows_is_refused(story: str, tmp_path: pathlib.Path) -> None:
    with start_run(settings(story), tmp_path / "run") as run:
        list(run.reports())
    before = kill_resume.read_log(tmp_path / "run")

    def go_on(ranks: Ranks) -> None:
        with resume_run(tmp_path / "run", 0, ranks):
            pass

    for error in play(3, go_on):
        assert isinstance(error, SharedError)
        assert str(error) == "a step of this run takes 2 rows (1 rank x 2), which 3 ranks cannot share evenly"
        assert error.hint == "resume it by `mpiexec -n N`, with N one of 1, 2"
    assert kill_resume.read_log(tmp_path / "run") == before


def test_a_rank_that_does_not_see_the_folder_says_so(
    story: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine of its own, without a common file system."""
    right = RunFolder.__init__

    def elsewhere(self: RunFolder, path: pathlib.Path) -> None:
        right(self, path / "not here" if threading.current_thread().name == "looplm-rank-1" else path)

    def work(ranks: Ranks) -> None:
        threading.current_thread().name = f"looplm-rank-{ranks.rank}"
        with start_run(settings(story), tmp_path / "run", ranks):
            pass

    monkeypatch.setattr(RunFolder, "__init__", elsewhere)
    monkeypatch.setattr(Player, "broadcast_in_place", lambda self, buffer: None)  # rank 0 would wait for rank 1
    _, error = play(2, work)
    assert isinstance(error, CheckpointError)
    assert re.match(r"rank 1 does not see .*config\.yaml, which rank 0 does", str(error))
    assert "file system that all machines share" in error.hint


@pytest.mark.parametrize("ranks", ["0", "1.5", "null", "[2]"])
def test_a_number_of_ranks_that_is_none_is_refused(ranks: str, story: str, tmp_path: pathlib.Path) -> None:
    with start_run(settings(story), tmp_path / "run") as run:
        path = run.folder.data / "meta.json"
    path.write_text(path.read_text().rstrip()[:-1] + f', "ranks": {ranks}}}')
    with pytest.raises(CheckpointError, match=r"meta\.json is missing or damaged"), resume_run(tmp_path / "run"):
        pass


# ---- one message, one end


def test_what_the_first_rank_does_is_known_to_all() -> None:
    done: list[int] = []

    def work(ranks: Ranks) -> str:
        return first_does(ranks, lambda: done.append(ranks.rank) or f"by {ranks.rank}")

    assert play(3, work) == ["by 0"] * 3
    assert done == [0]
    assert first_does(ALONE, lambda: 7) == 7


def test_an_error_of_the_first_rank_is_shared() -> None:
    def fail() -> None:
        raise UsageError("seen", "cure")

    for error in play(2, lambda ranks: first_does(ranks, fail)):
        assert isinstance(error, SharedError)
        assert (str(error), error.hint, error.exit_code) == ("seen", "cure", 2)
    with pytest.raises(UsageError, match="seen"):
        first_does(ALONE, fail)


@pytest.mark.parametrize(
    ("rank", "error", "leaves", "aborted"),
    [
        (0, SharedError("x"), SharedError, None),
        (1, SharedError("x"), typer.Exit, None),
        (0, TrainingError("x"), TrainingError, None),
        (1, TrainingError("x"), typer.Exit, None),
        (0, Interrupted(), Interrupted, None),
        (1, Interrupted(), typer.Exit, None),
        (0, DataError("x"), DataError, 1),
        (1, UsageError("x"), UsageError, 2),
        (1, KeyboardInterrupt(), KeyboardInterrupt, 130),
        (1, ZeroDivisionError(), ZeroDivisionError, 1),
    ],
)
def test_an_error_of_all_is_told_once_and_one_of_a_single_rank_ends_all(
    rank: int, error: BaseException, leaves: type[BaseException], aborted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(rank, Meeting(2))
    monkeypatch.setattr(ranks_module, "connect", lambda: player)
    with pytest.raises(leaves) as caught, ranks_as_one():
        raise error
    assert type(caught.value) is leaves
    assert player.aborted == aborted
    if leaves is typer.Exit:
        assert caught.value.exit_code == 0
