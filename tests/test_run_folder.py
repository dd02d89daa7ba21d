"""Run folders: one training at a time, a state that is whole, a log that a kill cannot spoil."""

import errno
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from looplm.arrays import Floats
from looplm.errors import CheckpointError
from looplm.run_folder import RunFolder, new_run_path
from looplm.safetensors_file import write_tensors


@pytest.fixture
def run(tmp_path: pathlib.Path) -> RunFolder:
    made = RunFolder.create(tmp_path / "runs" / "one")
    made.config.write_text("preset: nano\n")
    return made


def buffers(seed: int = 0) -> tuple[Floats, Floats, Floats]:
    weights, first, second = np.random.default_rng(seed).standard_normal((3, 37), np.float32)
    return weights, first, second


# ---- creating and opening


def test_a_new_run_is_made_with_its_parents_and_an_old_one_is_protected(run: RunFolder) -> None:
    assert run.data.is_dir()
    with pytest.raises(CheckpointError, match="already holds a run") as caught:
        RunFolder.create(run.path)
    assert f"--resume {run.path}" in caught.value.hint
    assert RunFolder.open(run.path).path == run.path


def test_an_empty_folder_or_a_run_killed_before_it_began_can_be_used(tmp_path: pathlib.Path) -> None:
    for name in ("data", ".lock", "config.yaml.unfinished"):
        RunFolder.create(tmp_path)
        (tmp_path / name).mkdir(exist_ok=True)
    assert RunFolder.create(tmp_path).data.is_dir()


def test_a_place_that_is_not_for_a_run_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "letter.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"is not empty: it holds letter\.txt"):
        RunFolder.create(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        RunFolder.create(tmp_path / "letter.txt")
    with pytest.raises(CheckpointError, match=r"cannot write .*: Not a directory|cannot write .*: File exists"):
        RunFolder.create(tmp_path / "letter.txt" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]

    def forbidden(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "mkdir", forbidden)
    with pytest.raises(CheckpointError, match=r"cannot write .*new/data: Permission denied") as caught:
        RunFolder.create(tmp_path / "new")
    assert "choose a folder you may write to" in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission_is_refused(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        RunFolder.create(tmp_path / "run")
    tmp_path.chmod(0o700)


def test_what_is_no_run_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="there is no run in"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"is not a run folder: it has no config\.yaml"):
        RunFolder.open(tmp_path)


def test_new_runs_get_different_names(tmp_path: pathlib.Path) -> None:
    paths = []
    for _ in range(3):
        paths.append(new_run_path("nano-book", tmp_path))
        paths[-1].mkdir()
    assert len(set(paths)) == 3
    assert all(path.parent == tmp_path and path.name.startswith("nano-book-") for path in paths)


# ---- one training at a time

HOLDER = """
import sys, time
from looplm.run_folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_training_is_kept_out_until_the_first_is_gone(run: RunFolder) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        for _ in range(2):  # and being refused does not disturb the holder
            with pytest.raises(CheckpointError, match=rf"another training .*\(process {first.pid}\)"), run.lock():
                pytest.fail("the folder was entered twice")
        first.send_signal(signal.SIGKILL)
    with run.lock():
        assert (run.path / ".lock").read_text() == str(os.getpid())
    with run.lock():
        pass


def test_a_lock_that_cannot_be_written_is_an_error(run: RunFolder) -> None:
    (run.path / ".lock").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*lock"), run.lock():
        pass


# ---- state


def test_a_state_comes_back_bit_for_bit(run: RunFolder) -> None:
    meta = {"step": 12, "seconds": 0.1 + 0.2, "nested": {"list": [1e-300, 3.5]}, "text": "ä"}
    stored = buffers()
    stored[0][:2] = np.nan, -0.0
    run.save_state(*stored, meta)
    *loaded, found = run.load_state()
    assert found == meta
    for before, after in zip(stored, loaded, strict=True):
        np.testing.assert_array_equal(after.view(np.uint32), before.view(np.uint32))
        assert after.flags.writeable
        assert after.ctypes.data % 64 == 0
    loaded[0][:] = 0.0
    assert run.load_state()[0].any()  # what was handed out is not the file


def test_a_state_that_cannot_be_written_leaves_the_old(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save_state(*buffers(), {"step": 1})
    before = run.state.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"state\.safetensors: No space left on device"):
        run.save_state(*buffers(1), {"step": 2})
    assert run.state.read_bytes() == before
    assert not run.state.with_name("state.safetensors.unfinished").exists()


def test_a_run_without_a_state_says_so(run: RunFolder) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint to go on from"):
        run.load_state()


STRANGE: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "a buffer is missing": ({"weights": np.zeros(3, np.float32)}, {"meta": "{}"}),
    "buffers of two sizes": (
        {n: np.zeros(i + 3, np.float32) for i, n in enumerate(("weights", "first_moment", "second_moment"))},
        {"meta": "{}"},
    ),
    "no meta": ({n: np.zeros(3, np.float32) for n in ("weights", "first_moment", "second_moment")}, {}),
    "meta that is no JSON": (
        {n: np.zeros(3, np.float32) for n in ("weights", "first_moment", "second_moment")},
        {"meta": "{"},
    ),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_file_that_is_no_state_is_refused(case: str, run: RunFolder) -> None:
    write_tensors(run.state, *STRANGE[case])
    with pytest.raises(CheckpointError, match="is not the state of a training"):
        run.load_state()


def test_a_cut_state_is_refused(run: RunFolder) -> None:
    run.save_state(*buffers(), {"step": 1})
    run.state.write_bytes(run.state.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="ends inside tensor second_moment"):
        run.load_state()


# ---- log


def test_the_log_is_one_json_object_per_line(run: RunFolder) -> None:
    lines = [{"step": n, "loss": [0.1 * n, math.pi], "mean": np.float64(n) / 3} for n in range(3)]
    for line in lines:
        run.append_log(line)
    assert [json.loads(text) for text in run.log.read_text().splitlines()] == lines
    assert run.read_log() == lines
    run.append_log({"loss": math.nan, "all": [math.inf, {"x": -math.inf}]})
    assert json.loads(run.log.read_text().splitlines()[-1]) == {"loss": None, "all": [None, {"x": None}]}


def test_truncating_drops_later_steps_and_torn_lines_and_nothing_else(run: RunFolder) -> None:
    run.truncate_log(5)  # a run killed before it logged anything
    assert not run.log.exists()
    run.append_log({"kind": "start"})
    for step in range(1, 7):
        run.append_log({"step": step, "loss": 1 / step})
    whole = run.log.read_text().splitlines(keepends=True)
    with run.log.open("a") as file:
        file.write('{"step": 7, "lo')
    run.truncate_log(6)
    assert run.log.read_text() == "".join(whole)
    run.truncate_log(4)
    assert run.log.read_text() == "".join(whole[:5])
    run.append_log({"step": 5})
    assert [line.get("step") for line in run.read_log()] == [None, 1, 2, 3, 4, 5]


def test_a_log_line_cut_inside_a_character_is_dropped(run: RunFolder) -> None:
    run.append_log({"step": 1})
    with run.log.open("ab") as file:
        file.write('{"step": 2, "note": "ä'.encode()[:-1])
    run.truncate_log(9)
    assert run.log.read_text() == '{"step": 1}\n'


def test_a_log_that_cannot_be_written_is_an_error(run: RunFolder) -> None:
    run.log.mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*log.jsonl"):
        run.append_log({"step": 1})
    with pytest.raises(CheckpointError, match=r"cannot read .*log.jsonl"):
        run.read_log()
