"""Processes that an MPI launcher starts: recognised, refused without MPI, and real where mpi4py is installed."""

import importlib
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
import typer

import tiny_training
from benchmarks import kill_resume
from looplm import ranks as ranks_module
from looplm.errors import LoopLMError, UsageError
from looplm.ranks import ALONE, connect, launched
from looplm.training_run import start_run
from looplm_cli.interrupts import ranks_as_one


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, (3, 4)),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, None),
        ({"PMI_SIZE": "2"}, None),
        ({"PMI_RANK": "x", "PMI_SIZE": "2"}, None),
    ],
)
def test_a_launcher_is_recognised_by_what_it_sets(environment: dict[str, str], expected: Any) -> None:
    assert launched(environment) == expected


@pytest.fixture
def without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in ranks_module.LAUNCHERS:
        for name in names:
            monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("without_a_launcher")
def test_without_a_launcher_mpi_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    assert connect() is ALONE


@pytest.mark.usefixtures("without_a_launcher")
@pytest.mark.parametrize(("rank", "leaves"), [("0", UsageError), ("1", typer.Exit)])
def test_a_launcher_without_mpi4py_is_told_of_once(
    rank: str, leaves: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    monkeypatch.setenv("PMI_RANK", rank)
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(leaves) as caught, ranks_as_one():
        pass
    if isinstance(caught.value, LoopLMError):
        assert str(caught.value).startswith("mpiexec has started 2 ranks, but mpi4py does not load: ")
        assert caught.value.hint.startswith('pip install "looplm-cpu[mpi]"')


@pytest.mark.usefixtures("without_a_launcher")
def test_the_mpi_of_another_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process would take itself for the only one, and write over the others' files."""
    machine = types.SimpleNamespace(allgather=lambda value: [value], Free=lambda: None)
    world = types.SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1, Split_type=lambda kind: machine)
    monkeypatch.setattr(
        importlib, "import_module", lambda name: types.SimpleNamespace(COMM_WORLD=world, COMM_TYPE_SHARED=0)
    )
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(UsageError, match="started 2 ranks, but mpi4py sees 1"):
        connect()


STEPS = 160  # so many that a rank can die before the last, on any machine
FEW_STEPS = 40  # after more, rounding alone has moved two runs apart
BESIDE = pathlib.Path(sys.executable).with_name("mpiexec")
MPIEXEC = str(BESIDE) if BESIDE.exists() else shutil.which("mpiexec")
real = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or MPIEXEC is None,
    reason='needs mpi4py and mpiexec: pip install "looplm-cpu[mpi]"',
)


def mpi(*arguments: object) -> list[str]:
    return [str(MPIEXEC), "-n", "2", *kill_resume.TRAIN, *map(str, arguments), "--quiet"]


def begin(text: str, folder: pathlib.Path, steps: int = STEPS) -> list[str]:
    sizes = [*tiny_training.ARGUMENTS, "--set=train.checkpoint_every=5", "--set=train.precision=fp32", "--steps", steps]
    return mpi(text, *sizes, "--out-dir", folder)


def start(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def last_words(process: "subprocess.Popen[str]") -> str:
    """What a launcher and its ranks say until they end, which they must soon."""
    try:
        return process.communicate(timeout=60)[0]
    finally:
        process.kill()  # its ranks end with it


def wait_for_step(folder: pathlib.Path, step: int, process: "subprocess.Popen[str]") -> None:
    while kill_resume.last_step(folder) < step:
        assert process.poll() is None, process.communicate()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pathlib.Path]:
    """A text, and a run of two ranks on it from beginning to end."""
    place = tmp_path_factory.mktemp("ranks")
    text = place / "text.txt"
    text.write_text("".join(f"{n} squared is {n * n}, and cubed {n**3}.\n" for n in range(150)), encoding="utf-8")
    subprocess.run(begin(str(text), place / "calm"), check=True, timeout=120)
    return str(text), place / "calm"


@real
def test_real_ranks_give_what_one_process_gives_with_all_rows(
    undisturbed: tuple[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    text = undisturbed[0]
    subprocess.run(begin(text, tmp_path / "shared", FEW_STEPS), check=True, timeout=120)
    settings = tiny_training.settings(text, steps=FEW_STEPS, batch_size=8, precision="fp32")
    with start_run(settings, tmp_path / "alone") as run:
        list(run.reports())
    shared, alone = kill_resume.read_log(tmp_path / "shared"), kill_resume.read_log(tmp_path / "alone")
    assert len(shared) == len(alone) == FEW_STEPS + 1
    for line, wanted in zip(shared, alone, strict=True):
        name = "loss" if line["kind"] == "step" else "val_loss"
        np.testing.assert_allclose(line[name], wanted[name], rtol=2e-5)


@real
def test_real_ranks_stop_together_and_go_on_bit_for_bit(
    undisturbed: tuple[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    (text, calm), folder = undisturbed, tmp_path / "stopped"
    process = start(begin(text, folder))
    wait_for_step(folder, 7, process)
    process.send_signal(signal.SIGINT)
    said = last_words(process)
    assert process.returncode == 130, said
    assert said.count("stopped at step") == 1
    assert f"go on with: mpiexec -n 2 looplm train --resume {folder}" in said
    assert 7 <= kill_resume.last_step(folder) < STEPS
    subprocess.run(mpi("--resume", folder), check=True, timeout=120)
    assert kill_resume.differences(calm, folder) == []


@real
def test_the_death_of_a_real_rank_ends_all_and_leaves_the_checkpoint(
    undisturbed: tuple[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    (text, calm), folder = undisturbed, tmp_path / "killed"
    process = start(begin(text, folder))
    wait_for_step(folder, 12, process)
    os.kill(process_of_rank_1(process.pid), signal.SIGKILL)
    said = last_words(process)
    assert process.returncode not in (0, 130), said
    assert kill_resume.last_step(folder) < STEPS
    subprocess.run(mpi("--resume", folder), check=True, timeout=120)
    assert kill_resume.differences(calm, folder) == []


def process_of_rank_1(launcher: int) -> int:
    """A process below a launcher, by what the launcher told it."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    below = {launcher}
    for _ in range(3):  # launcher, its proxy, ranks
        below |= {pid for pid, parent in pairs if parent in below}
    told = {pid: pathlib.Path(f"/proc/{pid}/environ").read_bytes() for pid in below}
    return next(pid for pid, lines in told.items() if re.search(rb"_RANK=1\0", lines))


@real
def test_real_ranks_tell_an_error_once(tmp_path: pathlib.Path) -> None:
    found = subprocess.run(
        mpi(tmp_path / "nothing.txt", "--out-dir", tmp_path / "run"), capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 1
    assert found.stderr.count("error: ") == found.stderr.count("does not exist") == 1
    assert "hint: " in found.stderr


@real
def test_an_error_of_one_real_rank_ends_all(undisturbed: tuple[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """Rank 0 cannot write its log, which the other does not notice."""
    folder = shutil.copytree(undisturbed[1], tmp_path / "run")
    (folder / "state.safetensors").unlink()  # all steps again
    (folder / "log.jsonl").unlink()
    (folder / "log.jsonl").symlink_to(tmp_path / "nowhere" / "log.jsonl")
    found = subprocess.run(mpi("--resume", folder), capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert found.stderr.count("error: ") == found.stderr.count("hint: ") == 1
    assert "log.jsonl" in found.stderr
