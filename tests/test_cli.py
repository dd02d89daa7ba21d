"""The door: what is loaded when, how errors leave, and what the terminal is told."""

import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer
from rich.console import Console

from looplm import errors
from looplm_cli import app, options, render

HEAVY = {"numpy", "numba", "llvmlite", "tokenizers", "safetensors", "yaml", "jinja2"}
COMMAND = [sys.executable, "-m", "looplm_cli"]


def run(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, **more)


def main(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        app.main(arguments)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.fixture
def inspect_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Put another function in the place of `looplm inspect`."""

    def put(function: Callable[..., None]) -> None:
        single = typer.Typer(add_completion=False)
        single.command("inspect")(function)
        monkeypatch.setattr(app, "load", lambda name: typer.main.get_command(single))

    return put


@pytest.fixture(autouse=True)
def fresh_consoles() -> Any:
    """Consoles remember the stream they were made for."""
    yield
    render.stdout.cache_clear()
    render.stderr.cache_clear()


# ---- start


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = run("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert found.returncode == 0
    assert min(spent) < 0.3
    loaded = run("--help", env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}).stderr
    modules = {line.split("|")[2].strip().split(".")[0] for line in loaded.splitlines() if line.count("|") == 2}
    assert "typer" in modules
    assert modules & HEAVY == set()


def test_every_command_shows_its_help_without_the_engine() -> None:
    program = (
        "import sys\n"
        "from looplm_cli import app\n"
        "for name in app.COMMANDS:\n"
        "    app.load(name).get_help(app.load(name).make_context(name, [], resilient_parsing=True))\n"
        f"print(sorted({HEAVY} & sys.modules.keys()))\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.stderr == ""
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", app.COMMANDS)
def test_a_commands_summary_is_the_first_line_of_its_docstring(name: str) -> None:
    assert app.load(name).help.splitlines()[0] == app.COMMANDS[name]
    assert app.load(name).name == name


def test_help_wraps_paragraphs_where_the_terminal_ends() -> None:
    assert app.reflow("One\ntwo.\n\nThree\nfour:\n    indented\n    lines") == (
        "One two.\n\nThree four:\n    indented\n    lines"
    )


def test_help_lists_every_command_under_both_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    for spelling in ("-h", "--help"):
        assert main(spelling) == 0
        shown = capsys.readouterr().out
        assert all(f" {name} " in shown for name in app.COMMANDS)
    assert main() == 2
    assert "Usage: looplm" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from looplm import __version__

    assert main("--version") == 0
    assert capsys.readouterr().out == f"looplm {__version__}\n"


# ---- how it ends


@pytest.mark.parametrize("kind", errors.LoopLMError.__subclasses__())
def test_a_known_error_is_two_lines_and_its_code(
    kind: type[errors.LoopLMError], inspect_is: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise kind("x=3 is\n odd " + "and the sentence long " * 9, "use 4")

    inspect_is(fail)
    assert main("inspect") == (2 if kind is errors.UsageError else 1)
    shown = capsys.readouterr()
    assert shown.out == ""
    first, second = shown.err.splitlines()
    assert first.startswith("error: x=3 is odd and")
    assert second == "hint: use 4"
    with pytest.raises(kind):
        app.main(["--debug", "inspect"])


def test_our_own_bugs_keep_their_traceback(inspect_is: Any) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    inspect_is(fail)
    with pytest.raises(ZeroDivisionError):
        app.main(["inspect"])


def test_an_interrupt_is_130_and_quiet(inspect_is: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    inspect_is(fail)
    assert main("inspect") == 130
    assert capsys.readouterr() == ("", "")


def test_a_command_may_choose_its_code(inspect_is: Any) -> None:
    def fail() -> None:
        raise typer.Exit(1)

    inspect_is(fail)
    assert main("inspect") == 1


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run([*COMMAND, "--version"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert found.stderr == ""
    assert found.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspekt"], "no such command 'inspekt'. Did you mean 'inspect'?"),
        (["inspect", "--nonsense"], "no such option: --nonsense"),
        (["inspect", "--loops", "two"], "'two' is not a valid int"),
        (["inspect", "--loops", "0"], "0 is not in the range x>=1"),
        (["inspect", "--q", "-0.5"], "-0.5 is not in the range 0.0<=x<=1.0"),
        (["inspect", "--q", "nan"], "nan is not a finite number"),
        (["inspect", "--threads", "0"], "0 is not in the range x>=1"),
        (["inspect", "-m"], "option '-m' requires an argument"),
        (["--nonsense"], "no such option: --nonsense"),
    ],
)
def test_wrong_usage_is_two_lines_and_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*arguments) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert said in first
    assert second == f"hint: looplm{' inspect' if arguments[0] == 'inspect' else ''} --help shows what it takes"


def test_a_terminal_without_unicode_gets_question_marks() -> None:
    program = "from looplm_cli import app, render; app.load = lambda name: render.say('◆·λ'); app.main(['inspect'])"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert found.stderr.startswith("???\n")


# ---- options and inputs


def test_thresholds_come_one_by_one_or_with_commas() -> None:
    assert options.parse_thresholds(["0.5,0.9", "1", "0.5"]) == [0.5, 0.9, 1.0]
    for wrong in ("1.01", "-0.1", "nan", "inf", "", "0.5,", "half"):
        with pytest.raises(typer.BadParameter):
            options.parse_thresholds([wrong])


def test_prompts_come_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    from looplm_cli.inputs import read_prompt

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("für\n\n".encode())))
    assert read_prompt("-") == "für\n"
    assert read_prompt("- ") == "- "
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    with pytest.raises(errors.DataError, match="byte 0xff at offset 2"):
        read_prompt("-")


# ---- what the terminal is told


def test_json_is_one_line_and_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_json({"text": "é\n", "x": render.finite(float("nan")), "y": render.finite(0.1)})
    written = capsys.readouterr().out
    assert written.count("\n") == 1
    assert json.loads(written) == {"text": "é\n", "x": None, "y": 0.1}
    with pytest.raises(ValueError, match="JSON"):
        render.print_json({"x": float("nan")})


def test_a_sparkline_shows_the_shape() -> None:
    assert render.sparkline([0.0, 0.5, 1.0, 0.25]) == "▁▅█▃"
    assert render.sparkline([0.0, 0.0]) == "▁▁"
    assert render.sparkline([float("nan"), 1.0]) == "?█"
    assert render.exit_histogram([0.25, 0.75]) == "▃█  1: 25 %  2: 75 %"


def test_progress_on_a_pipe_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with render.Progress(3, "step", every=0.0) as progress:
        for done in (1, 2, 3):
            progress.update(done, f"loss {done}")
        progress.note("kept")
    assert capsys.readouterr() == ("", "step 1/3  loss 1\nstep 2/3  loss 2\nstep 3/3  loss 3\nkept\n")
    with render.Progress(3, "step", every=1e9) as progress:
        for done in (1, 2, 3):
            progress.update(done)
    assert capsys.readouterr().err == "step 1/3\nstep 3/3\n", "the first and the last, and none in between"
    with render.Progress(3, "step", quiet=True) as progress:
        progress.update(1)
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(render, "stderr", lambda: console)
    with render.Progress(3, "step") as progress:
        progress.update(2, "loss [b]2")
        progress.note("kept")
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[" in written
    assert "step 2/3" in written
    assert "loss [b]2" in written
    assert "kept\n" in written


def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for no_color, escapes in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        console = Console(file=io.StringIO(), highlight=False)
        monkeypatch.setattr(render, "stderr", lambda console=console: console)
        render.print_error("x", "y")
        assert ("\x1b[1;31m" in console.file.getvalue()) == escapes  # type: ignore[attr-defined]
