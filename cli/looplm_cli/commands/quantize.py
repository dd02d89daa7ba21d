"""`looplm quantize`: a model in int8 or int4, and what that costs, loop by loop."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from looplm_cli.options import (
    OUTPUT,
    CorpusArgument,
    EncodingOption,
    ErrorsOption,
    JsonOption,
    ModelOption,
    QuietOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from looplm.comparison import Comparison
    from looplm.model_files import ModelFiles
    from looplm_cli.held_out import HeldOut
    from looplm_cli.inputs import Opened


def quantize(
    corpus: CorpusArgument = None,
    to: Annotated[str, typer.Option("--to", metavar="int8|int4", show_default=False, help="The weight format.")] = "",
    out_dir: Annotated[
        Path | None, typer.Option("--out-dir", "-o", show_default=False, help="The model folder to write; a new one.")
    ] = None,
    model: ModelOption = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report/--no-report",
            help="Measure what it costs; this needs memory for both models in float32.",
            rich_help_panel=OUTPUT,
        ),
    ] = True,
    encoding: EncodingOption = "utf-8",
    errors: ErrorsOption = "strict",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Write a model with int8 or int4 weights, and say what that costs in every loop.

    Every matrix is rounded in groups of neighbouring weights that share a scale: about a quarter (int8) or a seventh
    (int4) of the size in float32. The embedding stays bfloat16, norms and gate float32, and the head is int8 in both.

    Rounding errors go through the loops, so the report is per loop: how far states and logits are off, and the loss
    before and after, on the corpus given or on what the run held out.

    [bold]looplm quantize --to int4 --out-dir small[/bold], then [bold]looplm generate -m small -p "The"[/bold]
    """
    from looplm.checkpoint import resolve_model
    from looplm.conversion import quantize_folder
    from looplm.errors import UsageError
    from looplm.model_files import open_model
    from looplm.quantization import FORMATS
    from looplm_cli.inputs import thread_count
    from looplm_cli.render import Progress, print_json, say

    if to not in FORMATS:
        seen = f"--to {to!r} is not known" if to else "a weight format is missing"
        raise UsageError(seen, f"give one of {', '.join(f'--to {name}' for name in FORMATS)}")
    if out_dir is None:
        raise UsageError("where to write is missing", "name a new folder with --out-dir")
    if corpus and not report:
        raise UsageError("a corpus is for the report, and --no-report leaves that out", "leave one of them out")
    count = thread_count(threads)
    folder = resolve_model(None if model is None else str(model))
    files = open_model(folder)
    _refuse_early(files, out_dir)
    measured_on = _opened_with_text(folder, corpus or [], encoding, errors) if report else None
    with Progress(100, "percent", quiet) as progress:
        quantize_folder(
            files, out_dir, to, threads=count, progress=lambda done, total: progress.update(100 * done / total)
        )
    found = _sizes(files, open_model(out_dir), to)
    if measured_on is not None:
        found |= _costs(*measured_on, out_dir, count)
    if as_json:
        print_json(found)
    else:
        _print(found)
    say(f"written to {out_dir}")


def _refuse_early(files: "ModelFiles", out_dir: Path) -> None:
    """Before a model of some size is loaded for the report."""
    from looplm.conversion import check_new_folder, check_source

    check_source(files)
    check_new_folder(out_dir)


def _opened_with_text(folder: Path, corpus: list[str], encoding: str, errors: str) -> "tuple[Opened, HeldOut]":
    from looplm.errors import UsageError
    from looplm_cli.held_out import held_out
    from looplm_cli.inputs import open_model

    opened = open_model(folder)
    try:
        return opened, held_out(opened, corpus, None, 16, encoding, errors)
    except UsageError as error:
        raise UsageError(str(error), "name a text to measure on, or leave the report out with --no-report") from error


def _sizes(before: "ModelFiles", after: "ModelFiles", to: str) -> dict[str, Any]:
    def size(files: "ModelFiles") -> int:
        return sum(file.size for file in files.weight_files)

    return {
        "model": str(before.folder),
        "out_dir": str(after.folder),
        "format": to,
        "bytes_before": size(before),
        "bytes_after": size(after),
    }


def _costs(opened: "Opened", data: "HeldOut", out_dir: Path, threads: int) -> dict[str, Any]:
    from looplm.checkpoint import load_model
    from looplm.comparison import compare

    found = compare(opened.weights, load_model(out_dir).weights, data.batches, threads)
    return {"data": data.name, "tokens": found.tokens, "by_loop": _by_loop(found)}


def _by_loop(found: "Comparison") -> list[dict[str, Any]]:
    """The report's lists; loops are counted from 1."""
    from looplm_cli.render import finite

    columns = {
        "hidden_error": found.hidden_error,
        "logits_error": found.logits_error,
        "loss_before": found.loss_before,
        "loss_after": found.loss_after,
        "loss_change": found.loss_change,
        "same_best": found.same_best,
    }
    return [
        {"loop": r + 1, **{name: finite(float(values[r])) for name, values in columns.items()}}
        for r in range(len(found.loss_before))
    ]


def _print(found: dict[str, Any]) -> None:
    from looplm_cli.render import print_table, stdout

    before, after = found["bytes_before"], found["bytes_after"]
    say = stdout().print
    say(
        f"{found['model']} in {found['format']}: {after:,} bytes of weights, {after / before:.0%} of {before:,}",
        markup=False,
        soft_wrap=True,
    )
    if "by_loop" not in found:
        return

    def percent(share: float | None, digits: int = 2, sign: str = "") -> str:
        return "-" if share is None else f"{100 * share:{sign}.{digits}f} %"

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    say(f"measured on {found['data']}: {found['tokens']:,} tokens", markup=False, soft_wrap=True)
    rows = [
        [
            f"loop {at['loop']}",
            percent(at["hidden_error"]),
            percent(at["logits_error"]),
            number(at["loss_before"]),
            number(at["loss_after"]),
            percent(at["loss_change"], 3, "+"),
            percent(at["same_best"], 1),
        ]
        for at in found["by_loop"]
    ]
    columns = ["after", "states", "logits", "loss before", "loss after", "change", "same best"]
    print_table(columns, rows)
