"""`looplm kv`: what each cache policy costs in loss and gives in memory and time."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from looplm_cli.options import (
    CorpusArgument,
    EncodingOption,
    ErrorsOption,
    ExitOption,
    JsonOption,
    KvDtypeOption,
    LoopsOption,
    MaxDeferredOption,
    MinLoopsOption,
    ModelOption,
    QOption,
    QuietOption,
    ThreadsOption,
    WeightsOption,
)

if TYPE_CHECKING:
    from looplm.arrays import Ints
    from looplm.policies import PolicyFigures
    from looplm_cli.held_out import HeldOut


def kv(
    corpus: CorpusArgument = None,
    model: ModelOption = None,
    q: QOption = None,
    exit: ExitOption = None,
    min_loops: MinLoopsOption = 1,
    loops: LoopsOption = None,
    max_deferred: MaxDeferredOption = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Pieces of the text to decode.")] = 16,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=4, show_default="as trained", help="Tokens of each piece.")
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option("--prompt-tokens", min=1, show_default="a quarter", help="Tokens of each that are the prompt."),
    ] = None,
    encoding: EncodingOption = "utf-8",
    errors: ErrorsOption = "strict",
    json: JsonOption = False,
    quiet: QuietOption = False,
    weights: WeightsOption = None,
    kv_dtype: KvDtypeOption = "float32",
    threads: ThreadsOption = None,
) -> None:
    """Compare what early exits leave behind: memory, loss, agreement and speed of every cache policy.

    Pieces of the held-out text (or the one given) are decoded under each policy by turns: their first tokens are the
    prompt, which runs all loops, and then every token is predicted in turn from what the policy kept of those before
    it, and replaced by the true one. Everything is held against `full`, where every loop runs for every token. Tokens
    stop as --q or --exit says, else as calibrated or as the model's own threshold, usually 1: all loops.

    [bold]looplm kv --q 0.5[/bold]
    """
    import numpy as np

    from looplm.generation import useful_threads
    from looplm.policies import figures, walk_all
    from looplm_cli.held_out import held_out
    from looplm_cli.inputs import check_loops, chosen_rule, deferred_bound, key_value_type, open_stored, refuse_task
    from looplm_cli.render import Progress, print_json, say

    bound, cache_dtype = deferred_bound("exact", max_deferred), key_value_type(kv_dtype)
    opened = open_stored(model, weights, refuse_task)
    rule, told = chosen_rule(opened, q, exit, loops=loops, min_loops=min_loops)
    depth = rule.deepest(opened.config.total_ut_steps)
    check_loops(opened, None if depth == opened.config.total_ut_steps else depth)
    data = held_out(opened, corpus or [], seq_len, 16, encoding, errors)
    texts, prompt = _texts(data, windows, prompt_tokens)
    if told and not quiet:
        say(told)
    options: dict[str, Any] = {"max_deferred": bound, "kv_dtype": cache_dtype}
    options["threads"] = threads or useful_threads(opened.weights)
    with Progress(len(texts), "window", quiet) as progress:
        for walks in walk_all(opened.weights, rule, texts, prompt, **options):
            progress.update(len(walks["full"]))
    found = figures(walks)
    report = {
        "model": str(opened.folder),
        "data": data.name,
        "windows": len(texts),
        "prompt_tokens": prompt,
        "tokens": int(sum(np.size(walk.loss) for walk in walks["full"])),
        "q": q,
        "exit": str(rule),
        "loops": depth,
        "kv_dtype": cache_dtype,
        "max_deferred": bound,
        "policies": [_policy(each, found[0]) for each in found],
    }
    if json:
        print_json(report)
    else:
        _print(report)


def _texts(data: "HeldOut", windows: int, prompt_tokens: int | None) -> "tuple[list[Ints], int]":
    """Pieces of equal length from all over the text, and how much of each is the prompt.

    Raises: UsageError for a prompt that leaves nothing to decode.
    """
    import numpy as np

    from looplm.errors import UsageError

    length = data.batches[0].input_ids.shape[1]
    rows = np.concatenate([batch.input_ids for batch in data.batches if batch.input_ids.shape[1] == length])
    prompt = max(1, length // 4) if prompt_tokens is None else prompt_tokens
    if prompt > length - 2:
        raise UsageError(
            f"a prompt of {prompt} tokens leaves none to decode of pieces of {length}",
            f"use at most --prompt-tokens {length - 2}" if length > 2 else "give a longer text",
        )
    chosen = np.unique(np.linspace(0, len(rows) - 1, windows).astype(int))
    return [rows[i] for i in chosen], prompt


def _policy(found: "PolicyFigures", full: "PolicyFigures") -> dict[str, Any]:
    from looplm_cli.render import finite

    return {
        "policy": found.policy,
        "bytes_per_token": round(found.bytes_per_token),
        "memory_reduction": full.bytes_per_token / found.bytes_per_token,
        **{
            name: finite(getattr(found, name))
            for name in ("loss", "loss_change", "loss_interval", "agreement", "mean_loops", "passes")
        },
        "tokens_per_s": finite(found.tokens_per_s),
        "speed": finite(found.speed),
    }


def _print(report: dict[str, Any]) -> None:
    from looplm_cli.render import print_table, stdout

    say = stdout().print
    say(
        f"{report['data']}: {report['tokens']:,} tokens decoded in {report['windows']} windows after "
        f"{report['prompt_tokens']} of prompt, {report['exit']}",
        markup=False,
        soft_wrap=True,
    )
    rows = [
        [
            each["policy"],
            f"{each['bytes_per_token']:,}",
            f"{each['memory_reduction']:.2f}",
            f"{each['loss']:.4f}",
            _change(each),
            f"{100 * each['agreement']:.1f} %",
            f"{each['mean_loops']:.2f}",
            f"{each['passes']:.2f}",
            f"{each['tokens_per_s']:,.0f}",
            f"{each['speed']:.2f}",
        ]
        for each in report["policies"]
    ]
    heads = ["policy", "bytes/token", "÷", "loss", "change", "as full", "loops", "passes", "tokens/s", "×"]
    print_table(heads, rows)
    say(
        "÷: memory saved; change of the loss and its 95 % interval; as full: same best token; passes: over the "
        "weights, per token; ×: speed against full",
        markup=False,
    )


def _change(each: dict[str, Any]) -> str:
    from looplm_cli.render import stdout

    interval = each["loss_interval"]
    width = "" if interval is None or stdout().width < 100 else f" ±{interval:.4f}"
    return f"{each['loss_change']:+.4f}{width}"
