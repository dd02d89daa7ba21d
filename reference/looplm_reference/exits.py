"""The exit rules besides the learned gate: operations that give one number per position, and the comparison with it.

Nothing is saved here: every loop has run, and the rule only says which one a position would have stopped at.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FALLING = ("change", "kl")  # stop below the threshold; all others stop at it and above
RULES = (*FALLING, "top", "margin", "stable")


def relative_change(before: Array, hidden: Array) -> tuple[Array]:
    """How much of a state its loop changed: |after - before| / |after|.

    before, hidden: BSD -> change: BS
    Source: Section 5.4.1 (Figure 5) stops on a small |after - before|; divided by the state's own size, a threshold
    means the same in models of any width.
    """
    return (np.sqrt(((hidden - before) ** 2).sum(-1) / (hidden**2).sum(-1)),)


def _log_softmax(logits: Array) -> Array:
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def prediction_kl(before: Array, logits: Array) -> tuple[Array]:
    """KL(prediction before the loop || prediction after it).

    before, logits: BSV -> kl: BS
    Units: nats.
    """
    old, new = _log_softmax(before), _log_softmax(logits)
    return ((np.exp(old) * (old - new)).sum(-1),)


def top_probability(logits: Array) -> tuple[Array]:
    """Probability of the best token.

    logits: BSV -> top_prob: BS
    """
    return (np.exp(_log_softmax(logits).max(-1)),)


def top_margin(logits: Array) -> tuple[Array]:
    """How far the best logit is above the second best: the log of the ratio of their probabilities.

    logits: BSV -> margin: BS
    Units: nats.
    """
    ordered = np.sort(logits, axis=-1)
    return (ordered[..., -1] - ordered[..., -2],)


def stable_loops(best: Array) -> tuple[Array]:
    """For how many loops, the last one included, the best token has been what it is now.

    best: RBS -> stable: BS
    """
    changed = best[::-1] != best[-1]
    return (np.where(changed.any(0), changed.argmax(0), len(best)).astype(np.int64),)


def statistic(rule: str, hidden: Array, logits: Array) -> Array:
    """What the rule compares after each loop; NaN where it needs a loop before and there is none.

    hidden: RBSD, logits: RBSV -> RBS
    """
    value = np.full(hidden.shape[:3], np.nan)
    for r in range(len(hidden)):
        if rule == "change" and r > 0:
            (value[r],) = relative_change(hidden[r - 1], hidden[r])
        if rule == "kl" and r > 0:
            (value[r],) = prediction_kl(logits[r - 1], logits[r])
        if rule == "top":
            (value[r],) = top_probability(logits[r])
        if rule == "margin":
            (value[r],) = top_margin(logits[r])
        if rule == "stable":
            (value[r],) = stable_loops(logits[: r + 1].argmax(-1))
    return value


def exit_loop(rule: str, threshold: float, value: Array) -> Array:
    """First loop (counted from 0) whose statistic passes the threshold; the last loop stops whatever is left.

    value: RBS -> BS.  A probability of 1 or more is never waited for: rounding may reach it.
    """
    passed = value < threshold if rule in FALLING else value >= threshold
    if rule == "top" and threshold >= 1.0:
        passed = np.zeros_like(passed)
    passed[-1] = True
    return passed.argmax(0)


def between(value: Array) -> float:
    """A threshold in the middle of the widest gap among the middle half of some values, where rounding decides nothing.

    1 if there are fewer than two of them.
    """
    found = np.unique(value[:-1][np.isfinite(value[:-1])])
    middle = found[len(found) // 4 : max(len(found) // 4 + 2, len(found) - len(found) // 4)]
    if len(middle) < 2:
        return 1.0
    widest = int(np.diff(middle).argmax())
    return float(middle[widest : widest + 2].mean())
