"""`looplm train`: Stage I on text or a task."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from looplm_cli.options import (
    LOOPS,
    MACHINE,
    TRAINING,
    ConfigOption,
    CorpusArgument,
    JsonOption,
    OutDirOption,
    QuietOption,
    SetOption,
    ThreadsOption,
    finite,
)

if TYPE_CHECKING:
    from looplm.settings import RunConfig
    from looplm.training import EvalReport, StepReport
    from looplm.training_run import TrainingRun


def train(
    corpus: CorpusArgument = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", show_default="nano", help="Size: nano, tiny, small or medium.", rich_help_panel=TRAINING
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, show_default="by preset", help="Optimizer updates.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", callback=finite, show_default=False, help="As many steps as fit into this time."),
    ] = None,
    out_dir: OutDirOption = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", show_default=False, help="Go on with the run in this folder, exactly where it was."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", "-s", min=0, show_default="0", help="Start of every random choice.")
    ] = None,
    loops: Annotated[
        int | None,
        typer.Option("--loops", min=1, show_default="4", help="How often the stack is applied.", rich_help_panel=LOOPS),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            "--prior",
            show_default="uniform",
            help="Prior over loops: uniform, geometric:P, or one weight per loop.",
            rich_help_panel=LOOPS,
        ),
    ] = None,
    entropy_weight: Annotated[
        float | None,
        typer.Option(
            "--entropy-weight",
            callback=finite,
            show_default="0.05",
            help="Weight of the exit distribution's entropy (the paper's beta).",
            rich_help_panel=LOOPS,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            show_default="auto",
            help="auto: byte-level BPE trained on the corpus; bytes; or a tokenizer.json.",
        ),
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option("--val-fraction", callback=finite, show_default="0.1", help="Last part of the text, held out."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            show_default="damped",
            help="damped: loops pay in small models; ouro: the published initial values.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    config: ConfigOption = None,
    setting: SetOption = None,
    encoding: Annotated[
        str | None, typer.Option("--encoding", show_default="utf-8", help="How the corpus is encoded.")
    ] = None,
    errors: Annotated[
        str | None,
        typer.Option(
            "--errors",
            show_default="strict",
            help="Bytes that are not text: `strict` stops, `replace` and `ignore` go on.",
        ),
    ] = None,
    threads: ThreadsOption = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            show_default="fp32 for nano, else auto",
            help="Of the matrix products: fp32, bf16, or auto: bf16 where that is clearly quicker.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option(
            "--kernels",
            metavar="PATH",
            show_default="the fastest here",
            help="Who multiplies matrices; `looplm info --machine` lists the paths.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    recompute: Annotated[
        str | None,
        typer.Option(
            "--recompute",
            show_default="auto",
            help="What backward computes again instead of keeping: none, loop, layer, or auto: the least that fits.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the effective settings as YAML and stop.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a looped model and its exit gate on text or on a built-in task.

    Everything is trained together on the expected loss over loops minus an entropy term (Stage I).  Without a corpus it
    reads `builtin:python-topics`, about half a megabyte of English that comes with Python; `builtin:hops` is a task on
    which each further loop visibly solves harder questions.

    [bold]looplm train shakespeare.txt --preset tiny --minutes 10[/bold]
    """
    from looplm.compiling import compiling_beside
    from looplm.ranks import first_does
    from looplm.run_folder import new_run_path
    from looplm.settings import to_yaml
    from looplm.training_run import resume_run, start_run
    from looplm_cli.inputs import announce_compilation
    from looplm_cli.interrupts import ranks_as_one
    from looplm_cli.render import print_json, say

    flags: dict[str, dict[str, Any]] = {
        "model": {"total_ut_steps": loops},
        "init": {"scheme": init},
        "data": {
            "corpus": corpus or None,
            "tokenizer": tokenizer,
            "val_fraction": val_fraction,
            "encoding": encoding,
            "errors": errors,
        },
        "train": {"steps": steps, "minutes": minutes, "seed": seed, "prior": prior, "entropy_weight": entropy_weight},
    }
    if resume is None:
        if kernels is not None and precision is None:
            precision = "auto"  # that of the path, whatever the preset prefers
        flags["train"] |= {"threads": threads, "precision": precision, "kernels": kernels, "recompute": recompute}

    def chosen() -> "RunConfig | None":
        """The settings of a new run; None for one to resume, whose folder has them."""
        if resume is None:
            return effective_settings(preset, config, setting or [], flags)
        others = (preset, out_dir, config, precision, kernels, recompute, *(setting or []), show_config or None)
        refuse_settings(*others, flags=flags)
        return None

    with ranks_as_one() as ranks:
        first, settings = ranks.rank == 0, first_does(ranks, chosen)
        if show_config and settings:
            if first:
                typer.echo(to_yaml(settings), nl=False)
            return
        if settings:
            path = first_does(ranks, lambda: out_dir or new_run_path(_run_name(settings)))
            opened = start_run(settings, path, ranks)
        else:
            assert resume is not None
            opened = resume_run(resume, threads or 0, ranks)
        if first and not quiet:
            announce_compilation()
        with compiling_beside(ranks.sharing) as compiled, opened as run:
            if first and not quiet:
                say(_opening_line(run, resumed=resume is not None))
            compiled()
            result = run_training(run, quiet or not first)
        if as_json and first:
            print_json(result)


