"""How to draft, what it costs, and which way is cheapest: the part of drafting that runs no loops."""

import dataclasses
import statistics
from collections import deque
from typing import Literal

from .errors import UsageError
from .kernels.product.stored import FEW_ROWS

MOST_DRAFTS = FEW_ROWS - 1  # with the token before them they must be few rows: more are rounded in another way
AUTOMATIC_DRAFTS = 8  # the most that are chosen automatically
MEMORY = 0.98  # what a round's evidence is still worth a round later, when drafts are chosen automatically
LONG_FLOW = 64  # tokens that a flow is thought to last at most
KEPT = 4  # rounds that a choice holds
REMEMBERED = 32  # times that a median is taken over


Length = int | Literal["flow"]
FLOW: Literal["flow"] = "flow"  # every draft is checked while the next ones are made


@dataclasses.dataclass(frozen=True)
class Drafts:
    """How to draft; None: chosen while running.  Raises: UsageError for numbers that cannot be."""

    loops: int | None = None  # that a draft runs
    tokens: Length | None = None  # drafted between two checks

    def __post_init__(self) -> None:
        if self.loops is not None and self.loops < 1:
            raise UsageError(f"drafts of {self.loops} loops cannot be", "a draft runs at least 1 loop")
        if isinstance(self.tokens, int) and not 1 <= self.tokens <= MOST_DRAFTS:
            raise UsageError(
                f"{self.tokens} drafted tokens cannot be checked together", f"draft between 1 and {MOST_DRAFTS} tokens"
            )

    def depths(self, full: int) -> list[int]:
        """The loops that a draft may run before `full` check it.  Raises: UsageError if they are not fewer."""
        if full < 2 or (self.loops or 1) >= full:
            raise UsageError(
                f"drafts of {self.loops or 1} loops cannot be checked by a full depth of {full}",
                f"draft with 1 to {full - 1} loops" if full > 1 else "a model of one loop has nothing to draft with",
            )
        return [self.loops] if self.loops else list(range(1, full))


@dataclasses.dataclass
class Timed:
    """Something done several times, and what it took in all; `typical` forgives the times that other work took."""

    seconds: float = 0.0
    count: int = 0
    recent: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def add(self, seconds: float, count: int = 1) -> None:
        self.seconds += seconds
        self.count += count
        self.recent.append(seconds / count)

    @property
    def mean(self) -> float:
        return self.seconds / self.count if self.count else 0.0

    @property
    def typical(self) -> float:
        """Median of the recent ones."""
        return statistics.median(self.recent) if self.recent else 0.0


@dataclasses.dataclass
class DraftAccount:
    """What drafting did and what it cost; the times leave out the first passes, which load kernels."""

    full: int = 0  # loops
    rounds: int = 0
    drafted: int = 0
    judged: int = 0  # those behind a replaced draft are not
    accepted: int = 0
    tokens: int = 0
    choices: dict[tuple[int, Length], int] = dataclasses.field(default_factory=dict)  # (loops, tokens): rounds
    new_tokens: Timed = dataclasses.field(default_factory=Timed)  # everything: whole rounds, per token they gave
    single_pass: Timed = dataclasses.field(default_factory=Timed)  # one loop of one position
    further_row: Timed = dataclasses.field(default_factory=Timed)  # what another position adds to such a pass
    choice: Timed = dataclasses.field(default_factory=Timed)  # head and choice of one draft
    check: Timed = dataclasses.field(default_factory=Timed)  # head and choice by the full depth, per position

    def begin_round(self, loops: int, length: Length) -> None:
        """Count a round, and how it drafts."""
        self.rounds += 1
        self.choices[loops, length] = self.choices.get((loops, length), 0) + 1

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that stood."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float:
        return self.tokens / max(1, self.rounds)

    @property
    def speedup(self) -> float | None:
        """Time of a token in full decoding, by the cost of its passes here, over what one took; None if not known."""
        if not self.new_tokens.count or not self.single_pass.count:
            return None
        return (self.full * self.single_pass.mean + self.check.mean) / self.new_tokens.mean


class Planner:
    """How deep and how far to draft: what is cheapest per expected token, by acceptance and cost so far.

    Drafting k tokens that each stand with chance a gives 1 + a + ... + a^k tokens a round.  The chance of a depth is
    that of its drafts so far, and one success more: what was not tried is thought well of, and so are, since evidence
    fades, depths that failed long ago.  Not to draft at all is one of the choices.
    """

    def __init__(self, drafts: Drafts, full: int, account: DraftAccount) -> None:
        self._full, self._account = full, account
        lengths: list[Length] = [drafts.tokens] if drafts.tokens else [FLOW, *range(AUTOMATIC_DRAFTS + 1)]
        self._choices = [(loops, count) for loops in drafts.depths(full) for count in lengths]
        self._stood = dict.fromkeys(drafts.depths(full), 0.0)
        self._judged = dict.fromkeys(drafts.depths(full), 0.0)
        self._rounds, self._chosen = 0, self._choices[0]
        self._known = (0, 0)  # judged and accepted when the last round began

    def choose(self) -> tuple[int, Length]:
        """Loops and tokens of the next round, after what came of the last."""
        known = (self._account.judged, self._account.accepted)
        self._learn(self._chosen[0], known[0] - self._known[0], known[1] - self._known[1])
        self._known = known
        if len(self._choices) > 1 and self._rounds % KEPT == 0:
            self._chosen = self._cheapest()
        self._rounds += 1
        return self._chosen

    def _learn(self, loops: int, judged: int, stood: int) -> None:
        """So many drafts were judged, and so many of them stood."""
        for depth in self._judged:
            self._judged[depth] *= MEMORY
            self._stood[depth] *= MEMORY
        self._judged[loops] += judged
        self._stood[loops] += stood

    def _cheapest(self) -> tuple[int, Length]:
        """By seconds per expected token; as long as nothing is timed, by passes."""
        account, full = self._account, self._full
        single, further = account.single_pass.typical or 1.0, max(0.0, account.further_row.typical)
        draft, check = account.choice.typical, account.check.typical

        def cost(choice: tuple[int, Length]) -> float:
            loops, count = choice
            chance = (self._stood[loops] + 1.0) / (self._judged[loops] + 1.0)
            if isinstance(count, str):
                drafts = checks = tokens = min(LONG_FLOW, 1.0 / max(1e-9, 1.0 - chance))
                passes = loops * (tokens - 1.0) + full
                rows = tokens * full + (full - loops) * full / loops / 2.0  # and those begun in vain
            else:
                tokens = sum(chance**i for i in range(count + 1))
                passes = loops * (count + 1) + full - loops
                rows = full * (count + 1)
                drafts, checks = count, count + 1
            seconds = passes * single + (rows - passes) * further + drafts * draft + checks * check
            return seconds / tokens

        return min(self._choices, key=cost)
