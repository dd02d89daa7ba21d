"""`looplm generate`: continue a prompt, and say afterwards what the loops cost."""

import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from looplm_cli.options import (
    LOOPS,
    MODEL,
    SAMPLING,
    ExitOption,
    JsonOption,
    LoopsOption,
    MinLoopsOption,
    ModelOption,
    PromptOption,
    QOption,
    QuietOption,
    SeedOption,
    finite,
)

if TYPE_CHECKING:
    from looplm.arrays import Ints
    from looplm.generation import Generated
    from looplm_cli.inputs import Opened

UNTIMED = 2  # the prompt's token, and the one whose pass loads the kernels of decoding


def generate(
    model: ModelOption = None,
    prompt: PromptOption = None,
    q: QOption = None,
    exit: ExitOption = None,
    min_loops: MinLoopsOption = 1,
    loops: LoopsOption = None,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            "-t",
            min=0.0,
            callback=finite,
            help="Below 1 bolder on what is likely, above 1 wilder; 0 always takes the most likely token.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="Only the k most likely tokens; 0: all.", rich_help_panel=SAMPLING)
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            min=0.0,
            max=1.0,
            callback=finite,
            help="Only the most likely tokens that together reach this probability.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p",
            min=0.0,
            max=1.0,
            callback=finite,
            help="Only tokens at least this fraction as likely as the most likely one.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            "--repetition-penalty",
            min=1e-6,
            callback=finite,
            help="Above 1, tokens seen before become less likely.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0,
    seed: SeedOption = 0,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="The most tokens to write.")
    ] = 128,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", show_default=False, help="End before this text; may be repeated."),
    ] = None,
    kv: Annotated[
        str,
        typer.Option(
            "--kv",
            metavar="last-exited|full",
            help="Keys and values of loops a token did not run. last-exited: those of its last loop, so loops are "
            "really saved; full: all loops always run, and stopping only chooses which state is read.",
            rich_help_panel=LOOPS,
        ),
    ] = "last-exited",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    threads: Annotated[
        int,
        typer.Option(
            "--threads",
            min=1,
            help="Processor threads for a matrix product; more than one pays only for large models.",
            rich_help_panel=MODEL,
        ),
    ] = 1,
) -> None:
    """Continue a prompt, looping only as often as each token needs.

    The text goes to stdout as it is written; afterwards stderr tells how many loops the tokens took. With --q, a token
    stops at the first loop whose exit probabilities add up to q; --exit names other rules. Without either it is what
    looplm calibrate stored, or else the model's own threshold, usually 1: all loops. --loops alone is a fixed depth,
    with a rule the most loops a token may take. The prompt itself always runs all loops. Without a prompt the model
    starts a new document.

    [bold]looplm generate -p "The with statement" --q 0.7 -n 200[/bold]
    """
    import numpy as np

    from looplm import generation
    from looplm.cache import POLICIES
    from looplm.errors import UsageError
    from looplm.exits import LearnedGate
    from looplm.kernels.product.blas import limit_blas_threads
    from looplm.sampling import Sampling
    from looplm_cli.inputs import check_loops, default_rule, exit_rule, open_model, read_prompt
    from looplm_cli.render import print_json, say

    policy = next((known for known in POLICIES if known == kv), None)
    if policy is None:
        raise UsageError(f"--kv {kv!r} is not known", "use last-exited or full")
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    guard = generation.StopStrings(stop or [])
    opened = open_model(model)
    _refuse_task(opened)
    text = "" if prompt is None else read_prompt(prompt)
    prompt_ids = _prompt_ids(opened, text)
    limit_blas_threads(threads)
    own_loops = opened.config.total_ut_steps
    rule = exit_rule(opened, q, exit, loops=loops, min_loops=min_loops)
    if rule is None:
        rule, told = default_rule(opened)
        if rule is not None and not quiet:
            say(told)
    rule = rule or LearnedGate(opened.config.early_exit_threshold)
    check_loops(opened, None if rule.deepest(own_loops) == own_loops else rule.deepest(own_loops))
    ends = (opened.config.eos_token_id, opened.tokenizer.eos_id)
    tokens = generation.generate(
        opened.weights,
        prompt_ids,
        rule=rule,
        rng=np.random.default_rng(seed),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop_ids={token_id for token_id in ends if token_id is not None},
        policy=policy,
    )
    written = Written(max(own_loops, rule.deepest(own_loops)))
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
            say(written.summary())
        raise
    if not quiet:
        say(written.summary())
    if as_json:
        settings = {"model": str(opened.folder), "prompt": text, "prompt_tokens": int(prompt_ids.size), "seed": seed}
        print_json({**settings, "q": q, "exit": str(rule), "loops": written.depth, "kv": kv, **written.report(opened)})