def refuse_settings(*others: Any, flags: dict[str, dict[str, Any]]) -> None:
    """Raises: UsageError if anything was given that a run to resume has in its folder."""
    from looplm.errors import UsageError

    given = [value for values in flags.values() for value in values.values()]
    if any(value is not None for value in (*given, *others)):
        raise UsageError(
            "--resume takes corpus and settings from the run folder",
            "give --resume FOLDER with nothing but --threads, --json or --quiet",
        )


def effective_settings(
    preset: str | None, config_file: Path | None, settings: list[str], flags: dict[str, dict[str, Any]]
) -> "RunConfig":
    """Preset, YAML file, --set and flags in rising precedence; flags left out (None) say nothing."""
    from looplm.settings import load_yaml, parse_settings, run_config

    given = {name: {k: v for k, v in values.items() if v is not None} for name, values in flags.items()}
    from_file = load_yaml(config_file) if config_file else {}
    chosen = preset or from_file.get("preset", "nano")
    return run_config(chosen, from_file, parse_settings(settings), given)


def run_training(run: "TrainingRun", quiet: bool) -> dict[str, Any]:
    """Train to the end or to an interrupt, showing how it goes; returns what --json prints.

    Ctrl-C and SIGTERM write a checkpoint and end with exit code 130; of several ranks, any that gets one stops all.
    """
    from looplm.training import EvalReport, StepReport
    from looplm.training_run import evaluation_json
    from looplm_cli.interrupts import Interrupted, interruptible
    from looplm_cli.render import Progress, say

    began: StepReport | None = None
    last: EvalReport | None = None
    ranks = run.trainer.ranks
    with interruptible() as stop, Progress(run.trainer.total_steps, "step", quiet) as progress:
        for report in run.reports():
            if isinstance(report, StepReport):
                progress.total = report.total_steps
                began = began or report
                progress.update(report.step, step_line(report, began))
            else:
                last = report
                if not quiet:
                    progress.note(eval_line(run, report))
            if isinstance(report, EvalReport) and report.final:
                continue
            if any(ranks.sum_small([stop.requested])):
                run.save()
                if run.first:
                    again = f"mpiexec -n {ranks.size} looplm" if ranks.size > 1 else "looplm"
                    step = run.trainer.progress.step
                    say(f"stopped at step {step}; go on with: {again} train --resume {run.folder.path}")
                raise Interrupted
    assert last is not None
    progress_made = run.trainer.progress
    result = {
        **evaluation_json(last),
        "steps": progress_made.step,
        "tokens": progress_made.tokens,
        "seconds": round(progress_made.seconds, 3),
        "tokens_per_s": round(progress_made.tokens / max(progress_made.seconds, 1e-9), 1),
        "run_dir": str(run.folder.path),
    }
    if run.first:
        result |= task_accuracy(run, quiet)
    if not quiet:
        say(f"saved in {run.folder.path}")
    return result


