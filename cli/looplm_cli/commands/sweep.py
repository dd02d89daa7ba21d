"""`looplm sweep`: every exit rule over its thresholds, on one model and text, with measured decode time."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from looplm_cli.options import (
    LOOPS,
    OUTPUT,
    CorpusArgument,
    EncodingOption,
    ErrorsOption,
    JsonOption,
    ModelOption,
    QuietOption,
    SeedOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from looplm.calibration import Gate
    from looplm.contest import Entry, Evidence
    from looplm.data import Batch
    from looplm.pareto import Point
    from looplm_cli.held_out import HeldOut
    from looplm_cli.inputs import Opened

CANDIDATES = 40  # thresholds tried per rule, of which --points are kept


def sweep(
    corpus: CorpusArgument = None,
    model: ModelOption = None,
    points: Annotated[
        int, typer.Option("--points", min=2, help="Thresholds shown per rule.", rich_help_panel=LOOPS)
    ] = 6,
    chunks: Annotated[int, typer.Option("--chunks", min=2, help="Parts of the text that the intervals are over.")] = 8,
    tokens: Annotated[int, typer.Option("--tokens", min=64, help="The most positions of either half.")] = 16384,
    turns: Annotated[
        int, typer.Option("--turns", min=1, help="How often each rule decodes for its time, another text each turn.")
    ] = 5,
    decode_tokens: Annotated[int, typer.Option("--decode-tokens", min=1, help="Tokens decoded in a turn.")] = 64,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates of each gate trained for the contest.")] = 400,
    seed: SeedOption = 0,
    html: Annotated[
        Path | None,
        typer.Option("--html", show_default=False, help="Write one self-contained page.", rich_help_panel=OUTPUT),
    ] = None,
    encoding: EncodingOption = "utf-8",
    errors: ErrorsOption = "strict",
    json: JsonOption = False,
    quiet: QuietOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Compare every exit rule on your model: loss, loops, measured time, and who wins.

    The held-out text (or the one given) is halved. On the first half gates are trained for the contest, one per target
    of Stage II, from the gate of Stage I; the model's folder is not touched. On the second half every rule is judged
    over its thresholds, and decodes for its time by turns. Loss, accuracy and agreement with all loops are those of
    undisturbed keys and values; what the time bought is a real decode.

    [bold]looplm sweep --html sweep.html[/bold] draws all curves on one page.
    """
    from looplm.atomic import replace_files
    from looplm.errors import UsageError
    from looplm_cli.held_out import held_out, two_halves
    from looplm_cli.inputs import check_file, open_model, thread_count
    from looplm_cli.render import Progress, print_json, say
    from looplm_cli.sweep_report import print_sweep, sweep_report

    check_file("--html", html)
    opened = open_model(model)
    if opened.config.total_ut_steps < 2:
        raise UsageError(f"{opened.folder} has one loop: there is no exit to compare", "train with --loops 2 or more")
    data = held_out(opened, corpus or [], None, 16, encoding, errors)
    halves = two_halves(data)
    with Progress(3 + turns, "part", quiet) as progress:
        teach, judge = (_evidence(opened, data, half, tokens, thread_count(threads)) for half in halves)
        progress.update(1, "all loops have run on both halves")
        entries = _entries(opened, teach, steps, seed)
        progress.update(2, "gates trained")
        found = _points(entries, teach, judge, points, chunks, data)
        progress.update(3, f"{len(found)} points judged")
        for turn, _ in enumerate(_timed(opened, found, halves[1], turns, decode_tokens), 1):
            progress.update(3 + turn, f"decoded, turn {turn}")
    report = sweep_report(opened, data, judge, found, chunks=chunks, turns=turns)
    if json:
        print_json(report)
    else:
        print_sweep(report)
    if html is not None:
        from looplm_cli import page

        replace_files({html: page.build_sweep(report).encode()})
        say(f"page written: {html}")


def _evidence(opened: "Opened", data: "HeldOut", half: "list[Batch]", tokens: int, threads: int) -> "Evidence":
    from looplm.contest import gather
    from looplm.tasks.hops import hops_of

    grouped = ((batch, hops_of(batch.input_ids) if data.max_hops else None) for batch in half)
    return gather(opened.weights, grouped, tokens, threads)


def _entries(opened: "Opened", teach: "Evidence", steps: int, seed: int) -> "list[Entry]":
    """Everyone who competes.  Gates of Stage II start from that of Stage I, whichever the folder uses now."""
    from looplm.calibration import CalibrateConfig, Gate, Observations, fit_gate
    from looplm.contest import Entry
    from looplm.exits import MEASURED
    from looplm.objectives import STAGE2_TARGETS, StageTwo

    weights = opened.weights
    present = Gate(weights.gate_weight.copy(), weights.gate_bias.copy())
    first = _first_gate(opened)
    entries = [Entry("fixed", "fixed"), *(Entry(name, name) for name in MEASURED)]
    entries.append(Entry("gate, Stage I", "gate", first or present))
    if opened.provenance.get("stage") == 2:
        entries.append(Entry("gate, stored", "gate", present))
    for target in STAGE2_TARGETS:
        seen, how = Observations(teach.hidden, teach.loss), CalibrateConfig(steps=steps, seed=seed)
        entries.append(Entry(f"gate, {target}", "gate", fit_gate(first or present, seen, StageTwo(target), how)))
    return entries


def _first_gate(opened: "Opened") -> "Gate | None":
    """The gate that Stage I left, if the present one is another and the folder still has it."""
    from looplm.calibration import Gate
    from looplm.checkpoint import previous_gate
    from looplm_cli.render import print_warning

    if opened.provenance.get("stage") != 2:
        return None
    before = previous_gate(opened.folder)
    if before is not None and before[2].get("stage") == 1:
        return Gate(before[0], before[1])
    print_warning(f"{opened.folder} no longer has the gate of Stage I: its present gate takes that place")
    return None


def _points(
    entries: "list[Entry]", teach: "Evidence", judge: "Evidence", count: int, chunks: int, data: "HeldOut"
) -> "list[Point]":
    """Thresholds are chosen on the teaching half alone."""
    from looplm.pareto import point, spread

    parts, groups = judge.chunks(chunks), range(1, data.max_hops + 1)
    found: list[Point] = []
    for entry in entries:
        own = [point(entry, q, teach, []) for q in entry.thresholds(teach, CANDIDATES)]
        kept = own if entry.rule in ("fixed", "stable") else spread(own, count)
        found += [point(entry, each.threshold, judge, parts, groups) for each in kept]
    return found


def _timed(
    opened: "Opened", found: "list[Point]", half: "list[Batch]", turns: int, decode_tokens: int
) -> Iterator[None]:
    """Give every point its decode times."""
    from looplm.exits import make_rule
    from looplm.timing import decode_by_turns, with_gate
    from looplm_cli.held_out import pieces

    rows = pieces(half, turns)
    whole = rows[0].input_ids.shape[1]
    prompt = max(1, min(whole // 4, whole - 1))
    texts = [rows[turn % len(rows)].positions(prompt + decode_tokens) for turn in range(turns)]
    models = {p.entry.name: with_gate(opened.weights, p.entry.gate) for p in found if p.entry.gate is not None}
    competitors = [(models.get(p.entry.name, opened.weights), make_rule(p.entry.rule, p.threshold)) for p in found]
    for decoded in decode_by_turns(competitors, texts, prompt):
        for each, times in zip(found, decoded, strict=True):
            each.decoded = times
        yield
