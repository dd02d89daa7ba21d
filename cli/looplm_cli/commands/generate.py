"""`looplm generate`: continue a prompt, and say afterwards what the loops cost."""

from typing import TYPE_CHECKING, Annotated

import typer

from looplm_cli.options import (
    BudgetOption,
    DraftLoopsOption,
    DraftTokensOption,
    ExitOption,
    ExitTraceOption,
    JsonOption,
    KvDtypeOption,
    KvOption,
    LoopsOption,
    MaxMsOption,
    MaxNewTokensOption,
    MinLoopsOption,
    MinPOption,
    ModelOption,
    PromptOption,
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

if TYPE_CHECKING:
    from looplm.arrays import Ints
    from looplm_cli.inputs import Opened


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
    kv: KvOption = "last-exited",
    draft_loops: DraftLoopsOption = None,
    draft_tokens: DraftTokensOption = None,
    budget_loops_per_token: BudgetOption = None,
    max_ms_per_token: MaxMsOption = None,
    exit_trace: ExitTraceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    weights: WeightsOption = None,
    kv_dtype: KvDtypeOption = "float32",
    threads: ThreadsOption = None,
) -> None:
    """Continue a prompt, looping only as often as each token needs.

    The text goes to stdout as it is written; afterwards stderr tells how many loops the tokens took. With --q, a token
    stops at the first loop whose exit probabilities add up to q; --exit names other rules. Without either it is what
    looplm calibrate stored, or else the model's own threshold, usually 1: all loops. --loops alone is a fixed depth,
    with a rule the most loops a token may take. The prompt itself always runs all loops. Without a prompt the model
    starts a new document.

    [bold]looplm generate -p "The with statement" --q 0.7 -n 200[/bold]

    With --draft-loops, the first loops draft tokens and all loops check them: the text is that of full depth, to the
    last bit where it is greedy, and in distribution where it is sampled (a seed then fixes it only for given R and K).
    """
    import numpy as np

    from looplm import generation
    from looplm.chat_template import stop_ids
    from looplm.sampling import Sampling
    from looplm_cli.decoding import Decoding, Wishes
    from looplm_cli.inputs import (
        check_loops,
        key_value_policy,
        key_value_type,
        open_stored,
        read_prompt,
        refuse_task,
    )
    from looplm_cli.render import print_json, print_warning, say
    from looplm_cli.written import Written

    policy, cache_dtype = key_value_policy(kv), key_value_type(kv_dtype)
    wishes = Wishes(
        q=q,
        exit=exit,
        min_loops=min_loops,
        loops=loops,
        kv=kv,
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
    opened = open_stored(model, weights)
    refuse_task(opened)
    text = "" if prompt is None else read_prompt(prompt)
    prompt_ids = _prompt_ids(opened, text)
    own_loops = opened.config.total_ut_steps
    decoding = Decoding(opened, wishes, max_new_tokens)
    if decoding.told and not quiet:
        say(decoding.told)
    check_loops(opened, None if decoding.depth == own_loops else decoding.depth)
    ends, warnings = stop_ids(opened.folder, opened.special_tokens, opened.tokenizer)
    for warning in warnings:
        print_warning(warning)
    tokens = decoding.tokens(
        prompt_ids,
        policy,
        rng=np.random.default_rng(seed),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop_ids=ends,
        kv_dtype=cache_dtype,
        threads=threads or generation.useful_threads(opened.weights),
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
        settings = {"model": str(opened.folder), "prompt": text, "prompt_tokens": int(prompt_ids.size), "seed": seed}
        settings |= {"q": q, "exit": str(decoding.rule), "loops": written.depth, "kv": kv}
        print_json({**settings, **written.report(opened.tokenizer), **decoding.report()})


def _prompt_ids(opened: "Opened", text: str) -> "Ints":
    """Token ids of the prompt; of an empty one, the token that begins a document."""
    import numpy as np

    from looplm.errors import DataError

    if text:
        return opened.tokenizer.encode(text)
    begin = opened.config.bos_token_id if opened.tokenizer.bos_id is None else opened.tokenizer.bos_id
    if begin is None:
        raise DataError("this model has no token that begins a document", "give it a text to continue with -p")
    return np.array([begin], np.int64)


def _show_prompt(text: str) -> None:
    """On a terminal the continuation reads on from its prompt; a pipe gets the continuation alone."""
    from rich.text import Text

    from looplm_cli.render import stderr, stdout

    if stdout().is_terminal and stderr().is_terminal:
        stderr().print(Text(text, style="dim"), end="", soft_wrap=True)
