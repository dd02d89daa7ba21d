"""`looplm train` and `looplm quickstart` as a user meets them: what they take, print and leave."""

import io
import json
import os
import pathlib
import shlex
import signal
import sys
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.kill_resume import read_log
from in_process import looplm, report_of
from looplm import settings
from looplm.checkpoint import load_model
from looplm.run_folder import RunFolder
from looplm.training import StepReport
from looplm_cli import app
from looplm_cli.commands.train import step_line
from looplm_cli.interrupts import interruptible
from tiny_training import ARGUMENTS, SIZES, STEPS

TRAIN = ("train", *ARGUMENTS, "--steps", 3, "--out-dir", "run")


@pytest.fixture(autouse=True)
def place(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty folder to work in."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


# ---- what training prints and leaves


def test_the_last_line_of_json_has_every_promised_key(story: str) -> None:
    out, err = looplm(*TRAIN, story, "--json")
    report = json.loads(out.splitlines()[-1])
    assert out.count("\n") == 1
    for key in ("val_loss", "val_bits_per_byte", "exit_prob", "hazard"):
        assert len(report[key]) == 4, key
        assert all(isinstance(value, float) for value in report[key])
    assert sum(report["exit_prob"]) == pytest.approx(1.0, abs=1e-5)
    # every byte is a token, but the first of the held-out text has nothing to be predicted from
    assert report["val_bits_per_byte"] == pytest.approx(np.array(report["val_loss"]) / np.log(2), rel=0.01)
    assert (report["steps"], report["tokens"], report["run_dir"]) == (3, 3 * 64, "run")
    assert report["tokens"] / report["tokens_per_s"] == pytest.approx(report["seconds"], abs=1e-3)
    last = read_log(pathlib.Path("run"))[-1]
    assert last["final"]
    assert report["val_loss"] == last["val_loss"]
    for text in (
        "training into run",
        "step 3/3  loss by loop",
        "mean ",
        "tokens/s",
        "min left",
        "bits/byte",
        "saved in",
    ):
        assert text in err


def test_time_left_does_not_count_the_first_step_which_compiles() -> None:
    def report(step: int, seconds: float) -> StepReport:
        return StepReport(step, 101, 1.0, [1.0], [1.0], 0.0, 1.0, 1e-3, 1000 * step, seconds, 40.0)

    began = report(1, 25.0)
    assert step_line(began, began).endswith("mean 1.00  40 tokens/s")
    assert step_line(report(51, 175.0), began).endswith("mean 1.00  333 tokens/s  2.5 min left")  # 3 s a step


def test_quiet_is_quiet(story: str) -> None:
    assert looplm(*TRAIN, story, "--quiet") == ("", "")


def test_the_folder_is_a_model_that_other_commands_open(story: str) -> None:
    looplm(*TRAIN, story, "--quiet")
    model = load_model("run/model")
    assert model.config.hidden_size == SIZES["hidden_size"]
    assert model.provenance["corpus"][0]["source"] == story
    assert report_of("eval", "--model", "run", "--quiet")["trained_loops"] == 4


def test_without_a_name_a_run_gets_one_under_runs(story: str) -> None:
    for _ in range(2):
        looplm(*TRAIN[:-2], story, "--quiet")
    names = [path.name for path in pathlib.Path("runs").iterdir()]
    assert len(names) == 2
    assert all(name.startswith("nano-story-") for name in names)


def test_text_comes_from_stdin(story: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = pathlib.Path(story).read_bytes()
    looplm(*TRAIN, story, "--quiet")
    stdin(monkeypatch, text)
    looplm(*TRAIN[:-2], "-", "--quiet")
    (other,) = pathlib.Path("runs").glob("nano-stdin-*")
    assert read_log(other) == read_log(pathlib.Path("run"))


def test_text_in_another_encoding(story: str) -> None:
    text = pathlib.Path(story).read_text(encoding="utf-8").replace("o", "ö")
    pathlib.Path("latin.txt").write_bytes(text.encode("latin-1"))
    pathlib.Path("utf8.txt").write_text(text, encoding="utf-8")
    pathlib.Path("latin.yaml").write_text("data: {encoding: latin-1}")
    looplm(*TRAIN, "utf8.txt", "--quiet")
    looplm(*TRAIN[:-1], "flag", "latin.txt", "--encoding", "latin-1", "--quiet")
    looplm(*TRAIN[:-1], "file", "latin.txt", "--config", "latin.yaml", "--quiet")
    assert read_log(pathlib.Path("flag")) == read_log(pathlib.Path("file")) == read_log(pathlib.Path("run"))
    looplm(*TRAIN[:-1], "replaced", "latin.txt", "--errors", "replace", "--quiet")


def test_a_task_reports_accuracy_by_hop_and_loop() -> None:
    out, err = looplm(*TRAIN, "builtin:hops", "--loops", 2, "--set", "train.seq_len=24", "--json")
    report = json.loads(out.splitlines()[-1])
    accuracy = np.array(report["accuracy_by_hop_and_loop"])
    assert accuracy.shape == (3, 2)
    assert ((accuracy >= 0.0) & (accuracy <= 1.0)).all()
    assert report["val_bits_per_byte"] is None
    assert "Accuracy by number of hops and loop" in " ".join(out.split())
    assert "accuracy 0." in err


def test_a_finished_run_can_be_resumed_and_says_the_same(story: str) -> None:
    first = report_of(*TRAIN, story, "--quiet")
    _, said = looplm("train", "--resume", "run")
    assert said.startswith("resuming at step 3 into run")
    again = report_of("train", "--resume", "run", "--quiet")
    assert again == first


# ---- settings on the command line


def shown(*arguments: object) -> dict[str, Any]:
    out, err = looplm("train", *arguments, "--show-config")
    assert err == ""
    assert list(pathlib.Path().glob("runs*")) == []
    return yaml.safe_load(out)


def test_show_config_prints_what_config_reads_back() -> None:
    given = ["--preset", "tiny", "a.txt", "ö.txt", "--loops", 3, "--prior", "1,2,3", "--init", "ouro", "--minutes", 2]
    out, _ = looplm("train", *given, "--set", "train.learning_rate=3e-4", "--show-config")
    pathlib.Path("all.yaml").write_text(out, encoding="utf-8")
    again, _ = looplm("train", "--config", "all.yaml", "--show-config")
    assert again == out
    values = yaml.safe_load(out)
    assert values["preset"] == "tiny"
    assert values["data"]["corpus"] == ["a.txt", "ö.txt"]
    assert values["train"]["learning_rate"] == 3e-4
    assert (values["train"]["prior"], values["train"]["minutes"]) == ("1,2,3", 2.0)
    assert (values["model"]["total_ut_steps"], values["init"]["post_norm"]) == (3, 1.0)


def test_a_flag_wins_over_set_over_file_over_task_over_preset() -> None:
    pathlib.Path("some.yaml").write_text("preset: tiny\ntrain: {steps: 11, seed: 5, batch_size: 3, prior: '1,1'}\n")
    found = shown(
        "builtin:hops", "--config", "some.yaml", "--set", "train.steps=22", "--set", "train.seed=6", "--seed", 7
    )
    train = found["train"]
    assert (train["seed"], train["steps"], train["batch_size"]) == (7, 22, 3)
    assert (train["beta2"], train["learning_rate"]) == (0.98, 3e-3)  # the task's
    assert (found["preset"], found["model"]["num_hidden_layers"]) == ("tiny", 4)
    assert shown("--config", "some.yaml", "--preset", "nano")["model"]["num_hidden_layers"] == 2
    assert shown("--config", "some.yaml")["train"]["learning_rate"] == 4e-3


def test_a_task_is_known_by_name_wherever_the_corpus_is_given() -> None:
    pathlib.Path("task.yaml").write_text("data: {corpus: builtin:hops}")
    for given in (["builtin:hops"], ["--config", "task.yaml"], ["--set", "data.corpus=builtin:hops"]):
        assert shown(*given)["train"]["beta2"] == 0.98, given


def test_every_training_flag_reaches_its_setting() -> None:
    flags = {
        ("--steps", 7): ("train", "steps", 7),
        ("--minutes", 0.5): ("train", "minutes", 0.5),
        ("--seed", 9): ("train", "seed", 9),
        ("--loops", 6): ("model", "total_ut_steps", 6),
        ("--prior", "geometric:0.2"): ("train", "prior", "geometric:0.2"),
        ("--entropy-weight", 0.1): ("train", "entropy_weight", 0.1),
        ("--tokenizer", "bytes"): ("data", "tokenizer", "bytes"),
        ("--val-fraction", 0.2): ("data", "val_fraction", 0.2),
        ("--init", "ouro"): ("init", "scheme", "ouro"),
        ("--encoding", "latin-1"): ("data", "encoding", "latin-1"),
        ("--errors", "ignore"): ("data", "errors", "ignore"),
        ("--threads", 1): ("train", "threads", 1),
    }
    plain, found = shown(), shown(*(word for flag in flags for word in flag))
    for section, key, value in flags.values():
        assert found[section][key] == value
        assert plain[section].get(key) != value


# ---- interrupts


@pytest.mark.parametrize(
    ("given", "precision"),
    [([], "fp32"), (["--kernels", "pairs"], "auto"), (["--kernels", "pairs", "--precision", "bf16"], "bf16")],
)
def test_a_path_asked_for_may_have_another_precision_than_the_preset(given: list[str], precision: str) -> None:
    out, _ = looplm("train", "--preset", "nano", *given, "--show-config")
    assert yaml.safe_load(out)["train"]["precision"] == precision


def test_a_signal_is_a_request_and_the_second_an_order() -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGINT):
        with interruptible() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_interrupt_saves_at_the_next_step(story: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from looplm.training import Trainer

    right = Trainer.step

    def step(self: Trainer) -> Any:
        if self.progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return right(self)

    monkeypatch.setattr(Trainer, "step", step)
    out, err = looplm(*TRAIN, story, "--quiet", "--json", code=130)
    assert (out, err) == ("", "stopped at step 2; go on with: looplm train --resume run\n")
    assert RunFolder.open("run").load_state()[3]["step"] == 2
    monkeypatch.setattr(Trainer, "step", right)
    assert report_of("train", "--resume", "run", "--quiet")["steps"] == 3


# ---- quickstart


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.PRESETS, "nano", {"model": SIZES, "train": {**STEPS, "seq_len": 64}})


@pytest.mark.usefixtures("tiny_preset")
def test_quickstart_does_everything_and_shows_the_single_commands() -> None:
    out, err = looplm("quickstart", "--minutes", "0.05", "--out-dir", "quick", "--threads", 1)
    commands = [shlex.split(line)[2:] for line in out.splitlines() if line.startswith("$ looplm ")]
    assert [command[0] for command in commands] == ["train", "calibrate", "generate", "inspect"]
    for name, *arguments in commands:
        app.load(name).make_context(name, arguments)  # each is a command line that is understood
    assert commands[0][1:] == ["--minutes", "0.05", "--out-dir", "quick"]
    assert "exit distribution, new gate" in out
    assert "The with statement" in out
    assert "What to try next" in out
    assert "saved in quick" in err
    assert read_log(pathlib.Path("quick"))[-1]["final"]
    for line in out[out.index("What to try next") :].splitlines()[1:]:
        name, *arguments = shlex.split(line.split("   ")[0])[1:]
        app.load(name).make_context(name, arguments)
