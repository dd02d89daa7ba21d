"""`looplm eval`: loss and accuracy at every depth, and at exit thresholds with the loops they cost."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from looplm_cli.options import (
    LOOPS,
    CorpusArgument,
    EncodingOption,
    ErrorsOption,
    ExitValuesOption,
    JsonOption,
    MinLoopsOption,
    ModelOption,
    QuietOption,
    QValuesOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from looplm.analysis import AtRule, Evaluation
    from looplm.data import Batch
    from looplm_cli.held_out import HeldOut
    from looplm_cli.inputs import Opened


def eval(
    corpus: CorpusArgument = None,
    model: ModelOption = None,
    max_loops: Annotated[
        int | None,
        typer.Option(
            "--max-loops",
            min=1,
            show_default="as trained",
            help="Deepest depth to measure; more than trained is extrapolation.",
            rich_help_panel=LOOPS,
        ),
    ] = None,
    remember: Annotated[
        bool,
        typer.Option(
            "--remember",
            help="Write the loss at each depth into the model's looplm.json, for the warnings of other commands.",
            rich_help_panel=LOOPS,
        ),
    ] = False,
    q: QValuesOption = None,
    exit: ExitValuesOption = None,
    min_loops: MinLoopsOption = 1,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=2, show_default="as trained", help="Tokens of context per window.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows at a time.")] = 16,
    encoding: EncodingOption = "utf-8",
    errors: ErrorsOption = "strict",
    json: JsonOption = False,
    quiet: QuietOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Measure loss, bits per byte and accuracy at every depth and exit threshold.

    On the corpus given, or on what the run held out. The first table reads every token after loop 1, 2, ...; the second
    lets each token stop where the gate's threshold q says, or another rule (--exit), and shows what that costs.

    [bold]looplm eval --max-loops 8[/bold] shows whether looping on beyond training helps or harms.
    """
    from looplm import analysis
    from looplm_cli.held_out import held_out
    from looplm_cli.inputs import check_loops, exit_rules, open_model, thread_count
    from looplm_cli.render import print_json

    opened = open_model(model)
    depth, own = check_loops(opened, max_loops), opened.config.total_ut_steps
    data = held_out(opened, corpus or [], seq_len, batch_size, encoding, errors)
    rules = exit_rules(opened, [float(value) for value in q or []], exit or [], min_loops, depth=min(depth, own))

    def measure(batches: "Iterable[Batch]") -> "Evaluation":
        return analysis.evaluate(
            opened.weights,
            batches,
            max_loops=depth,
            rules=rules,
            bytes_per_token=data.bytes_per_token,
            threads=thread_count(threads),
        )

    found = measure(_watched(data.batches, quiet))
    by_hop = {hops: measure(_rows_with(data.batches, hops)) for hops in range(1, data.max_hops + 1)}
    report = _report(opened, data, found, by_hop)
    if remember:
        _remember(opened, report)
    if json:
        print_json(report)
    else:
        _print(report)


def _remember(opened: "Opened", report: dict[str, Any]) -> None:
    from looplm.checkpoint import add_provenance
    from looplm_cli.render import say

    losses = {str(depth["loops"]): depth["loss"] for depth in report["depths"]}
    add_provenance(opened.folder, {"loss_by_depth": losses})
    say(f"the losses by depth are written into {opened.folder}")


def _watched(batches: "list[Batch]", quiet: bool) -> "Iterator[Batch]":
    from looplm_cli.render import Progress

    with Progress(len(batches), "batch", quiet) as progress:
        for done, batch in enumerate(batches):
            yield batch
            progress.update(done + 1)


def _rows_with(batches: "list[Batch]", hops: int) -> "Iterator[Batch]":
    """The sequences that ask for so many hops."""
    from looplm.data import Batch
    from looplm.tasks.hops import hops_of

    for batch in batches:
        rows = hops_of(batch.input_ids) == hops
        if rows.any():
            yield Batch(batch.input_ids[rows], batch.target[rows])


