"""`looplm chat`: a conversation with a model, at a terminal or on a pipe."""

from typing import TYPE_CHECKING, Annotated

import typer

from looplm_cli.options import (
    CacheOption,
    ExitOption,
    JsonOption,
    KvDtypeOption,
    LoopsOption,
    MaxDeferredOption,
    MaxNewTokensOption,
    MinLoopsOption,
    MinPOption,
    ModelOption,
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

if TYPE_CHECKING:
    from looplm.model_files import ModelFiles


def chat(
    model: ModelOption = None,
    system: Annotated[
        str | None,
        typer.Option("--system", show_default="the template's own", help="What the model is told first."),
    ] = None,
    think: Annotated[
        bool | None,
        typer.Option(
            "--think/--no-think",
            show_default="the template's own",
            help="Let it think aloud before it answers, where its chat template knows that.",
        ),
    ] = None,
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
    max_new_tokens: MaxNewTokensOption = 1024,
    cache: CacheOption = "last-exited",
    max_deferred: MaxDeferredOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    weights: WeightsOption = None,
    kv_dtype: KvDtypeOption = "float32",
    prompt_precision: PromptPrecisionOption = "fp32",
    threads: ThreadsOption = None,
) -> None:
    """Talk with a model whose folder has a chat template.

    Each line is a message; what the model has read and written so far is kept, so a turn costs only what is new.
    Ctrl-C stops an answer, Ctrl-D leaves, /help lists what else a line can say: other loops, what they were used for,
    a new beginning. On a pipe, every line is a message and stdout gets the answers alone; --json prints one object for
    each. Needs the extra `chat`.

    [bold]looplm chat -m Ouro-1.4B-Thinking --think --q 0.7[/bold]
    """
    import numpy as np

    from looplm.chat import Conversation
    from looplm.chat_template import ChatTemplate, stop_ids
    from looplm.generation import useful_threads
    from looplm.sampling import Sampling
    from looplm_cli.chat_room import ChatRoom, Manner
    from looplm_cli.inputs import (
        check_loops,
        chosen_rule,
        deferred_bound,
        key_value_policy,
        key_value_type,
        open_stored,
        prompt_products,
        refuse_task,
    )
    from looplm_cli.render import print_warning, say

    policy, cache_dtype = key_value_policy(cache), key_value_type(kv_dtype)
    precision = prompt_products(prompt_precision)
    bound = deferred_bound(policy, max_deferred)
    manner = Manner(
        q=q,
        exit=exit,
        min_loops=min_loops,
        loops=loops,
        policy=policy,
        sampling=Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        ),
        max_new_tokens=max_new_tokens,
        seed=seed,
        think=think,
    )
    templates: list[ChatTemplate] = []

    def accept(files: "ModelFiles") -> None:
        refuse_task(files)
        templates.append(ChatTemplate.of(files.folder, files.special_tokens))
        if think is not None:
            templates[0].check_thinking()

    opened = open_stored(model, weights, accept, threads)
    opened.weights.prompt_precision = precision
    check_loops(opened, loops)
    _, told = chosen_rule(opened, q, exit, loops=loops, min_loops=min_loops)
    if told and not quiet:
        say(told)
    ends, warnings = stop_ids(opened.folder, opened.special_tokens, opened.tokenizer, templates[0])
    for warning in warnings:
        print_warning(warning)
    conversation = Conversation(
        opened.weights,
        opened.tokenizer,
        templates[0],
        ends,
        system=system,
        think=think,
        max_deferred=bound,
        kv_dtype=cache_dtype,
        threads=threads or useful_threads(opened.weights),
    )
    ChatRoom(opened, conversation, manner, np.random.default_rng(seed), as_json=as_json, quiet=quiet).run()