@dataclasses.dataclass
class Written:
    """The text so far and what it cost."""

    depth: int  # what loops are counted against: the model's own number, or more if asked for
    text: str = ""
    finish: str = "interrupted"
    tokens: "list[Generated]" = dataclasses.field(default_factory=list)
    moments: list[float] = dataclasses.field(default_factory=lambda: [time.perf_counter()])  # start, then each token

    def add(self, token: "Generated", text: str, shown: bool) -> None:
        self.tokens.append(token)
        self.moments.append(time.perf_counter())
        self._write(text, shown)

    def end(self, text: str, stopped: bool, shown: bool) -> None:
        """The rest of the text, and a newline where it lacks one."""
        self._write(text, shown)
        if stopped:
            self.finish = "stop string"
        elif self.tokens:
            self.finish = self.tokens[-1].finish or self.finish
        if shown and not self.text.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()

    def _write(self, text: str, shown: bool) -> None:
        self.text += text
        if shown and text:
            sys.stdout.write(text)
            sys.stdout.flush()

    @property
    def tokens_per_s(self) -> float | None:
        """Speed of decoding, once it is running."""
        timed = len(self.tokens) - UNTIMED
        return timed / (self.moments[-1] - self.moments[UNTIMED]) if timed > 0 else None

    @property
    def mean_loops(self) -> float:
        """Loops that really ran, per token."""
        return sum(token.loops_run for token in self.tokens) / max(1, len(self.tokens))

    @property
    def loops_saved(self) -> float:
        return 1.0 - self.mean_loops / self.depth

    @property
    def exits(self) -> list[float]:
        """Share of tokens read after each loop."""
        read = [token.exit_loop for token in self.tokens]
        return [read.count(r) / max(1, len(read)) for r in range(self.depth)]

    def summary(self) -> str:
        from looplm_cli.render import exit_histogram

        rate = f", {self.tokens_per_s:,.1f} tokens/s" if self.tokens_per_s else ""
        return (
            f"{len(self.tokens)} tokens in {self.moments[-1] - self.moments[0]:.1f} s{rate} ({self.finish})\n"
            f"loops {self.mean_loops:.2f} of {self.depth} on average, {100 * self.loops_saved:.0f} % saved; "
            f"read after loop {exit_histogram(self.exits)}"
        )

    def report(self, opened: "Opened") -> dict[str, Any]:
        """What --json tells of it; loops counted from 1."""
        return {
            "text": self.text,
            "finish": self.finish,
            "tokens": len(self.tokens),
            "seconds": round(self.moments[-1] - self.moments[0], 4),
            "prompt_seconds": round(self.moments[1] - self.moments[0], 4),
            "tokens_per_s": None if self.tokens_per_s is None else round(self.tokens_per_s, 2),
            "mean_loops": round(self.mean_loops, 4),
            "loops_saved": round(self.loops_saved, 4),
            "exits": [round(share, 4) for share in self.exits],
            "generated": [
                {
                    "id": token.token_id,
                    "token": opened.tokenizer.token_text(token.token_id),
                    "exit_loop": token.exit_loop + 1,
                    "loops_run": token.loops_run,
                    "logprob": round(token.logprob, 5),
                }
                for token in self.tokens
            ],
        }


def _refuse_task(opened: "Opened") -> None:
    from looplm.errors import DataError

    if opened.task != "text":
        raise DataError(
            f"{opened.folder} was trained on the task {opened.task!r}: it is not a language model",
            f"look at its answers with: looplm inspect -m {opened.folder}",
        )


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
