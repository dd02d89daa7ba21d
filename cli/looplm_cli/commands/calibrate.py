"""`looplm calibrate`: Stage II, the gate alone, and the contest between the old gate and the new."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from looplm_cli.options import (
    LOOPS,
    CorpusArgument,
    EncodingOption,
    ErrorsOption,
    JsonOption,
    ModelOption,
    QuietOption,
    SeedOption,
    ThreadsOption,
    finite,
)

if TYPE_CHECKING:
    from looplm.calibration import Contest, Gate, GateMeasure
    from looplm_cli.held_out import HeldOut
    from looplm_cli.inputs import Opened


def calibrate(
    corpus: CorpusArgument = None,
    model: ModelOption = None,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="What teaches the gate to go on. paper: this loop just helped; look-ahead: the next will help; "
            "best-later: some later loop will help.",
        ),
    ] = "look-ahead",
    accept: Annotated[
        str,
        typer.Option(
            "--accept",
            help="Which gate stays. better: the one that loses less; always: the new one; never: the old one, for "
            "thresholds alone.",
        ),
    ] = "better",
    target_loops: Annotated[
        float | None,
        typer.Option(
            "--target-loops",
            callback=finite,
            show_default=False,
            help="Solve for the threshold, of each exit rule, that takes so many loops on average, and store it.",
            rich_help_panel=LOOPS,
        ),
    ] = None,
    max_loss_increase: Annotated[
        str | None,
        typer.Option(
            "--max-loss-increase",
            metavar="SHARE",
            show_default=False,
            help="Solve for the threshold that loops least while the loss is at most so much above that of all loops, "
            "e.g. 1%.",
            rich_help_panel=LOOPS,
        ),
    ] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Put gate and thresholds from before the last calibration back.")
    ] = False,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates of the gate.")] = 400,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", min=1e-8, callback=finite, help="Of the gate's updates, at the start.")
    ] = 1e-2,
    seed: SeedOption = 0,
    encoding: EncodingOption = "utf-8",
    errors: ErrorsOption = "strict",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Teach the gate alone when to stop looping, and keep the better gate.

    The model is frozen; the gate learns on half of the held-out data (or of the text given) from which loops really
    lowered the loss (Stage II), and is judged on the other half against the gate it would replace: which one loses less
    at the same mean number of loops? The old gate stays beside the new one.

    With a goal, the thresholds of all exit rules that reach it are solved for on the first half, checked on the other,
    and stored with the model: generate then stops by the gate's, and --exit RULE by another's.

    [bold]looplm calibrate --target-loops 2.5[/bold] finds the q that takes two and a half loops on average.

    [bold]looplm calibrate --target paper --accept always[/bold] takes the paper's gate whatever the contest says.
    """
    from looplm.calibration import Gate
    from looplm.checkpoint import swap_gate, undo_gate
    from looplm.errors import UsageError
    from looplm_cli.held_out import two_halves
    from looplm_cli.inputs import open_model
    from looplm_cli.render import print_json, say
    from looplm_cli.thresholds import losses_by_depth, parse_goal, solve_thresholds, verdict

    if accept not in ("better", "always", "never"):
        raise UsageError(f"--accept {accept!r} is not known", "use better, always or never")
    asked = (("--target-loops", target_loops), ("--max-loss-increase", max_loss_increase), ("a corpus", corpus or None))
    besides = next((name for name, value in asked if value is not None), None)
    if undo and besides:
        raise UsageError(f"--undo and {besides} exclude each other", "put the old gate back, then calibrate again")
    opened = open_model(model)
    goal = parse_goal(opened, target_loops, max_loss_increase)
    if undo:
        undo_gate(opened.folder)
        say(f"the previous gate of {opened.folder} is back")
        if as_json:
            print_json({"model": str(opened.folder), "kept": "previous"})
        return
    if opened.config.total_ut_steps < 2:
        raise UsageError(f"{opened.folder} has one loop: there is no exit to learn", "train with --loops 2 or more")

    new, found, data = _contest(opened, corpus, target, steps, learning_rate, seed, encoding, errors, threads)
    taken = accept == "always" or (accept == "better" and found.new_wins)
    report = _report(opened, data, found, target, taken)
    report |= _by_hop(opened, data, new, threads)
    gate = new if taken else Gate(opened.weights.gate_weight, opened.weights.gate_bias)
    if taken or goal is not None:
        changes: dict[str, Any] = {"stage": 2, "gate": f"Stage II, target {target}"} if taken else {}
        changes["exit"] = None  # thresholds of another gate mean nothing
        changes["loss_by_depth"] = losses_by_depth(opened, two_halves(data)[1], threads)
        if goal is not None:
            report["exit"] = changes["exit"] = solve_thresholds(opened, gate, two_halves(data), goal, threads)
        swap_gate(opened.folder, gate.weight, gate.bias, changes)
    if as_json:
        print_json(report)
    elif not quiet:
        _print(report)
    say(_verdict(found, accept, taken))
    if goal is not None:
        say(verdict(report["exit"]))


