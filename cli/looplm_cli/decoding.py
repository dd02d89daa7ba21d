"""How `looplm generate` decodes: what is asked about drafts, pace and exits, checked, and accounted for afterwards."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looplm.errors import UsageError
from looplm_cli.inputs import Opened, check_min_loops, chosen_rule

if TYPE_CHECKING:
    from looplm.arrays import Ints
    from looplm.cache import Policy
    from looplm.draft_plans import DraftAccount, Drafts
    from looplm.exits import ExitRule
    from looplm.generation import Generated
    from looplm.pacing import Pacer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the command line asks for; None: nothing.  Raises: UsageError for options that exclude each other."""

    q: float | None = None
    exit: str | None = None
    min_loops: int = 1
    loops: int | None = None
    cache: "Policy" = "last-exited"
    draft_loops: str | None = None
    draft_tokens: str | None = None
    budget_loops_per_token: float | None = None
    max_ms_per_token: float | None = None
    exit_trace: Path | None = None

    def __post_init__(self) -> None:
        drafts = self._given("draft_loops", "draft_tokens")
        trace, paces = self._given("exit_trace"), self._given("budget_loops_per_token", "max_ms_per_token")
        early = self._given("exit", "q")
        limits = trace + paces + [text for text in early if text != "--q 1"]
        if drafts and limits:
            raise UsageError(
                f"{drafts[0]} and {limits[0]} exclude each other: drafts are checked against the full depth",
                "leave one out; --loops says what the full depth is",
            )
        if len(paces) == 2:
            raise UsageError(f"{paces[0]} and {paces[1]} both say what may be spent", "give one of them")
        if trace and paces + early:
            raise UsageError(f"{trace[0]} and {(paces + early)[0]} both say when to stop", "give one of them")
        if drafts and self.cache not in ("last-exited", "full"):
            raise UsageError(
                f"{drafts[0]} and --cache {self.cache} exclude each other: drafts keep what all loops compute",
                "leave one out",
            )
        if paces and self.cache in ("full", "exact"):
            raise UsageError(
                f"{paces[0]} cannot be kept with --cache {self.cache}: all loops run there, if later",
                "leave --cache out",
            )
        if self.budget_loops_per_token is not None and self.budget_loops_per_token < self.min_loops:
            raise UsageError(f"{paces[0]} is less than --min-loops {self.min_loops}", "allow at least as many")

    def _given(self, *names: str) -> list[str]:
        """Of these options those that are given, as they are written."""
        values = [(name.replace("_", "-"), getattr(self, name)) for name in names]
        return [
            f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"
            for name, value in values
            if value is not None
        ]


class Decoding:
    """A way to decode: `rule` and `depth`, `told` (a line to say before), then the tokens and what they took."""

    def __init__(self, opened: Opened, wishes: Wishes, new_tokens: int) -> None:
        """Raises: UsageError or DataError for what the model cannot do, or an exit trace that cannot be used."""
        from looplm.draft_plans import DraftAccount

        own = opened.config.total_ut_steps
        if wishes.loops is None:
            check_min_loops(wishes.min_loops, own)
        self._weights, self.told = opened.weights, ""
        self.drafts, self.account = _drafts(wishes, wishes.loops or own), DraftAccount()
        self.pacer: Pacer | None = None
        if wishes.exit_trace is not None or self.drafts:
            self.rule = _fixed_rule(wishes, new_tokens)
        elif wishes.budget_loops_per_token is None and wishes.max_ms_per_token is None:
            self.rule, self.told = chosen_rule(
                opened, wishes.q, wishes.exit, loops=wishes.loops, min_loops=wishes.min_loops
            )
        else:
            self.rule, self.pacer, self.told = _paced_rule(opened, wishes)
        self.depth = self.rule.deepest(own)

    def tokens(self, prompt_ids: "Ints", policy: "Policy", max_deferred: int, **settings: Any) -> "Iterator[Generated]":
        """prompt_ids: S; the rest as for looplm.generation.generate."""
        from looplm import drafting, generation

        if self.drafts is None:
            settings |= {"rule": self.rule, "policy": policy, "max_deferred": max_deferred}
            return generation.generate(self._weights, prompt_ids, **settings)
        settings |= {"loops": self.depth, "account": self.account}
        return drafting.generate_drafted(self._weights, prompt_ids, self.drafts, **settings)

    def summary(self) -> str:
        """Lines to add to the account of the text, each after a newline."""
        lines = [draft_summary(self.account)] if self.drafts else []
        return "".join(f"\n{line}" for line in [*lines, *([pace_summary(self.pacer)] if self.pacer else [])])

    def report(self) -> dict[str, Any]:
        """What --json tells of it."""
        return {
            "drafts": draft_report(self.account) if self.drafts else None,
            "pace": pace_report(self.pacer) if self.pacer else None,
        }


