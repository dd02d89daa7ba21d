"""`looplm generate`: continue a prompt, and say afterwards what the loops cost."""

from pathlib import Path
from typing import Annotated, Any

import typer

from looplm_cli.options import (
    BudgetOption,
    CacheOption,
    DraftLoopsOption,
    DraftTokensOption,
    ExitOption,
    ExitTraceOption,
    JsonOption,
    KvDtypeOption,
    LoopsOption,
    MaxDeferredOption,
    MaxMsOption,
    MaxNewTokensOption,
    MinLoopsOption,
    MinPOption,
    ModelOption,
    PromptOption,
    PromptPrecisionOption,
    QOption,
    QuietOption,
    RepetitionPenaltyOption,
    SeedOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    WeightsOption,
)

MANY = "Many prompts"


def generate(
    model: ModelOption = None,
    prompt: PromptOption = None,
    q: QOption = None,
    exit: ExitOption = None,
    min_loops: MinLoopsOption = 1,
    loops: LoopsOption = None,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    seed: SeedOption = 0,
    max_new_tokens: MaxNewTokensOption = 128,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", show_default=False, help="End before this text; may be repeated."),
    ] = None,
    cache: CacheOption = "last-exited",
    max_deferred: MaxDeferredOption = None,
    draft_loops: DraftLoopsOption = None,
    draft_tokens: DraftTokensOption = None,
    budget_loops_per_token: BudgetOption = None,
    max_ms_per_token: MaxMsOption = None,
    exit_trace: ExitTraceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    weights: WeightsOption = None,
    kv_dtype: KvDtypeOption = "float32",
    prompt_precision: PromptPrecisionOption = "fp32",
    threads: ThreadsOption = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            show_default=False,
            help="Continue every line of a text file (`-`: stdin), or every object of a .jsonl: prompt, and if it "
            "likes max_new_tokens, seed, id. Answers are JSON lines; prompt i of n has seed + i - 1.",
            rich_help_panel=MANY,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch", min=1, show_default="16", help="Prompts in flight at once, 24 at most.", rich_help_panel=MANY
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            show_default="stdout",
            help="A file for the answers, written when all are there.",
            rich_help_panel=MANY,
        ),
    ] = None,
    unordered: Annotated[
        bool, typer.Option("--unordered", help="Answers as they are done, not as asked.", rich_help_panel=MANY)
    ] = False,
) -> None:
    """Continue a prompt, looping only as often as each token needs.

    The text goes to stdout as it is written; afterwards stderr tells how many loops the tokens took. With --q, a token
    stops at the first loop whose exit probabilities add up to q; --exit names other rules. Without either it is what
    looplm calibrate stored, or else the model's own threshold, usually 1: all loops. --loops alone is a fixed depth,
    with a rule the most loops a token may take. The prompt itself always runs all loops. Without a prompt the model
    starts a new document.

    [bold]looplm generate -p "The with statement" --q 0.7 -n 200[/bold]

    Many prompts at once share each pass over the weights, every one in its own loop, and get what they would get alone:

    [bold]looplm generate --prompts questions.txt --q 0.7 --out answers.jsonl[/bold]

    With --draft-loops, the first loops draft tokens and all loops check them: the text is that of full depth, to the
    last bit where it is greedy, and in distribution where it is sampled (a seed then fixes it only for given R and K).
    """
    import numpy as np

    from looplm import batching, generation
    from looplm.chat_template import stop_ids
    from looplm.sampling import Sampling
    from looplm_cli.batch_run import Answers, check_combination, check_out, run_prompts
    from looplm_cli.decoding import Decoding, Wishes
    from looplm_cli.inputs import (
        check_loops,
        deferred_bound,
        key_value_policy,
        key_value_type,
        open_stored,
        prompt_ids,
        prompt_products,
        read_prompt,
        refuse_task,
    )
    from looplm_cli.prompt_file import read_entries
    from looplm_cli.render import print_json, print_warning, say
    from looplm_cli.written import Written

    of_one: dict[str, object] = {"--prompt": prompt, "--json": as_json or None, "--exit-trace": exit_trace}
    of_one |= {"--draft-loops": draft_loops, "--draft-tokens": draft_tokens}
    of_one |= {"--budget-loops-per-token": budget_loops_per_token, "--max-ms-per-token": max_ms_per_token}
    check_combination(prompts, {"--batch": batch, "--out": out, "--unordered": unordered or None}, of_one)
    policy, cache_dtype = key_value_policy(cache), key_value_type(kv_dtype)
    precision = prompt_products(prompt_precision)
    bound = deferred_bound(policy, max_deferred)
    wishes = Wishes(
        q=q,
        exit=exit,
        min_loops=min_loops,
        loops=loops,
        cache=policy,
        draft_loops=draft_loops,
        draft_tokens=draft_tokens,
        max_ms_per_token=max_ms_per_token,
        budget_loops_per_token=budget_loops_per_token,
        exit_trace=exit_trace,
    )
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    guard = generation.StopStrings(stop or [])
    if prompts is not None:
        rows = batching.ROWS if batch is None else batch
        batching.check_rows(rows)
        batching.check_policy(policy)
        check_out(out)
        entries = read_entries(prompts)
    opened = open_stored(model, weights, threads=threads)
    opened.weights.prompt_precision = precision
    refuse_task(opened)
    own_loops = opened.config.total_ut_steps
    decoding = Decoding(opened, wishes, max_new_tokens)
    if decoding.told and not quiet:
        say(decoding.told)
    check_loops(opened, None if decoding.depth == own_loops else decoding.depth)
    ends, warnings = stop_ids(opened.folder, opened.special_tokens, opened.tokenizer)
    for warning in warnings:
        print_warning(warning)
    settings: dict[str, Any] = {"sampling": sampling, "stop_ids": ends, "kv_dtype": cache_dtype}
    if prompts is not None:
        settings |= {
            "policy": policy,
            "rows": rows,
            "threads": threads or batching.useful_threads(opened.weights, rows),
        }
        answers = Answers(opened, entries, stop or [], seed, max(own_loops, decoding.depth))
        together = batching.Batch(opened.weights, answers.requests(max_new_tokens), rule=decoding.rule, **settings)
        run_prompts(answers, together, out, unordered, quiet)
        return
    text = "" if prompt is None else read_prompt(prompt)
    ids = prompt_ids(opened, text)
    tokens = decoding.tokens(
        ids,
        policy,
        bound,
        rng=np.random.default_rng(seed),
        max_new_tokens=max_new_tokens,
        threads=threads or generation.useful_threads(opened.weights),
        **settings,
    )
    written = Written(max(own_loops, decoding.depth))
    if not (as_json or quiet):
        _show_prompt(text)
    decoder = opened.tokenizer.stream()
    try:
        for token in tokens:
            written.add(token, guard.push(decoder.push(token.token_id)), shown=not as_json)
            if guard.found:
                break
        written.end(guard.push(decoder.flush()) + guard.flush(), guard.found, shown=not as_json)
    except KeyboardInterrupt:
        written.end("", False, shown=not as_json)
        if not quiet:
            say(written.summary() + decoding.summary())
        raise
    if not quiet:
        say(written.summary() + decoding.summary())
    if as_json:
        asked = {"model": str(opened.folder), "prompt": text, "prompt_tokens": int(ids.size), "seed": seed}
        asked |= {"q": q, "exit": str(decoding.rule), "loops": written.depth, "kv": policy}
        print_json({**asked, **written.report(opened.tokenizer), **decoding.report()})


def _show_prompt(text: str) -> None:
    """On a terminal the continuation reads on from its prompt; a pipe gets the continuation alone."""
    from rich.text import Text

    from looplm_cli.render import stderr, stdout

    if stdout().is_terminal and stderr().is_terminal:
        stderr().print(Text(text, style="dim"), end="", soft_wrap=True)
