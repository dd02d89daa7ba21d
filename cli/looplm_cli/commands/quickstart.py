"""`looplm quickstart`: the main job in one command, each part shown as the command that does it alone."""

import time
from pathlib import Path
from typing import Annotated

import typer

from looplm_cli.options import ThreadsOption, finite

PROMPT = "The with statement"


def quickstart(
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.05, callback=finite, help="Time for the training part.")
    ] = 1.0,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out-dir", "-o", show_default="a new folder under runs/", help="The run folder to write."),
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """The whole loop in one go: train, calibrate, generate, inspect, on built-in text.

    Trains a small looped model on the language reference that comes with Python, teaches its gate when to stop, lets it
    write, and looks inside the loops. Before each part it prints the command that does the same alone.
    """
    from looplm.run_folder import new_run_path
    from looplm_cli.commands.calibrate import calibrate
    from looplm_cli.commands.generate import generate
    from looplm_cli.commands.inspect import inspect
    from looplm_cli.commands.train import train

    began = time.monotonic()
    run = out_dir or new_run_path("quickstart")
    _part("Train a model of two layers, applied four times", f"looplm train --minutes {minutes:g} --out-dir {run}")
    train(minutes=minutes, out_dir=run, threads=threads)
    _part("Teach its gate when another loop helps, and keep the better gate", f"looplm calibrate --model {run}")
    calibrate(model=run, threads=threads)
    _part(
        "Write, each token looping only as long as it needs",
        f'looplm generate --model {run} --prompt "{PROMPT}" --q 0.7 --max-new-tokens 100 --seed 1',
    )
    generate(model=run, prompt=PROMPT, q=0.7, max_new_tokens=100, seed=1)
    _part("Look inside the loops", f'looplm inspect --model {run} --prompt "{PROMPT} is used to" --q 0.7')
    inspect(model=run, prompt=f"{PROMPT} is used to", q=0.7)
    _next(run, time.monotonic() - began)


def _part(title: str, command: str) -> None:
    from rich.text import Text

    from looplm_cli.render import stdout

    stdout().print(Text.assemble(("\n" + title, "bold"), f"\n$ {command}\n"), soft_wrap=True)


def _next(run: Path, seconds: float) -> None:
    from rich.text import Text

    from looplm_cli.render import stdout

    lines = f"""
Done in {seconds:.0f} seconds. What to try next:
  looplm inspect -m {run} --html page.html       the same on one page, with a slider for q
  looplm eval -m {run} --max-loops 8             what each loop is worth, and what more loops than trained do
  looplm train YOUR_TEXT.txt --preset tiny --minutes 10
  looplm train builtin:hops                      the task on which every further loop solves harder questions
  looplm verify                                  the engine proves itself against reference and fixtures"""
    stdout().print(Text(lines), soft_wrap=True)
