"""Real training processes: killed, interrupted, or met by another one."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from benchmarks import kill_resume
from looplm.run_folder import RunFolder
from looplm.training_run import start_run
from tiny_training import settings


@dataclasses.dataclass(frozen=True)
class Processes:
    arguments: list[str]
    calm: pathlib.Path
    seconds: float  # that its steps took


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Processes:
    place = tmp_path_factory.mktemp("processes")
    text, calm = place / "text.txt", place / "calm"
    text.write_text("".join(f"{n} squared is {n * n}, and cubed {n**3}.\n" for n in range(150)), encoding="utf-8")
    arguments = [str(text), *kill_resume.SMALL, "--steps", "160"]
    kill_resume.train(calm, arguments)
    lines = [json.loads(line) for line in (calm / "log.jsonl").read_text().splitlines()]
    return Processes(arguments, calm, max(line.get("seconds", 0.0) for line in lines))


def test_training_survives_being_killed_at_random_moments(processes: Processes, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "killed"
    kills = list(kill_resume.kill_at_random(folder, processes.arguments, 4, processes.seconds / 5, seed=1))
    assert len(kills) == 4
    assert any(kill.died for kill in kills)
    kill_resume.train(folder, processes.arguments)
    assert kill_resume.differences(processes.calm, folder) == []
    assert kill_resume.last_step(folder) == 160


def test_ctrl_c_and_sigterm_save_end_with_130_and_can_be_resumed(processes: Processes, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "stopped"
    for number in (signal.SIGTERM, signal.SIGINT):
        before = kill_resume.last_step(folder)
        process = subprocess.Popen(kill_resume.command(folder, processes.arguments), stderr=subprocess.PIPE, text=True)
        wait_for(lambda before=before: kill_resume.last_step(folder) > before, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        step = RunFolder.open(folder).load_state()[3]["step"]
        assert said.strip() == f"stopped at step {step}; go on with: looplm train --resume {folder}"
        assert json.loads((folder / "model" / "looplm.json").read_text())["steps"] == step
        assert kill_resume.last_step(folder) == step > before
    kill_resume.train(folder, processes.arguments)
    assert kill_resume.differences(processes.calm, folder) == []


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_second_process_is_refused_while_one_trains(story: str, tmp_path: pathlib.Path) -> None:
    with start_run(settings(story, steps=17, checkpoint_every=4), tmp_path / "run") as run:
        for _ in zip(range(7), run.reports(), strict=False):
            pass
        before = contents(run.folder.path)
        found = subprocess.run(
            [sys.executable, "-m", "looplm_cli", "train", "--resume", str(run.folder.path)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert found.returncode == 1
        first, second = found.stderr.splitlines()
        assert first == f"error: another training is writing to {run.folder.path} (process {os.getpid()})"
        assert second.startswith("hint: ")
        assert contents(run.folder.path) == before  # its log too, which a resumed run cuts


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
