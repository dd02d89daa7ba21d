"""The room in which a conversation takes place: lines in, answers out, and the commands that begin with a slash."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from looplm.errors import DataError, LoopLMError, UsageError
from looplm_cli.inputs import Opened, check_loops, chosen_rule, named_rule
from looplm_cli.render import exit_histogram, print_error, print_json, print_loops, say, stdout
from looplm_cli.written import Written

if TYPE_CHECKING:
    import numpy as np

    from looplm.cache import Policy
    from looplm.chat import Conversation
    from looplm.exits import ExitRule
    from looplm.sampling import Sampling

PROMPT = "> "


@dataclasses.dataclass
class Manner:
    """How answers are made; what can be changed between two of them."""

    q: float | None
    exit: str | None  # as --exit
    min_loops: int
    loops: int | None
    policy: "Policy"
    sampling: "Sampling"
    max_new_tokens: int
    seed: int
    think: bool | None


class ChatRoom:
    """A conversation at a terminal, where errors and Ctrl-C end a turn, or on a pipe, where they end the program."""

    def __init__(
        self,
        opened: Opened,
        conversation: "Conversation",
        manner: Manner,
        rng: "np.random.Generator",
        *,
        as_json: bool,
        quiet: bool,
    ) -> None:
        self.opened, self.conversation, self.manner, self.rng = opened, conversation, manner, rng
        self.as_json, self.quiet = as_json, quiet
        self.interactive = sys.stdin.isatty()
        self._turns = 0
        self._last: Written | None = None
        self._interrupted = False  # by Ctrl-C, and no line since
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/help": (self._help, "this list"),
            "/q": (self._set_q, "exit threshold, e.g. /q 0.7; alone: the model's own"),
            "/rule": (self._set_rule, "another way to stop, e.g. /rule kl:0.01; alone: the model's own"),
            "/loops": (self._set_loops, "how often the stack is applied, e.g. /loops 3; alone: as trained"),
            "/inspect": (self._inspect, "the loops that each token of the last answer took"),
            "/system": (self._set_system, "another system prompt, e.g. /system Be brief.; alone: the template's own"),
            "/reset": (self._reset, "forget the conversation"),
            "/exit": (lambda rest: None, "leave; so does Ctrl-D"),
        }

    def run(self) -> None:
        """Until the lines end, /exit, or Ctrl-C without an answer under way.

        Raises: on a pipe, the first error; KeyboardInterrupt for a Ctrl-C that leaves.
        """
        if self.interactive and not self.quiet:
            config = self.opened.config
            say(
                f"{self.opened.folder}: {config.num_hidden_layers} layers x {config.total_ut_steps} loops, context "
                f"{config.max_position_embeddings}. /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves."
            )
        for line in self._lines():
            try:
                if line.split()[:1] == ["/exit"]:
                    return
                if line.startswith("/") and not line.startswith("//"):
                    self._command(line)
                elif line.strip():
                    self._answer(line[1:] if line.startswith("//") else line)
            except LoopLMError as error:
                if not self.interactive:
                    raise
                print_error(str(error), error.hint)
            except KeyboardInterrupt:  # while a command was at work
                if not self.interactive:
                    raise
                self._interrupted = True

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                line = _read_line(self.interactive)
            except KeyboardInterrupt:
                if self._interrupted or not self.interactive:
                    raise
                self._interrupted = True
                say("\nCtrl-C once more or Ctrl-D leaves")
                continue
            if line is None:
                return
            self._interrupted = False
            yield line

    # ---- an answer

    @property
    def _rule(self) -> "ExitRule":
        manner = self.manner
        return chosen_rule(self.opened, manner.q, manner.exit, loops=manner.loops, min_loops=manner.min_loops)[0]

    def _answer(self, message: str) -> None:
        manner, rule, own_loops = self.manner, self._rule, self.opened.config.total_ut_steps
        tokens = self.conversation.answer(
            message,
            rule=rule,
            rng=self.rng,
            sampling=manner.sampling,
            max_new_tokens=manner.max_new_tokens,
            policy=manner.policy,
        )
        written = self._last = Written(max(own_loops, rule.deepest(own_loops)))
        decoder, shown = self.opened.tokenizer.stream(special=True), not self.as_json
        interrupted = False
        with contextlib.closing(tokens):  # which puts what was said into the history
            try:
                for token in tokens:
                    ends = token.finish == "stop token"
                    written.add(token, "" if ends else decoder.push(token.token_id), shown)
            except KeyboardInterrupt:
                interrupted = self._interrupted = True
        written.end(decoder.flush(), False, shown)
        self._turns += 1
        if not self.quiet:
            say(written.summary())
        if interrupted and not self.interactive:
            raise KeyboardInterrupt
        if self.as_json:
            self._print_answer(message, written)

    def _print_answer(self, message: str, written: Written) -> None:
        manner = self.manner
        print_json(
            {
                "model": str(self.opened.folder),
                "turn": self._turns,
                "message": message,
                "prompt_tokens": self.conversation.prompt_tokens,
                "cached_tokens": self.conversation.cached_tokens,
                "seed": manner.seed,
                "think": manner.think,
                "q": manner.q,
                "exit": str(self._rule),
                "loops": written.depth,
                "kv": manner.policy,
                **written.report(self.opened.tokenizer),
            }
        )
        sys.stdout.flush()

    # ---- lines that begin with a slash

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise UsageError(
                f"{name} is not a command", "/help lists them; a message that begins with / is written with two: //"
            )
        self._commands[name][0](rest.strip())

    def _help(self, rest: str) -> None:
        for name, (_, meaning) in self._commands.items():
            say(f"{name:10}{meaning}")
        say("//...     a message that begins with a slash")

    def _set_q(self, text: str) -> None:
        wrong = UsageError(f"/q {text}: not a number from 0 to 1", "write e.g. /q 0.7; 1 means all loops")
        try:
            q = float(text) if text else None
        except ValueError:
            raise wrong from None
        if q is not None and not 0.0 <= q <= 1.0:
            raise wrong
        self.manner.q, self.manner.exit = q, None
        self._tell_loops()

    def _set_rule(self, text: str) -> None:
        if text:
            named_rule(self.opened, text)  # which refuses what is no rule
        self.manner.q, self.manner.exit = None, text or None
        self._tell_loops()

    def _set_loops(self, text: str) -> None:
        wrong = UsageError(f"/loops {text}: not a number of loops", "write e.g. /loops 3")
        try:
            loops = int(text) if text else None
        except ValueError:
            raise wrong from None
        if loops is not None and loops < 1:
            raise wrong
        check_loops(self.opened, loops)
        self.manner.loops = loops
        self._tell_loops()

    def _tell_loops(self) -> None:
        self._say(f"stopping by {self._rule}")

    def _inspect(self, rest: str) -> None:
        if self._last is None or not self._last.tokens:
            raise UsageError("there is no answer yet", "ask something first")
        written = self._last
        text = self.opened.tokenizer.token_text
        print_loops([(text(token.token_id), token.exit_loop + 1) for token in written.tokens], written.depth)
        stdout().print(f"read after loop {exit_histogram(written.exits)}", soft_wrap=True)

    def _set_system(self, text: str) -> None:
        self.conversation.system = text or None
        self._say("system prompt set" if text else "system prompt: the template's own")

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        self._last = None
        self._say("forgotten")

    def _say(self, text: str) -> None:
        if not self.quiet:
            say(text)


def _read_line(interactive: bool) -> str | None:
    """The next line, None at the end.  Raises: DataError if it is not UTF-8."""
    if interactive and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # line editing and history for input()
        try:
            return input(PROMPT)
        except EOFError:
            sys.stdout.write("\n")
            return None
    if interactive:
        sys.stderr.write(PROMPT)
        sys.stderr.flush()
    raw = sys.stdin.buffer.readline()
    try:
        return raw.decode("utf-8").rstrip("\r\n") if raw else None
    except UnicodeDecodeError as error:
        seen = f"byte 0x{raw[error.start]:02x} at offset {error.start} of its line"
        raise DataError(f"standard input is not UTF-8: {seen}", "convert it first, e.g. with iconv") from error
