"""What a model writes while it is shown, and what it cost: the account after every text and answer."""

import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from looplm.generation import Generated
    from looplm.text import Tokenizer

UNTIMED = 2  # the prompt's token, and the one whose pass loads the kernels of decoding


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

        rate = ""
        if self.tokens_per_s:
            ready = self.moments[UNTIMED] - self.moments[0]
            rate = f": {ready:.1f} s to the first two, then {self.tokens_per_s:,.1f} tokens/s"
        return (
            f"{len(self.tokens)} tokens in {self.moments[-1] - self.moments[0]:.1f} s{rate} ({self.finish})\n"
            f"loops {self.mean_loops:.2f} of {self.depth} on average, {100 * self.loops_saved:.0f} % saved; "
            f"read after loop {exit_histogram(self.exits)}"
        )

    def account(self) -> dict[str, Any]:
        """The text and its loops, as every run gives them again."""
        return {
            "text": self.text,
            "finish": self.finish,
            "tokens": len(self.tokens),
            "mean_loops": round(self.mean_loops, 4),
            "loops_saved": round(self.loops_saved, 4),
            "exits": [round(share, 4) for share in self.exits],
        }

    def report(self, tokenizer: "Tokenizer") -> dict[str, Any]:
        """What --json tells of it; loops counted from 1."""
        return {
            **self.account(),
            "seconds": round(self.moments[-1] - self.moments[0], 4),
            "prompt_seconds": round(self.moments[1] - self.moments[0], 4),
            "tokens_per_s": None if self.tokens_per_s is None else round(self.tokens_per_s, 2),
            "generated": [
                {
                    "id": token.token_id,
                    "token": tokenizer.token_text(token.token_id),
                    "exit_loop": token.exit_loop + 1,
                    "loops_run": token.loops_run,
                    "logprob": round(token.logprob, 5),
                }
                for token in self.tokens
            ],
        }
