"""The command table of `looplm`, and the only place that turns errors into exit codes.

A command's module is imported when it is called, and imports the engine inside its function, so that `looplm --help`
and shell completion answer without loading NumPy or Numba.

Exit codes: 0 done, 1 a known error or a failed verification, 2 wrong usage, 130 interrupted.  Any other exception is a
bug of ours and keeps its traceback.
"""

import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from looplm import __version__
from looplm.errors import LoopLMError
from looplm_cli.render import print_error, print_help

# What `looplm --help` lists; each line is also the first line of the command's docstring.
COMMANDS = {
    "quickstart": "The whole loop in one go: train, calibrate, generate, inspect, on built-in text.",
    "train": "Train a looped model and its exit gate on text or on a built-in task.",
    "calibrate": "Teach the gate alone when to stop looping, and keep the better gate.",
    "sweep": "Compare every exit rule on your model: loss, loops, measured time, and who wins.",
    "generate": "Continue a prompt, looping only as often as each token needs.",
    "chat": "Talk with a model whose folder has a chat template.",
    "inspect": "Look inside the loops: what each loop predicts, and where it would stop.",
    "eval": "Measure loss, bits per byte and accuracy at every depth and exit threshold.",
    "kv": "Compare what early exits leave behind: memory, loss, agreement and speed of every cache policy.",
    "quantize": "Write a model with int8 or int4 weights, and say what that costs in every loop.",
    "info": "Show what a model is made of, what this machine offers, or what a training would take.",
    "init": "Write a model with random weights, in the shape of a published one or of a folder.",
    "warmup": "Compile all kernels now, so that no later command has to.",
    "verify": "Prove the engine right: reference, mutants, fixtures.",
}

CONTEXT = {"help_option_names": ["-h", "--help"]}

# The parser's own complaint (unknown option, value out of range).  Its module moves between typer's versions, its
# exported child does not.
CommandLineError: type[Exception] = typer.BadParameter.__bases__[0]


class CommandTable(TyperGroup):
    """The group of all commands: knows every summary, imports only the command that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command's name and summary, all that help and completion of names need."""
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command named by the first argument, loaded."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and load(name or ""), rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """As the parser's own help, which takes 100 ms more to import (it could show Markdown as well)."""
        options = [parameter.get_help_record(ctx) for parameter in self.get_params(ctx)]
        listed = {"Options": [record for record in options if record], "Commands": list(COMMANDS.items())}
        print_help(ctx.get_usage(), reflow(inspect.getdoc(looplm) or ""), listed)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; a known error becomes two lines on stderr and its exit code."""
        try:
            return super().invoke(ctx)
        except LoopLMError as error:
            if ctx.params["debug"]:
                raise
            print_error(str(error), error.hint)
            raise typer.Exit(error.exit_code) from error


def load(name: str) -> Any:
    """The command of module `looplm_cli.commands.NAME`: its function NAME."""
    module = importlib.import_module(f"looplm_cli.commands.{name}")
    single = typer.Typer(add_completion=False, context_settings=CONTEXT, rich_markup_mode="rich")
    function = getattr(module, name)
    single.command(name, help=reflow(inspect.getdoc(function) or ""))(function)
    return typer.main.get_command(single)


def reflow(docstring: str) -> str:
    """Each paragraph on one line, for the terminal to wrap where it ends; indented lines stay lines."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", docstring)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"looplm {__version__}")
        raise typer.Exit


app = typer.Typer(cls=CommandTable, context_settings=CONTEXT, rich_markup_mode="rich")


@app.callback(invoke_without_command=True)
def looplm(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="On an error, show its traceback.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Looped language models on an ordinary CPU: one small stack of layers, applied several times per token, and a gate
    that learns when to stop.

    New here? [bold]looplm quickstart[/bold] trains a model in under three minutes and shows what its loops do.

    Afterwards: [bold]looplm generate -p "The with statement" --q 0.7[/bold]
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), nl=False)
        raise typer.Exit(2)


def command() -> Any:
    """The command line as one object, as `main` and the tests call it."""
    group = typer.main.get_command(app)
    group.commands = {name: TyperCommand(name, help=summary) for name, summary in COMMANDS.items()}  # type: ignore[attr-defined]
    return group


def main(args: Sequence[str] | None = None) -> None:
    """Run `looplm` and exit."""
    code: Any = 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without some character gets "?" instead of a traceback
    try:
        code = command()(args=args, prog_name="looplm", standalone_mode=False)
        sys.stdout.flush()  # here, not at shutdown, a closed pipe can still be met quietly
    except CommandLineError as error:
        print_error(_complaint(error), _usage_hint(sys.argv[1:] if args is None else args))
        code = 2
    except typer.Abort:
        code = 130  # end of input at a question
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _complaint(error: Any) -> str:
    message = " ".join(error.format_message().split()).rstrip(".")
    return message[:1].lower() + message[1:]


def _usage_hint(args: Sequence[str]) -> str:
    name = next((f" {argument}" for argument in args if argument in COMMANDS), "")
    return f"looplm{name} --help shows what it takes"
