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
    from looplm.policies import PolicyFigures

WIDE = 100  # columns from which intervals and ratios are shown


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
    it, and replaced by the true one (a task's answers are held against its targets). Everything is held against `full`,
    where every loop runs for every token. Tokens stop as --q or --exit says, else as calibrated or as the model's own
    threshold, usually 1: all loops.

    [bold]looplm kv --q 0.5[/bold]
    """
    from looplm.generation import useful_threads
    from looplm.policies import figures, walk_all
    from looplm_cli.held_out import held_out, pieces
    from looplm_cli.inputs import check_loops, chosen_rule, deferred_bound, key_value_type, open_stored
    from looplm_cli.render import Progress, print_json, say

    bound, cache_dtype = deferred_bound("exact", max_deferred), key_value_type(kv_dtype)
    opened = open_stored(model, weights, threads=threads)
    rule, told = chosen_rule(opened, q, exit, loops=loops, min_loops=min_loops)
    depth = rule.deepest(opened.config.total_ut_steps)
    check_loops(opened, None if depth == opened.config.total_ut_steps else depth)
    data = held_out(opened, corpus or [], seq_len, 16, encoding, errors)
    texts = pieces(data.batches, windows)
    prompt = _prompt(texts[0].input_ids.shape[1], prompt_tokens)
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
        "tokens": sum(walk.tokens for walk in walks["full"]),
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
        _print(report, bool(data.max_hops))


def _prompt(length: int, wish: int | None) -> int:
    """How many tokens of each piece are the prompt.  Raises: UsageError if that leaves nothing to decode."""
    from looplm.errors import UsageError

    prompt = max(1, length // 4) if wish is None else wish
    if prompt > length - 1:
        raise UsageError(
            f"a prompt of {prompt} tokens leaves none to decode of pieces of {length}",
            f"use at most --prompt-tokens {length - 1}" if length > 1 else "give a longer text",
        )
    return prompt


def _policy(found: "PolicyFigures", full: "PolicyFigures") -> dict[str, Any]:
    from looplm_cli.render import finite

    return {
        "policy": found.policy,
        "bytes_per_token": round(found.bytes_per_token),
        "memory_reduction": full.bytes_per_token / found.bytes_per_token,
        **{
            name: finite(getattr(found, name))
            for name in ("loss", "loss_change", "loss_interval", "accuracy", "agreement", "mean_loops", "passes")
        },
        "tokens_per_s": finite(found.tokens_per_s),
        "speed": finite(found.speed),
    }


def _print(report: dict[str, Any], task: bool) -> None:
    """Of a task, the accuracy takes the place of the loss."""
    from looplm_cli.render import print_table, stdout

    say = stdout().print
    say(
        f"{report['data']}: {report['tokens']:,} tokens decoded in {report['windows']} windows after "
        f"{report['prompt_tokens']} of prompt, {report['exit']}",
        markup=False,
        soft_wrap=True,
    )
    wide = stdout().width >= WIDE
    rows = [
        [
            each["policy"],
            f"{each['bytes_per_token']:,}" + (f" ÷ {each['memory_reduction']:.3g}" if wide else ""),
            f"{100 * each['accuracy']:.1f} %" if task else f"{each['loss']:.4f}",
            f"{each['loss_change']:+.4f}" + (f" ±{_interval(each)}" if wide else ""),
            f"{100 * each['agreement']:.1f} %",
            f"{each['mean_loops']:.2f}",
            f"{each['passes']:.2f}",
            f"{each['tokens_per_s']:,.0f}" + (f" × {each['speed']:.2f}" if wide else ""),
        ]
        for each in report["policies"]
    ]
    size, speed = ("bytes/token", "tokens/s") if wide else ("bytes", "tok/s")
    print_table(["policy", size, "right" if task else "loss", "change", "as full", "loops", "passes", speed], rows)
    say(
        ("right: share of answers; " if task else "")
        + "against full: change of the loss"
        + (" with its 95 % interval, " if wide else ", ")
        + "share of tokens with the same best next token; loops: until a token is predicted; passes: over the weights, "
        "per token",
        markup=False,
    )


def _interval(each: dict[str, Any]) -> str:
    return "?" if each["loss_interval"] is None else f"{each['loss_interval']:.4f}"
