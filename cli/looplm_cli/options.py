"""The options that several commands share: one spelling, one meaning, one range each.

A value outside its range is refused while the command line is read (exit code 2), so no command checks it again.
"""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

# Panels of --help.
MODEL, LOOPS, SAMPLING, TRAINING = "Model", "Loops", "Sampling", "Training"
MACHINE, OUTPUT = "Machine", "Output"


def finite(value: Any) -> Any:
    """Refuse NaN and infinity, which slip through `min` and `max`."""
    for number in value if isinstance(value, list | tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is not a finite number")
    return value


def parse_thresholds(values: list[str]) -> list[float]:
    """Exit thresholds given as `0.5 0.9`, each option value one number or several with commas, in order, once each."""
    found: list[float] = []
    for text in ",".join(values).split(","):
        try:
            number = float(text)
        except ValueError:
            raise typer.BadParameter(f"{text.strip()!r} is not a number; write e.g. 0.5 or 0.3,0.5,0.7") from None
        if not 0.0 <= number <= 1.0:
            raise typer.BadParameter(f"{number:g} is not in the range 0<=q<=1")
        if number not in found:
            found.append(number)
    return found


def parse_exit(value: str | None) -> str | None:
    """An exit rule as `--exit` takes it, RULE:THRESHOLD, or RULE alone where the model's calibrated threshold is meant.

    Raises: UsageError for an unknown rule or a threshold out of its range.
    """
    if value is None:
        return None
    from looplm.errors import UsageError
    from looplm.exits import RULES, make_rule

    name, colon, number = value.partition(":")
    if not colon:
        if name not in RULES or name == "fixed":
            make_rule(name, math.nan)
        return name
    try:
        threshold = float(number)
    except ValueError:
        raise UsageError(
            f"--exit {value!r}: {number!r} is not a number", "write RULE:THRESHOLD, e.g. gate:0.7 or kl:0.01"
        ) from None
    make_rule(name, threshold)
    return value


def parse_exits(values: list[str] | None) -> list[str]:
    """Several of them, in order, once each.  Raises: UsageError as parse_exit."""
    found = [part.strip() for value in values or [] for part in value.split(",")]
    for part in found:
        parse_exit(part)
    return list(dict.fromkeys(found))


def parse_drafts(param: typer.CallbackParam, value: str | None) -> str | None:
    """A whole number above 0, or one of the words that stand beside it in the help."""
    words = (param.metavar or "").split("|")[1:]
    if value is not None and value not in words and not (value.isascii() and value.isdigit() and int(value) > 0):
        raise typer.BadParameter(f"{value!r} is no number above 0; write a number or {' or '.join(words)}")
    return value


CorpusArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CORPUS]...",
        show_default=False,
        help="Text files, folders of .txt and .md, .jsonl with a `text` field, `-` for stdin, or `builtin:NAME`.",
    ),
]
ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        "-m",
        show_default="the most recent run under runs/",
        help="A model folder or a run folder.",
        rich_help_panel=MODEL,
    ),
]
PromptOption = Annotated[
    str | None, typer.Option("--prompt", "-p", show_default=False, help="The text to start from; `-` reads stdin.")
]
QOption = Annotated[
    float | None,
    typer.Option(
        "--q",
        "-q",
        min=0.0,
        max=1.0,
        callback=finite,
        help="Exit threshold: a token stops at the first loop whose exit probabilities add up to q; 1 means all loops.",
        rich_help_panel=LOOPS,
    ),
]
EXIT_HELP = (
    "When a token stops. gate:Q as --q Q; change:E the loop changed the state by less than the share E of its length; "
    "kl:E its prediction by less than E nats; top:P the best token has probability P; margin:M its logit leads by M; "
    "stable:K it is the best since K loops; fixed:R after loop R. RULE alone: as calibrated."
)
ExitOption = Annotated[
    str | None,
    typer.Option(
        "--exit",
        metavar="RULE[:THRESHOLD]",
        show_default=False,
        callback=parse_exit,
        help=EXIT_HELP,
        rich_help_panel=LOOPS,
    ),
]
ExitValuesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--exit",
        metavar="RULE[:THRESHOLD][,...]",
        show_default=False,
        callback=parse_exits,
        help=f"{EXIT_HELP} Give several with commas or by repeating the option.",
        rich_help_panel=LOOPS,
    ),
]
MinLoopsOption = Annotated[
    int,
    typer.Option(
        "--min-loops", min=1, help="Loops a token takes at least, whatever its rule says.", rich_help_panel=LOOPS
    ),
]
QValuesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--q",
        "-q",
        callback=lambda values: parse_thresholds(values) if values else [],
        show_default="0.3,0.5,0.7,0.9 without --exit",
        metavar="Q[,Q...]",
        help="Exit thresholds to measure; give several with commas or by repeating the option.",
        rich_help_panel=LOOPS,
    ),
]
LoopsOption = Annotated[
    int | None,
    typer.Option(
        "--loops",
        min=1,
        show_default="as trained",
        help="How often the stack is applied.",
        rich_help_panel=LOOPS,
    ),
]
DraftLoopsOption = Annotated[
    str | None,
    typer.Option(
        "--draft-loops",
        metavar="R|auto",
        show_default="no drafts",
        callback=parse_drafts,
        help="Draft tokens with the first R loops and check them with all loops together: the same text, sooner where "
        "drafts stand. auto: what is cheapest by acceptance and cost so far.",
        rich_help_panel=LOOPS,
    ),
]
DraftTokensOption = Annotated[
    str | None,
    typer.Option(
        "--draft-tokens",
        metavar="K|flow|auto",
        show_default="auto with --draft-loops",
        callback=parse_drafts,
        help="Tokens drafted between two checks; flow: each is checked while the next ones are drafted.",
        rich_help_panel=LOOPS,
    ),
]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        "--budget-loops-per-token",
        metavar="X",
        min=1.0,
        show_default=False,
        callback=finite,
        help="At most X loops per token on average, at any moment. Without --q and --exit the gate's threshold is "
        "steered so that the budget is used where the gate wants it.",
        rich_help_panel=LOOPS,
    ),
]
MaxMsOption = Annotated[
    float | None,
    typer.Option(
        "--max-ms-per-token",
        metavar="MS",
        min=0.001,
        show_default=False,
        callback=finite,
        help="As deep as MS milliseconds per token allow, by what loops have taken so far; one loop always runs.",
        rich_help_panel=LOOPS,
    ),
]
ExitTraceOption = Annotated[
    Path | None,
    typer.Option(
        "--exit-trace",
        metavar="FILE",
        show_default=False,
        help="Stop after the loops this file lists, one per new token, whatever the gate says.",
        rich_help_panel=LOOPS,
    ),
]
TemperatureOption = Annotated[
    float,
    typer.Option(
        "--temperature",
        "-t",
        min=0.0,
        callback=finite,
        help="Below 1 bolder on what is likely, above 1 wilder; 0 always takes the most likely token.",
        rich_help_panel=SAMPLING,
    ),
]
TopKOption = Annotated[
    int, typer.Option("--top-k", min=0, help="Only the k most likely tokens; 0: all.", rich_help_panel=SAMPLING)
]
TopPOption = Annotated[
    float,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        callback=finite,
        help="Only the most likely tokens that together reach this probability.",
        rich_help_panel=SAMPLING,
    ),
]
MinPOption = Annotated[
    float,
    typer.Option(
        "--min-p",
        min=0.0,
        max=1.0,
        callback=finite,
        help="Only tokens at least this fraction as likely as the most likely one.",
        rich_help_panel=SAMPLING,
    ),
]
RepetitionPenaltyOption = Annotated[
    float,
    typer.Option(
        "--repetition-penalty",
        min=1e-6,
        callback=finite,
        help="Above 1, tokens seen before become less likely.",
        rich_help_panel=SAMPLING,
    ),
]
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="The most tokens to write.")]
CacheOption = Annotated[
    str,
    typer.Option(
        "--cache",
        metavar="POLICY",
        help="Keys and values of loops a token did not run. last-exited: those of its last loop, so loops are "
        "really saved; exact: computed once a later token needs them, nothing is approximated; full: all loops always "
        "run, and stopping only chooses which state is read. One loop's keys and values for all loops, a fraction of "
        "the memory: shared-last, average, first. looplm kv measures them.",
        rich_help_panel=LOOPS,
    ),
]
MaxDeferredOption = Annotated[
    int | None,
    typer.Option(
        "--max-deferred",
        metavar="N",
        show_default="16",
        help="With --cache exact, tokens that may wait for their deeper loops; 1 to 23.",
        rich_help_panel=LOOPS,
    ),
]
KvDtypeOption = Annotated[
    str,
    typer.Option(
        "--kv-dtype",
        metavar="float32|bfloat16",
        help="The type of cached keys and values; bfloat16 takes half the memory.",
        rich_help_panel=MACHINE,
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="float32|bfloat16|int8|int4",
        show_default="as stored",
        help="The format to hold the weights in: shorter ones are read faster; int8 and int4 round.",
        rich_help_panel=MACHINE,
    ),
]
PromptPrecisionOption = Annotated[
    str,
    typer.Option(
        "--prompt-precision",
        metavar="fp32|bf16",
        help="Of a long prompt's products: bf16 rounds what is multiplied, and is quicker where the processor has "
        "bfloat16 dot products. New tokens are always decoded in fp32.",
        rich_help_panel=MACHINE,
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", "-s", min=0, help="Start of every random choice.")]
OutDirOption = Annotated[
    Path | None,
    typer.Option("--out-dir", "-o", show_default="a new folder under runs/", help="The run folder to write."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", show_default=False, help="A YAML file of settings.", rich_help_panel=TRAINING),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        show_default=False,
        help="Change one setting; may be repeated.",
        rich_help_panel=TRAINING,
    ),
]
EncodingOption = Annotated[str, typer.Option("--encoding", help="How the corpus is encoded.")]
ErrorsOption = Annotated[
    str, typer.Option("--errors", help="Bytes that are not text: `strict` stops, `replace` and `ignore` go on.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, show_default="all cores", help="Processor threads to use.", rich_help_panel=MACHINE
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="End with one line of JSON on stdout.", rich_help_panel=OUTPUT)
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.", rich_help_panel=OUTPUT)]