def _drafts(wishes: Wishes, full: int) -> "Drafts | None":
    """The drafts asked for, None for none.  Raises: UsageError for drafts that a full depth cannot check."""
    from looplm.draft_plans import FLOW, Drafts

    if wishes.draft_loops is None and wishes.draft_tokens is None:
        return None
    loops, tokens = ("auto" if text is None else text for text in (wishes.draft_loops, wishes.draft_tokens))
    length = FLOW if tokens == FLOW else None if tokens == "auto" else int(tokens)
    drafts = Drafts(None if loops == "auto" else int(loops), length)
    drafts.depths(full)
    return drafts


def _fixed_rule(wishes: Wishes, new_tokens: int) -> "ExitRule":
    """The full depth, whatever is calibrated; or what an exit trace says."""
    from looplm.exit_trace import read_exit_trace
    from looplm.exits import LearnedGate, choose_rule

    rule = LearnedGate(1.0) if wishes.exit_trace is None else read_exit_trace(wishes.exit_trace, new_tokens)
    return choose_rule(rule, wishes.loops, rule, wishes.min_loops)


def _paced_rule(opened: Opened, wishes: Wishes) -> "tuple[ExitRule, Pacer, str]":
    """A budget or a time limit around the rule asked for; a budget alone steers the gate."""
    from looplm.exits import choose_rule
    from looplm.pacing import LoopBudget, TimeLimit

    inner, told = chosen_rule(opened, wishes.q, wishes.exit, loops=None, min_loops=1)
    if wishes.max_ms_per_token is not None:
        pacer: Pacer = TimeLimit(wishes.max_ms_per_token, inner)
    else:
        steered = wishes.q is None and wishes.exit is None
        told = "" if steered else told
        pacer = LoopBudget(wishes.budget_loops_per_token or 1.0, None if steered else inner)
    return choose_rule(pacer, wishes.loops, pacer, wishes.min_loops), pacer, told


def draft_summary(account: "DraftAccount") -> str:
    """What drafting gave, in a line."""
    if not account.rounds:
        return "drafts: none, the text ended with its first token"
    loops, tokens = max(account.choices, key=lambda choice: account.choices[choice])
    mostly = "mostly " if len(account.choices) > 1 else ""
    stood = "" if account.acceptance is None else f", {100 * account.acceptance:.0f} % stood"
    line = f"drafts: {mostly}{tokens} of {loops} loops{stood}; {account.tokens_per_round:.2f} tokens a round"
    if account.speedup is None:
        return line
    loses = ", so drafting loses here" if account.speedup < 1.0 else ""
    return f"{line}; {account.speedup:.2f} x the speed of full decoding, by the cost of its passes{loses}"


def draft_report(account: "DraftAccount") -> dict[str, Any]:
    """The same as an object."""
    timed = {
        "token": account.new_tokens,
        "single_pass": account.single_pass,
        "further_row": account.further_row,
        "draft": account.choice,
        "check": account.check,
    }
    return {
        "rounds": account.rounds,
        "drafted": account.drafted,
        "accepted": account.accepted,
        "acceptance": None if account.acceptance is None else round(account.acceptance, 4),
        "tokens_per_round": round(account.tokens_per_round, 3),
        "speedup": None if account.speedup is None else round(account.speedup, 3),
        "choices": [
            {"loops": loops, "tokens": tokens, "rounds": rounds}
            for (loops, tokens), rounds in sorted(account.choices.items(), key=str)
        ],
        "ms": {name: round(1e3 * what.mean, 4) for name, what in timed.items()},
    }


def pace_report(pacer: "Pacer") -> dict[str, Any]:
    """What was allowed, and what was reached."""
    from looplm.pacing import LoopBudget, TimeLimit

    mean = None if pacer.mean_loops is None else round(pacer.mean_loops, 4)
    found: dict[str, Any] = {"tokens": pacer.tokens, "mean_loops": mean}
    if isinstance(pacer, LoopBudget):
        found |= {"budget_loops_per_token": pacer.budget}
    if isinstance(pacer, TimeLimit):
        spent = sorted(pacer.spent)
        found |= {
            "max_ms_per_token": pacer.milliseconds,
            "median_ms": round(spent[len(spent) // 2], 4) if spent else None,
            "most_ms": round(spent[-1], 4) if spent else None,
            "within": round(sum(ms <= pacer.milliseconds for ms in spent) / len(spent), 4) if spent else None,
        }
    return found


def pace_summary(pacer: "Pacer") -> str:
    """The same in a line."""
    found = pace_report(pacer)
    if not pacer.tokens:
        return "pace: the text ended with its first token"
    loops = f"{found['mean_loops']:.2f} loops a token over {pacer.tokens} tokens"
    if "budget_loops_per_token" in found:
        return f"pace: {loops}, {found['budget_loops_per_token']:g} allowed"
    return (
        f"pace: {100 * found['within']:.0f} % of tokens within {found['max_ms_per_token']:g} ms, "
        f"median {found['median_ms']:.2f}, longest {found['most_ms']:.2f}; {loops}"
    )