def _report(model: "Opened", data: "HeldOut", found: "Evaluation", by_hop: "dict[int, Evaluation]") -> dict[str, Any]:
    """The --json object.  Loops are counted from 1; a loop beyond the model's own has no exit probability."""
    from looplm_cli.render import finite

    def bits(loss: float) -> float | None:
        value = found.bits_per_byte(loss)
        return None if value is None else finite(value)

    own = len(found.exit_prob)
    report: dict[str, Any] = {
        "model": str(model.folder),
        "data": data.name,
        "tokens": found.tokens,
        "bytes_per_token": data.bytes_per_token,
        "trained_loops": model.trained_loops,
        "depths": [
            {
                "loops": r + 1,
                "loss": finite(float(loss)),
                "bits_per_byte": bits(loss),
                "accuracy": float(found.accuracy[r]),
                "exit_prob": finite(float(found.exit_prob[r])) if r < own else None,
                "hazard": finite(float(found.hazard[r])) if r < own else None,
            }
            for r, loss in enumerate(found.loss)
        ],
        "thresholds": [
            {
                "q": _threshold(at),
                "exit": str(at.rule),
                "mean_loops": at.mean_loops,
                "loss": finite(at.loss),
                "bits_per_byte": bits(at.loss),
                "accuracy": at.accuracy,
                "exits": at.exits.tolist(),
            }
            for at in found.at
        ],
    }
    if by_hop:
        report["hops"] = [
            {
                "hops": hops,
                "accuracy": part.accuracy.tolist(),
                "thresholds": [
                    {
                        "q": _threshold(at),
                        "exit": str(at.rule),
                        "mean_loops": at.mean_loops,
                        "accuracy": at.accuracy,
                    }
                    for at in part.at
                ],
            }
            for hops, part in by_hop.items()
        ]
    return report


def _threshold(at: "AtRule") -> float | None:
    """q, where the gate alone decides."""
    from looplm.exits import LearnedGate

    return at.rule.exit_threshold if isinstance(at.rule, LearnedGate) else None


def _rule(at: dict[str, Any]) -> str:
    return str(at["exit"]) if at["q"] is None else f"q = {at['q']:g}"


def _print(report: dict[str, Any]) -> None:
    from looplm_cli.render import print_table, sparkline, stdout

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    def percent(share: float) -> str:
        return f"{100 * share:.1f} %"

    stdout().print(f"{report['data']}: {report['tokens']:,} tokens", markup=False, soft_wrap=True)
    rows = [
        [
            f"{depth['loops']}" + (" (beyond training)" if depth["loops"] > report["trained_loops"] else ""),
            number(depth["loss"]),
            number(depth["bits_per_byte"]),
            percent(depth["accuracy"]),
            number(depth["exit_prob"]),
        ]
        for depth in report["depths"]
    ]
    print_table(["loops", "loss", "bits/byte", "accuracy", "exit prob"], rows)
    rows = [
        [
            _rule(at),
            f"{at['mean_loops']:.2f}",
            number(at["loss"]),
            number(at["bits_per_byte"]),
            percent(at["accuracy"]),
            sparkline(at["exits"]),
        ]
        for at in report["thresholds"]
    ]
    print_table(["early exit", "mean loops", "loss", "bits/byte", "accuracy", "exits by loop"], rows)
    if "hops" in report:
        _print_hops(report)


def _print_hops(report: dict[str, Any]) -> None:
    from looplm_cli.render import print_table

    named = [(f"{part['hops']} hop{'s' if part['hops'] > 1 else ''}", part) for part in report["hops"]]
    depths = [f"loop {loop}" for loop in range(1, len(report["depths"]) + 1)]
    print_table(
        ["accuracy", *depths], [[name, *(f"{share:.3f}" for share in part["accuracy"])] for name, part in named]
    )
    thresholds = [_rule(at) for at in report["thresholds"]]
    rows = [
        [name, *(f"{at['mean_loops']:.2f}  {at['accuracy']:.3f}" for at in part["thresholds"])] for name, part in named
    ]
    print_table(["loops, accuracy", *thresholds], rows)