def step_line(report: "StepReport", began: "StepReport") -> str:
    """Loss by loop, where it would stop, speed and time left: by the steps since `began`, the first of this session.

    That one compiles or loads kernels, and tells nothing of the others.
    """
    from looplm_cli.render import sparkline

    losses = " ".join(f"{loss:.3f}" for loss in report.loss)
    loops = sum(r * p for r, p in enumerate(report.exit_prob, 1))
    line = f"loss by loop {losses}  exits {sparkline(report.exit_prob)} mean {loops:.2f}  "
    if report.step == began.step:
        return f"{line}{report.tokens_per_s:,.0f} tokens/s"
    seconds = report.seconds - began.seconds
    left = (report.total_steps - report.step) * seconds / (report.step - began.step)
    return f"{line}{(report.tokens - began.tokens) / seconds:,.0f} tokens/s  {left / 60:.1f} min left"


def eval_line(run: "TrainingRun", report: "EvalReport") -> str:
    """Held-out loss by loop, bits per byte at the last loop, exit distribution."""
    found = report.evaluation
    losses = " ".join(f"{loss:.4f}" for loss in found.loss)
    bits = found.bits_per_byte(found.loss[-1])
    exits = " ".join(f"{p:.2f}" for p in found.exit_prob)
    shown = f"{bits:.3f} bits/byte" if bits is not None else f"accuracy {found.accuracy[-1]:.3f}"
    scope = "all held-out data" if report.final else "held out"
    return f"step {report.step}: {scope}: loss by loop {losses}, {shown} at the last, exit distribution {exits}"


def task_accuracy(run: "TrainingRun", quiet: bool) -> dict[str, Any]:
    """Accuracy by number of hops and loop, for a task run; nothing for a text."""
    from looplm.tasks.hops import HopsSource
    from looplm.tasks.scores import answer
    from looplm_cli.render import finite, print_table

    if not isinstance(run.source, HopsSource):
        return {}
    accuracy = answer(run.weights, run.source, threads=run.trainer.threads).accuracy()
    if not quiet:
        loops = [f"loop {r}" for r in range(1, accuracy.shape[1] + 1)]
        rows = [(f"{hop}", *(f"{a:.3f}" for a in row)) for hop, row in enumerate(accuracy, 1)]
        print_table(["hops", *loops], rows, title="Accuracy by number of hops and loop, new sequences")
    return {"accuracy_by_hop_and_loop": [[finite(round(float(a), 4)) for a in row] for row in accuracy]}


def _run_name(settings: "RunConfig") -> str:
    source = Path(settings.data.corpus[0].removeprefix("builtin:")).stem or "text"
    return f"{settings.preset}-{source}" if source != "-" else f"{settings.preset}-stdin"


def _opening_line(run: "TrainingRun", resumed: bool) -> str:
    from looplm.weights import parameter_count

    config, train, size = run.weights.config, run.config.train, run.trainer.ranks.size
    ranks = f"{size} ranks with " if size > 1 else ""
    verb = f"resuming at step {run.trainer.progress.step}" if resumed else "training"
    return (
        f"{verb} into {run.folder.path}: {parameter_count(config):,} parameters, {config.num_hidden_layers} layers x "
        f"{config.total_ut_steps} loops, vocabulary {config.vocab_size}, {ranks}batches of "
        f"{train.batch_size} x {train.seq_len} tokens, {run.trainer.threads} threads"
    )
