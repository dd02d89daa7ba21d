"""What can go wrong in a way the user can cause or cure.

LoopLMError                any of the following; the message says what was seen, the hint what to do
├── UsageError             an argument's value cannot be used (exit code 2)
├── ConfigError            a key, type or relation in a config is wrong
├── CheckpointError        a model or run folder is missing, corrupt, or of another kind
├── DataError              text, token ids or tokenizer do not fit the model
├── TrainingError          a run cannot go on: its loss is no longer a number
└── VerificationError      the engine and what it is compared with disagree
"""


class LoopLMError(Exception):
    """An error with a cure: `message` carries the value seen, `hint` what to do next; `exit_code` is the command's."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(LoopLMError):
    """An argument's value cannot be used."""

    exit_code = 2


class ConfigError(LoopLMError):
    """A key, a type or a relation between settings is wrong."""


class CheckpointError(LoopLMError):
    """A model or run folder is missing, corrupt, or not what it says it is."""


class DataError(LoopLMError):
    """Text, token ids or a tokenizer do not fit."""


class TrainingError(LoopLMError):
    """A training run cannot go on."""


class VerificationError(LoopLMError):
    """Two implementations that must agree do not."""
