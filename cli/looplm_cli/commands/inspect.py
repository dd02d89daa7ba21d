"""`looplm inspect`: what each loop predicts at each position, and where the exit rule would stop."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from looplm_cli.options import (
    OUTPUT,
    ExitOption,
    JsonOption,
    LoopsOption,
    MinLoopsOption,
    ModelOption,
    PromptOption,
    QOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from looplm.arrays import Ints
    from looplm_cli.inputs import Opened

SAMPLE_TOKENS = 24  # shown when no prompt is given


def inspect(
    model: ModelOption = None,
    prompt: PromptOption = None,
    q: QOption = None,
    exit: ExitOption = None,
    min_loops: MinLoopsOption = 1,
    loops: LoopsOption = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Best predictions kept per cell.")] = 5,
    html: Annotated[
        Path | None,
        typer.Option("--html", show_default=False, help="Write one self-contained page.", rich_help_panel=OUTPUT),
    ] = None,
    npz: Annotated[
        Path | None,
        typer.Option(
            "--npz",
            show_default=False,
            help="Write the raw arrays, named as `looplm verify` expects them in expected.npz.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: JsonOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Look inside the loops: what each loop predicts, and where it would stop.

    One line per token, one cell per loop: the best prediction, the probability of the true next token (number and
    colour), and a mark where the exit rule stops (--q 0.7 unless --q or --exit says otherwise). Below: per loop the
    mean loss, gate, exit probability, how much of the state changed, and how far the prediction is from the last
    loop's. On a model of a task such as hops the task's targets take the place of the next token.

    Without a prompt it shows the beginning of the run's held-out text, or a sequence of the task.

    [bold]looplm inspect -p "The with statement" --q 0.5 --html page.html[/bold] writes a page on which q is a slider.
    """
    from looplm import analysis
    from looplm.atomic import replace_files
    from looplm.exits import LearnedGate
    from looplm_cli.heatmap import print_inspection
    from looplm_cli.inputs import (
        check_file,
        check_loops,
        encode_prompt,
        exit_rule,
        open_stored,
        read_prompt,
        thread_count,
    )
    from looplm_cli.render import print_json, say
    from looplm_cli.report import inspection_report

    check_file("--html", html)
    check_file("--npz", npz)
    opened = open_stored(model, None)
    depth = check_loops(opened, loops)
    asked = q is not None or exit is not None
    rule = exit_rule(opened, q if asked else 0.7, exit, loops=None, min_loops=min_loops, depth=depth)
    input_ids = _sample(opened) if prompt is None else encode_prompt(opened, read_prompt(prompt))
    found = analysis.inspect(
        opened.weights,
        input_ids,
        _targets(opened, input_ids),
        rule=rule or LearnedGate(0.7),
        top_k=top_k,
        loops=depth,
        threads=thread_count(threads),
    )
    report = inspection_report(opened, found)
    if not json:
        print_inspection(report)
    if html is not None:
        from looplm_cli import page

        replace_files({html: page.build(report).encode()})
        say(f"page written: {html}")
    if npz is not None:
        replace_files({npz: _npz(analysis.fixture_arrays(found))})
        say(f"arrays written: {npz}")
    if json:
        print_json(report)


def _sample(model: "Opened") -> "Ints":
    """A short text or sequence that the model was not trained on.  -> input_ids: BS with one row"""
    import numpy as np

    from looplm.errors import UsageError

    if model.task == "hops":
        from looplm.tasks import hops

        return hops.sample(np.random.default_rng(0), 1, 1 + SAMPLE_TOKENS, **model.hops_alphabet())[0]
    held_out = None if model.run is None else model.run / "data" / "val.npy"
    if held_out is None or not held_out.exists():
        raise UsageError(f"{model.folder} has no held-out text beside it to show", "give a text with -p")
    from looplm.data import load_tokens

    return load_tokens(held_out)[:SAMPLE_TOKENS].astype(np.int64)[None]


def _targets(model: "Opened", input_ids: "Ints") -> "Ints | None":
    if model.task != "hops":
        return None
    from looplm.tasks import hops

    return hops.targets(input_ids, **model.hops_alphabet())


def _npz(arrays: dict[str, "Ints"]) -> bytes:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # names such as exit_logits@0.7 are no keywords, but work
    return buffer.getvalue()