def _contest(
    opened: "Opened",
    corpus: list[str] | None,
    target: str,
    steps: int,
    learning_rate: float,
    seed: int,
    encoding: str,
    errors: str,
    threads: int | None,
) -> "tuple[Gate, Contest, HeldOut]":
    from looplm.calibration import CalibrateConfig, Gate, contest, fit_gate, observe
    from looplm.objectives import StageTwo
    from looplm_cli.held_out import held_out, two_halves
    from looplm_cli.inputs import thread_count

    objective = StageTwo(target=target)
    config = CalibrateConfig(steps=steps, learning_rate=learning_rate, seed=seed)
    data = held_out(opened, corpus or [], None, 16, encoding, errors)
    teach, judge = (
        observe(opened.weights, part, config.teaching_tokens, thread_count(threads)) for part in two_halves(data)
    )
    old = Gate(opened.weights.gate_weight, opened.weights.gate_bias)
    new = fit_gate(old, teach, objective, config)
    return new, contest(old, new, judge), data


def _verdict(found: "Contest", accept: str, taken: bool) -> str:
    if found.shared is None:
        why = "the two gates never use the same mean number of loops, so neither can be said to be better"
    else:
        low, high = found.shared
        more = "less" if found.advantage > 0 else "more"
        why = f"between {low:.2f} and {high:.2f} mean loops the new gate loses {abs(found.advantage):.4f} nats {more}"
    if taken and not found.new_wins:
        return f"taking the new gate as asked (--accept always), although {why}"
    if accept == "never" and found.new_wins:
        return f"keeping the old gate as asked (--accept never), although {why}"
    return f"{'keeping the new gate' if taken else 'keeping the old gate'}: {why}"


def _measure_json(measured: "GateMeasure") -> dict[str, Any]:
    return {
        "exit_prob": measured.exit_prob,
        "thresholds": [{"q": q, "mean_loops": loops, "loss": loss} for q, (loops, loss) in measured.thresholds.items()],
    }


def _report(opened: "Opened", data: "HeldOut", found: "Contest", target: str, taken: bool) -> dict[str, Any]:
    return {
        "model": str(opened.folder),
        "data": data.name,
        "target": target,
        "before": _measure_json(found.old),
        "after": _measure_json(found.new),
        "advantage": found.advantage,
        "shared_mean_loops": found.shared,
        "kept": "new" if taken else "old",
    }


def _by_hop(opened: "Opened", data: "HeldOut", new: "Gate", threads: int | None) -> dict[str, Any]:
    """On the hops task: mean exit loop and accuracy by number of hops, before and after."""
    if not data.max_hops:
        return {}
    from looplm.calibration import THRESHOLDS, Gate
    from looplm.tasks.scores import answer
    from looplm_cli.held_out import hops_source
    from looplm_cli.inputs import thread_count
    from looplm_cli.render import finite

    answers = answer(opened.weights, hops_source(opened), threads=thread_count(threads))
    old = Gate(opened.weights.gate_weight, opened.weights.gate_bias)
    found: dict[str, Any] = {}
    for name, gate in (("before", old), ("after", new)):
        exit_prob = gate.exit_prob(answers.hidden)
        rows = []
        for q in THRESHOLDS:
            loops, accuracy = ([finite(x) for x in means.tolist()] for means in answers.at_threshold(exit_prob, q))
            rows.append({"q": q, "mean_loops": loops, "accuracy": accuracy})
        found[f"hops_{name}"] = rows
    return found


def _print(report: dict[str, Any]) -> None:
    from looplm_cli.render import exit_histogram, print_table, stdout

    stdout().print(f"judged on one half of {report['data']}", markup=False, soft_wrap=True)
    before, after = report["before"], report["after"]
    for name, measured in (("old", before), ("new", after)):
        stdout().print(f"exit distribution, {name} gate: {exit_histogram(measured['exit_prob'])}", soft_wrap=True)
    rows = [
        [f"q = {old['q']:g}", *(f"{at['mean_loops']:.2f}  {at['loss']:.4f}" for at in (old, new))]
        for old, new in zip(before["thresholds"], after["thresholds"], strict=True)
    ]
    print_table(["mean loops and loss", "old gate", "new gate"], rows)
    if "exit" in report:
        from looplm_cli.thresholds import print_thresholds

        print_thresholds(report["exit"])
    if "hops_before" not in report:
        return
    rows = [
        [f"q = {old['q']:g}, {hop} hop{'s' if hop > 1 else ''}"]
        + [_loops_and_accuracy(at["mean_loops"][hop - 1], at["accuracy"][hop - 1]) for at in (old, new)]
        for hop in range(1, len(report["hops_before"][0]["mean_loops"]) + 1)
        for old, new in zip(report["hops_before"], report["hops_after"], strict=True)
    ]
    print_table(["mean loops and accuracy", "old gate", "new gate"], rows)


def _loops_and_accuracy(loops: float | None, accuracy: float | None) -> str:
    return "no such question" if loops is None or accuracy is None else f"{loops:.2f}  {accuracy:.3f}"
