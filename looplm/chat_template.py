"""The chat template of a model folder: from messages to the text that the model is to continue.

A template is a small program that comes with the folder, so it is rendered in a process of its own, sandboxed and
limited in time and memory (template_worker.py).  It also tells what ends a turn, which the folder's other files do not
always agree with.  Needs jinja2, the extra `chat`.
"""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import CheckpointError, DataError, LoopLMError, UsageError
from .special_tokens import TEMPLATE_FILE, TOKENIZER_CONFIG, SpecialTokens, named
from .text import Tokenizer

WORKER = pathlib.Path(__file__).with_name("template_worker.py")
PATIENCE = 10.0  # seconds; a template takes milliseconds, its process a tenth of a second
THINKING = "enable_thinking"
MARK = "LOOPLM"  # stands for an answer whose end is looked for; a plain word, which no template treats in its own way

Message = Mapping[str, str]  # role (system, user or assistant) and content


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template that has been rendered once, so that it is known to work."""

    where: str  # the file it comes from, for messages
    source: str
    texts: Mapping[str, str]  # bos_token, eos_token, ...
    knows_thinking: bool
    after_answer: str  # what it writes behind an answer

    @classmethod
    def of(cls, folder: pathlib.Path, special: SpecialTokens) -> "ChatTemplate":
        """The folder's template.

        Raises: CheckpointError if it has none; UsageError without jinja2; DataError for a template that fails.
        """
        if special.chat_template is None:
            raise CheckpointError(
                f"{folder} has no chat template, neither in {TOKENIZER_CONFIG} nor as {TEMPLATE_FILE}",
                "it was not made for chatting: continue a text with looplm generate, or add its template",
            )
        where = str(folder / special.template_file)
        probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        context = {**special.texts, "messages": probe, "add_generation_prompt": False}
        found = _render(where, special.chat_template, context)
        text: str = found["text"]
        return cls(
            where, special.chat_template, special.texts, THINKING in found["variables"], text.rpartition(MARK)[2]
        )

    def prompt(self, messages: Sequence[Message], think: bool | None = None) -> str:
        """The text up to where an answer begins.  `think` None leaves the template to its own choice.

        Raises: UsageError if the template does not know thinking; DataError if it fails.
        """
        context: dict[str, Any] = {**self.texts, "messages": list(messages), "add_generation_prompt": True}
        if think is not None:
            self.check_thinking()
            context[THINKING] = think
        text: str = _render(self.where, self.source, context)["text"]
        return text

    def check_thinking(self) -> None:
        """Raises: UsageError if the template has no switch for thinking."""
        if not self.knows_thinking:
            raise UsageError(
                f"{self.where}: this chat template does not know {THINKING}", "leave out --think and --no-think"
            )

    def turn_end(self, tokenizer: Tokenizer) -> int | None:
        """The special token that ends a turn, None if the template ends it with plain text."""
        after = self.after_answer.lstrip()
        spelled = [token for token in tokenizer.special_tokens if after.startswith(token)]
        return tokenizer.special_tokens[max(spelled, key=len)] if spelled else None


def stop_ids(
    folder: pathlib.Path, special: SpecialTokens, tokenizer: Tokenizer, template: ChatTemplate | None = None
) -> tuple[frozenset[int], list[str]]:
    """The tokens that end what this model writes, continued or answered; and warnings, one line each.

    They are all that a file of the folder names, and what its chat template (opened here if it is not given) ends a
    turn with.  A template that cannot be asked is a warning.
    """
    said = special.end_ids
    if template is None and special.chat_template is not None:
        try:
            template = ChatTemplate.of(folder, special)
        except LoopLMError as error:
            return said, [f"what its chat template ends a turn with stays unknown: {error} ({error.hint})"]
    end = template.turn_end(tokenizer) if template else None
    if end is None or end in said:
        return said, []
    turn = named(frozenset({end}), tokenizer)
    return said | {end}, [
        f"{folder}: {file} ends a text with {named(ids, tokenizer)}, but the chat template ends a turn with {turn}: "
        "either ends an answer"
        for file, ids in list(special.claims.items())[:1]
    ]


def _render(where: str, source: str, context: Mapping[str, Any]) -> dict[str, Any]:
    if importlib.util.find_spec("jinja2") is None:
        raise UsageError("chat templates need jinja2, which is not installed", "pip install 'looplm-cpu[chat]'")
    request = json.dumps({"template": source, "context": context})
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(WORKER)],  # -P: this package's own modules must not stand in for others'
            input=request,
            capture_output=True,
            encoding="utf-8",
            timeout=PATIENCE,
            check=False,
            start_new_session=True,  # Ctrl-C at the terminal is for the parent
        )
    except subprocess.TimeoutExpired:
        raise _failed(where, f"it had not come to an end after {PATIENCE:g} seconds") from None
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
        raise _failed(where, last) from None
    if "error" in found:
        raise _failed(where, found["error"])
    return found


def _failed(where: str, why: str) -> DataError:
    return DataError(f"the chat template in {where} fails: {why}", "correct the template, or copy the folder again")
