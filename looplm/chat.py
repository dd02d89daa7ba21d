"""A conversation: messages in, answers token by token out, what was computed for earlier turns kept.

Knowingly not here: tools, several conversations at once, and dropping old messages to make room for new ones.
"""

import re
from collections.abc import Collection, Generator, Iterable, Sequence

import numpy as np

from .arrays import Ints
from .cache import KeyValueType, Policy
from .chat_template import ChatTemplate, Message
from .deferral import MAX_DEFERRED
from .errors import DataError
from .exits import ExitRule
from .generation import PREALLOCATED, Generated, Session, check_policy_memory, check_prompt, continue_session, rewind
from .sampling import Sampling
from .stored import StoredWeights
from .text import Tokenizer
from .weights import Weights

PRIVATE_USE = range(0xE000, 0xF900)  # code points that mean nothing by themselves


class Conversation:
    """History, and the key/value cache of what the model has read and written of it.

    `messages` is the history, oldest first, without the system prompt.  Of the answer last begun, `prompt_tokens` are
    the tokens before it and `cached_tokens` those among them that an earlier turn had left in the cache.
    """

    def __init__(
        self,
        weights: Weights | StoredWeights,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        stop_ids: Collection[int],
        *,
        system: str | None = None,
        think: bool | None = None,
        max_deferred: int = MAX_DEFERRED,
        kv_dtype: KeyValueType = "float32",
        threads: int = 1,
    ) -> None:
        if think is not None:
            template.check_thinking()
        self.system = system
        self.messages: list[Message] = []
        self.prompt_tokens = self.cached_tokens = 0
        self._weights, self._tokenizer, self._template = weights, tokenizer, template
        self._stop_ids, self._think = frozenset(stop_ids), think
        self._max_deferred, self._kv_dtype, self._threads = max_deferred, kv_dtype, threads
        self._session: Session | None = None
        self._read: list[int] = []  # the ids whose first `session.filled` are in the cache

    def reset(self) -> None:
        """Forget all messages; the system prompt stays."""
        self.messages.clear()

    def answer(
        self,
        text: str,
        *,
        rule: ExitRule,
        rng: np.random.Generator,
        sampling: Sampling,
        max_new_tokens: int,
        policy: Policy = "last-exited",
    ) -> Generator[Generated, None, None]:
        """Answer a message, one token at a time, as `looplm.generation.generate` continues a prompt.

        However it ends, also closed or interrupted half way, what was written until then is the answer in the history.
        A message that no token answered is not.

        Raises: DataError, before anything runs, if the conversation does not fit in the model's context, or in memory.
        """
        asked: Message = {"role": "user", "content": text}
        ids = self._prompt_ids([*self.messages, asked])
        context = self._weights.config.max_position_embeddings
        if ids.size > context:
            raise DataError(
                f"the conversation has grown to {ids.size} tokens, the model's context is {context}",
                "start anew with /reset, or say less",
            )
        check_prompt(ids, self._weights.config)
        loops = rule.deepest(self._weights.config.total_ut_steps)
        longest = min(ids.size + max_new_tokens, context)
        check_policy_memory(self._weights.config, loops, ids.size, longest, self._kv_dtype, policy)
        return self._answer(asked, ids, rule, rng, sampling, max_new_tokens, policy)

    def _answer(
        self,
        asked: Message,
        ids: Ints,
        rule: ExitRule,
        rng: np.random.Generator,
        sampling: Sampling,
        max_new_tokens: int,
        policy: Policy,
    ) -> Generator[Generated, None, None]:
        session = self._session_for(ids, rule, policy, max_new_tokens)
        self._read, written = ids.tolist(), []
        self.prompt_tokens, self.cached_tokens = ids.size, session.filled
        tokens = continue_session(
            session,
            ids[session.filled :],
            rule=rule,
            rng=rng,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            stop_ids=self._stop_ids,
            before=ids[: session.filled],
        )
        try:
            for token in tokens:
                self._read.append(token.token_id)
                if token.finish != "stop token":
                    written.append(token.token_id)
                yield token
        finally:
            if len(self._read) > ids.size:
                said = self._tokenizer.decode(written, special=True)
                self.messages += [asked, {"role": "assistant", "content": said}]

    def _session_for(self, ids: Ints, rule: ExitRule, policy: Policy, max_new_tokens: int) -> Session:
        """The session of before, back at where the new prompt leaves what it has read; or a new one.

        At least the last position is read again: its state is what the answer begins from.
        """
        config = self._weights.config
        loops = rule.deepest(config.total_ut_steps)
        session = self._session
        if session is None or (session.loops, session.cache.policy) != (loops, policy):
            capacity = min(ids.size + min(max_new_tokens, PREALLOCATED), config.max_position_embeddings)
            self._session = Session(
                self._weights,
                loops=loops,
                capacity=capacity,
                policy=policy,
                max_deferred=self._max_deferred,
                kv_dtype=self._kv_dtype,
                threads=self._threads,
            )
            return self._session
        rewind(session, min(common_prefix(self._read[: session.filled], ids), ids.size - 1))
        return session

    def _prompt_ids(self, messages: Sequence[Message]) -> Ints:
        """Token ids of a conversation up to where the next answer begins.

        A special token is one only where the template or the model wrote it: in what the user wrote its spelling stays
        plain text, so that no message can end its own turn and speak for another.
        """
        whole = [{"role": "system", "content": self.system}] if self.system is not None else []
        whole += [dict(message) for message in messages]
        foreign = [message for message in whole if message["role"] != "assistant"]
        hidden = _Hidden(
            self._tokenizer.special_tokens, [message["content"] for message in foreign], self._template.source
        )
        for message in foreign:
            message["content"] = hidden.hide(message["content"])
        parts = hidden.split(self._template.prompt(whole, self._think))
        return np.concatenate(
            [self._tokenizer.encode(part) if plain else self._tokenizer.encode_marked(part) for part, plain in parts]
        )


class _Hidden:
    """Spellings of special tokens in a user's words, carried through a template as one private character each."""

    def __init__(self, specials: Iterable[str], texts: Sequence[str], template: str) -> None:
        present = [special for special in specials if any(special in text for text in texts)]
        taken = set(template).union(*texts)
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in taken)
        self._stand_in = dict(zip(sorted(present, key=len, reverse=True), free, strict=False))

    def hide(self, text: str) -> str:
        for special, character in self._stand_in.items():
            text = text.replace(special, character)
        return text

    def split(self, text: str) -> list[tuple[str, bool]]:
        """The parts of a rendered text, and whether each is a hidden spelling, given back as it was."""
        if not self._stand_in:
            return [(text, False)]
        spelled = {character: special for special, character in self._stand_in.items()}
        parts = re.split(f"([{''.join(spelled)}])", text)
        return [(spelled.get(part, part), part in spelled) for part in parts if part]


def common_prefix(one: Sequence[int], other: Ints) -> int:
    """How many ids two sequences begin with alike."""
    shorter = min(len(one), other.size)
    different = np.flatnonzero(np.asarray(one[:shorter], np.int64) != other[:shorter])
    return int(different[0]) if different.size else shorter
