"""`looplm chat`: lines in, answers out, slash commands, Ctrl-C; on a pipe, as JSON and at a terminal."""

import fcntl
import json
import os
import pathlib
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from typing import Any

import pytest

from chat_models import chat_model, template_of
from in_process import looplm
from tiny_models import hops_model, text_run

Lines = Callable[..., None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return chat_model(tmp_path_factory.mktemp("chat") / "model")


def objects(*arguments: object) -> list[dict[str, Any]]:
    out, _ = looplm("chat", *arguments, "--json", "--quiet")
    return [json.loads(line) for line in out.splitlines()]


def test_every_line_of_a_pipe_is_answered(model: pathlib.Path, lines: Lines) -> None:
    lines("Hello", "", "And you?")
    out, err = looplm("chat", "-m", model, "-n", 6, "-t", 0, width=200)
    lines("Hello", "And you?")
    first, second = objects("-m", model, "-n", 6, "-t", 0)
    assert out == "".join(f"{one['text'].removesuffix(chr(10))}\n" for one in (first, second))
    assert len(re.findall(r"^\d+ tokens in .* s", err, re.M)) == 2
    assert "> " not in out + err
    assert (first["turn"], second["turn"]) == (1, 2)
    assert (first["message"], second["message"]) == ("Hello", "And you?")
    assert first["cached_tokens"] == 0 < second["cached_tokens"] < second["prompt_tokens"]
    assert first["tokens"] == len(first["generated"]) <= 6
    assert first["think"] is None


def test_a_seed_fixes_a_conversation(model: pathlib.Path, lines: Lines) -> None:
    found = []
    for seed in (1, 1, 2):
        lines("Hello", "Hello")
        found.append([one["text"] for one in objects("-m", model, "-n", 12, "--seed", seed)])
    assert found[0] == found[1] != found[2]


def test_system_and_thinking_reach_the_template(model: pathlib.Path, lines: Lines) -> None:
    sizes = []
    for more in ([], ["--think"], ["--no-think"], ["--system", "Be brief."]):
        lines("Hello")
        (one,) = objects("-m", model, "-n", 1, *more)
        sizes.append(one["prompt_tokens"])
    plain = sizes[0]
    assert sizes[1:] == [plain + len("\n") + 1, plain, plain + len("Be brief.") - len("You are a helpful assistant.")]


def test_lines_with_a_slash_change_what_follows(model: pathlib.Path, lines: Lines) -> None:
    lines("a", "/loops 2", "b", "/loops", "/q 0.4", "c", "/system Be brief.", "/reset", "d", "//e", "/exit", "f")
    found = objects("-m", model, "-n", 5, "-t", 0)
    assert [one["message"] for one in found] == ["a", "b", "c", "d", "/e"]
    assert [one["q"] for one in found] == [None, None, 0.4, 0.4, 0.4]
    assert found[0]["mean_loops"] == 4.0
    assert found[1]["mean_loops"] == 2.0
    assert found[2]["mean_loops"] < 4.0
    begun = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n"
    assert found[3]["prompt_tokens"] == len(re.sub(r"<\|\w+\|>", "x", begun))


def test_inspect_shows_the_loop_of_every_token(model: pathlib.Path, lines: Lines) -> None:
    lines("Hello", "/inspect")
    out, _ = looplm("chat", "-m", model, "-n", 30, "--q", 0.5, "--quiet", width=30)
    lines("Hello")
    (one,) = objects("-m", model, "-n", 30, "--q", 0.5)
    shown = out.splitlines()
    assert shown[-1].startswith("read after loop ")
    numbered = [line for line in shown if re.fullmatch(r"(?:\d+ +)+", line + " ")]
    digits = [int(number) for line in numbered for number in line.split()]
    assert digits == [token["exit_loop"] for token in one["generated"]]
    assert len(set(digits)) > 1
    assert all(len(line) <= 30 for line in shown[1:-1])


def test_help_lists_every_command(model: pathlib.Path, lines: Lines) -> None:
    lines("/help")
    out, err = looplm("chat", "-m", model)
    assert out == ""
    assert [line.split()[0] for line in err.splitlines()] == [
        "/help", "/q", "/rule", "/loops", "/inspect", "/system", "/reset", "/exit", "//...",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("/q two", 2, "/q two: not a number from 0 to 1"),
        ("/q nan", 2, "/q nan: not a number from 0 to 1"),
        ("/q 1.5", 2, "/q 1.5: not a number from 0 to 1"),
        ("/rule nothing:1", 2, "nothing"),
        ("/rule kl:-1", 2, "kl:-1"),
        ("/loops 0", 2, "/loops 0: not a number of loops"),
        ("/loops x", 2, "/loops x: not a number of loops"),
        ("/inspect", 2, "there is no answer yet"),
        ("/forget", 2, "/forget is not a command"),
        ("x" * 400, 1, "the conversation has grown to "),
        ("caf\udce9", 1, "standard input is not UTF-8: byte 0xe9 at offset 3 of its line"),
    ],
)
def test_a_wrong_line_on_a_pipe_is_two_lines(
    line: str, code: int, message: str, model: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    raw = io.BytesIO(line.encode(errors="surrogateescape") + b"\nnever read\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))
    out, err = looplm("chat", "-m", model, code=code, width=300)
    error, hint = err.splitlines()
    assert out == ""
    assert message in error
    assert hint.startswith("hint: ")


def test_folders_that_cannot_chat_are_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, hops = text_run(tmp_path / "text"), hops_model(tmp_path / "hops")
    failing = chat_model(tmp_path / "failing", "{{ messages | nothing }}")
    base = chat_model(tmp_path / "base", template_of("ouro-1.4b"))
    for folder, more, code, message in (
        (text, [], 1, "has no chat template"),
        (hops, [], 1, "it is not a language model"),
        (failing, [], 1, "fails: TemplateAssertionError: No filter named 'nothing'"),
        (base, ["--think"], 2, "does not know enable_thinking"),
        (base, ["--no-think"], 2, "does not know enable_thinking"),
        (base, ["--cache", "shared"], 2, "--cache 'shared' is not known"),
        (base, ["--cache", "exact", "--max-deferred", "99"], 2, "99 tokens cannot wait for their deeper loops"),
        (base, ["--top-p", "nan"], 2, "nan is not a finite number"),
        (base, ["-n", "0"], 2, "0 is not in the range"),
    ):
        _, err = looplm("chat", "-m", folder, *more, code=code, width=300)
        error, hint = err.splitlines()
        assert message in error
        assert hint.startswith("hint: ")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _, err = looplm("chat", "-m", base, code=2, width=300)
    assert err.splitlines()[1] == "hint: pip install 'looplm-cpu[chat]'"


def test_an_interrupt_on_a_pipe_ends_it_with_what_was_written(
    model: pathlib.Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from looplm import chat
    from looplm.generation import Generated

    def interrupted(*_: object, **__: object) -> Any:
        yield Generated(70, 1, 4, -1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "continue_session", interrupted)
    lines("Hello", "never read")
    out, err = looplm("chat", "-m", model, code=130)
    assert len(out) == 2
    assert out.endswith("\n")
    assert "(interrupted)" in err


def _at_the_terminal() -> None:
    """The terminal's Ctrl-C is ours; whoever started the tests may have told us to ignore it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A program at the other end of a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.ours, theirs = pty.openpty()
        environment = os.environ | {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "looplm_cli", *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
            preexec_fn=_at_the_terminal,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def until(self, pattern: str, seconds: float = 60.0) -> str:
        """What is shown up to a pattern, from where the last one ended."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.ours], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.ours, 4096).decode(errors="replace")
                except OSError:  # the other end is closed
                    pytest.fail(f"it ended with {self.process.wait()} before {pattern!r}: {self.seen!r}")
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def end(self) -> int:
        code = self.process.wait(60)
        os.close(self.ours)
        return code


def test_at_a_terminal_an_interrupt_stops_the_answer_and_an_error_the_turn(tmp_path: pathlib.Path) -> None:
    plain = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    endless = chat_model(tmp_path / "model", plain, eos=None, context=50_000, endless=True, eos_token="gone")
    terminal = Terminal("chat", "-m", str(endless), "-n", "40000", "-t", "0")
    try:
        terminal.until(r"/help lists commands")
        terminal.until("> ")
        terminal.type("/q two\n")
        terminal.until(r"error: /q two: not a number")
        terminal.until("> ")
        terminal.type("Hello\n")
        terminal.until("Hello\r\n.{3,}")
        terminal.type("\x03")
        assert "(interrupted)" in terminal.until("read after loop")
        terminal.until("> ")
        terminal.type("/inspect\n")
        terminal.until("read after loop")
        terminal.until(r"4: \d+ %\s+> ")
        time.sleep(0.3)  # the line editor misses what comes while it is being set up
        terminal.type("\x03")
        terminal.until("Ctrl-C once more or Ctrl-D leaves")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
