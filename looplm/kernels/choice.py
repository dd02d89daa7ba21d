"""The next token in one pass or two over the logits: what looplm/sampling.py does in plain NumPy for every setting.

Sums are of float32 exponentials, in runs of `RUN` and over runs in float64, so that a token's share is right to seven
digits in any vocabulary.
"""

import numpy as np

from .intrinsics import exp32, larger32
from .jit import njit

RUN = 256  # logits whose exponentials are summed before the sum is widened

_ZERO = np.float32(0.0)


@njit
def _highest(logits):
    top = logits[0]
    for i in range(logits.size):
        top = larger32(top, logits[i])
    return top


@njit(forceinline=True)
def _run_sum(run, top, inverse):
    total = _ZERO
    for i in range(run.size):
        total += exp32((run[i] - top) * inverse)
    return np.float64(total)


@njit(forceinline=True)
def _sum(logits, top, inverse):
    """The sum of exp((logit - top) * inverse), float64; NaN if a logit is."""
    total = 0.0
    for first in range(0, logits.size, RUN):
        total += _run_sum(logits[first : first + RUN], top, inverse)
    return total


@njit
def log_total(logits):
    """log of the sum of exp(logit), nats.  logits: V"""
    top = _highest(logits)
    return top + np.log(_sum(logits, top, np.float32(1.0)))


@njit
def _greedy(logits, top):
    for i in range(logits.size):
        if logits[i] == top:
            return i
    return -1


@njit
def _drawn(logits, top, inverse, place):
    """The first token whose share, laid out behind those before it, ends beyond `place`."""
    before, last = 0.0, -1
    for first in range(0, logits.size, RUN):
        run = logits[first : first + RUN]
        here = _run_sum(run, top, inverse)
        if before + here > place:
            for i in range(run.size):
                weight = exp32((run[i] - top) * inverse)
                if weight > _ZERO:
                    last = first + i
                    before += weight
                    if before > place:
                        break
            return last
        before += here
    return _greedy(logits, top)  # the place is the end itself, rounded up


@njit
def choose(logits, temperature, coin):
    """A token drawn at a temperature (0: the most likely), and its log-probability without one; -1 if that cannot be.

    logits: V float32, contiguous; coin: in [0, 1).  It cannot be if a logit is NaN or the highest is infinite.
    """
    top = _highest(logits)
    total = _sum(logits, top, np.float32(1.0))
    if not np.isfinite(total):
        return -1, total
    if temperature == 0.0:
        token = _greedy(logits, top)
    else:
        inverse = np.float32(1.0 / temperature)
        place = coin * (total if temperature == 1.0 else _sum(logits, top, inverse))
        token = _drawn(logits, top, inverse, place)
    return token, np.float64(logits[token]) - top - np.log(total)
