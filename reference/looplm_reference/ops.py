"""Every operation of LoopLM, forward then backward, in plain NumPy.  Read it beside the paper (arXiv 2510.25741).

Each docstring has one shape line, and the contract reads it: `x: BSD, weight: D -> y: BSD` names arrays and the letters
of their axes; a parameter without letters is a constant.  A backward lists only what is new: the gradient that comes in
and those that go out.  Results follow the dtype of the inputs, so float64 in gives float64 out.

B batch · S positions · P key positions (P >= S) · R loops · D width · H, G query and key/value heads · K channels per
head · F feed-forward or any output width · V vocabulary · O = 1, the gate's output · N elements of a flat array.

Not here: dropout, biases other than the gate's, sliding windows and scaled rotary positions.  The model has none.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from .exits import prediction_kl as prediction_kl
from .exits import relative_change as relative_change
from .exits import stable_loops as stable_loops
from .exits import top_margin as top_margin
from .exits import top_probability as top_probability

Array = npt.NDArray[Any]


def log_sigmoid(z: Array) -> Array:
    """log(sigmoid(z)) = -log(1 + exp(-z)), exact at both ends."""
    return -np.logaddexp(0.0, -z)


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)).  Its complement is sigmoid(-z): 1 - sigmoid(z) would lose every digit at large z."""
    return np.exp(log_sigmoid(z))


def embedding_forward(input_ids: Array, weight: Array) -> tuple[Array]:
    """Look up one row per token; the embedding is not scaled.

    input_ids: BS, weight: VD -> y: BSD
    Source: Section 3.1, emb.
    """
    return (weight[input_ids],)


def embedding_backward(dy: Array, input_ids: Array, weight: Array) -> tuple[Array]:
    """A token that occurs often collects the gradient of every occurrence.

    dy: BSD -> dweight: VD
    """
    dweight = np.zeros_like(weight)
    np.add.at(dweight, input_ids, dy)
    return (dweight,)


def linear_forward(x: Array, weight: Array) -> tuple[Array]:
    """Multiply by a matrix stored as (outputs, inputs); no bias.

    x: BSD, weight: FD -> y: BSF
    """
    return (x @ weight.T,)


def linear_backward(dy: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    """Gradients of both factors.

    dy: BSF -> dx: BSD, dweight: FD
    """
    return dy @ weight, np.einsum("bsf,bsd->fd", dy, x)


def rmsnorm_forward(x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """Scale each position to unit root-mean-square, then by a learned weight; `rrms` is the reciprocal that did it.

    x: BSD, weight: D -> y: BSD, rrms: BS
    Source: Section 4.1 names the norm; eps stands inside the root, as in the published code.
    """
    rrms = 1.0 / np.sqrt((x * x).mean(-1) + eps)
    return x * rrms[..., None] * weight, rrms


def rmsnorm_backward(dy: Array, x: Array, weight: Array, rrms: Array) -> tuple[Array, Array]:
    """With x' = x * rrms: dx = rrms * (dx' - x' * mean(dx' * x')), because rrms depends on x too.

    dy: BSD -> dx: BSD, dweight: D
    """
    unit = x * rrms[..., None]
    dunit = dy * weight
    dx = (dunit - unit * (dunit * unit).mean(-1, keepdims=True)) * rrms[..., None]
    return dx, (dy * unit).sum((0, 1))


def rmsnorm_residual_forward(x: Array, residual: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """residual + rmsnorm(x): how a sandwich layer takes in what attention or MLP computed.

    x, residual: BSD, weight: D -> y: BSD, rrms: BS
    Source: the published code.  Section 4.1 speaks of a norm before attention and before the MLP; the weights hold
    four norms per layer, and the second and fourth act on the branch after the sublayer, before the sum.
    """
    y, rrms = rmsnorm_forward(x, weight, eps)
    return residual + y, rrms


def rmsnorm_residual_backward(dy: Array, x: Array, weight: Array, rrms: Array) -> tuple[Array, Array, Array]:
    """The residual's gradient is dy itself.

    dy: BSD -> dx: BSD, dresidual: BSD, dweight: D
    """
    dx, dweight = rmsnorm_backward(dy, x, weight, rrms)
    return dx, dy.copy(), dweight


def _turn(x: Array, position: Array, theta: float, direction: float) -> Array:
    """Rotate the pair of channels (i, i + K/2) by direction * position * theta**(-2i/K)."""
    channels = x.shape[-1]
    frequency = theta ** (-np.arange(0, channels, 2) / channels)
    angle = direction * position[..., None, None] * frequency
    cos, sin = np.cos(angle), np.sin(angle)
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def rope_forward(x: Array, position: Array, theta: float) -> tuple[Array]:
    """Turn queries or keys by their position.

    x: BSHK, position: BS -> y: BSHK
    Source: the published code: channel i is paired with i + K/2 (rotate-half), not with its neighbour.
    """
    return (_turn(x, position, theta, 1.0),)


def rope_backward(dy: Array, position: Array, theta: float) -> tuple[Array]:
    """A rotation's transpose turns back.

    dy: BSHK -> dx: BSHK
    """
    return (_turn(dy, position, theta, -1.0),)


def _scores(q: Array, k: Array, start: Array) -> Array:
    """BSHP: scaled dot products, -inf where the key is not seen.  k already has one row per query head."""
    queries, keys, channels = q.shape[1], k.shape[1], q.shape[3]
    at = np.arange(keys - queries, keys)[None, :, None]
    key = np.arange(keys)[None, None, :]
    seen = (key <= at) & (key >= start[:, None, None])
    return np.where(seen[:, :, None, :], np.einsum("bshk,bphk->bshp", q, k) * channels**-0.5, -np.inf)


def _per_query_head(x: Array, heads: int) -> Array:
    """BPGK -> BPHK: query head h reads key/value head h // (H / G)."""
    return np.repeat(x, heads // x.shape[2], axis=2)


def _softmax_parts(scores: Array) -> tuple[Array, Array, Array]:
    """exp(score - highest), its sum over keys (an axis of 1), and the log of the sum of exp(score).

    Where nothing is seen: 0, 1 and 0.
    """
    top = scores.max(-1, keepdims=True)
    blind = np.isneginf(top)
    weight = np.exp(scores - np.where(blind, 0.0, top))
    total = np.where(blind, 1.0, weight.sum(-1, keepdims=True))
    return weight, total, np.where(blind, 0.0, top + np.log(total))[..., 0]


def attention_forward(q: Array, k: Array, v: Array, start: Array) -> tuple[Array, Array]:
    """Causal softmax attention with grouped key/value heads; `lse` is the log of the softmax's denominator.

    q: BSHK, k, v: BPGK, start: B -> y: BSHK, lse: BSH
    The queries are the last S of P positions: query s stands at P - S + s and sees keys start[b] .. P - S + s (what
    lies before start[b] is left padding).  A query before start[b] sees nothing: y = 0 and lse = 0.
    """
    weight, total, lse = _softmax_parts(_scores(q, _per_query_head(k, q.shape[2]), start))
    return np.einsum("bshp,bphk->bshk", weight / total, _per_query_head(v, q.shape[2])), lse


def attention_backward(
    dy: Array, q: Array, k: Array, v: Array, start: Array, y: Array, lse: Array
) -> tuple[Array, Array, Array]:
    """Softmax again from `lse`; dscore = p * (dy . v - dy . y), then the products' own gradients.

    dy: BSHK -> dq: BSHK, dk, dv: BPGK
    dy is ignored at queries before start[b].
    """
    heads, scale = q.shape[2], q.shape[3] ** -0.5
    key, value = _per_query_head(k, heads), _per_query_head(v, heads)
    prob = np.exp(_scores(q, key, start) - lse[..., None])
    dprob = np.einsum("bshk,bphk->bshp", dy, value)
    dscore = prob * (dprob - (dy * y).sum(-1, keepdims=True)) * scale
    dq = np.einsum("bshp,bphk->bshk", dscore, key)
    grouped = (*k.shape[:3], heads // k.shape[2], k.shape[3])
    dk = np.einsum("bshp,bshk->bphk", dscore, q).reshape(grouped).sum(3)
    dv = np.einsum("bshp,bshk->bphk", prob, dy).reshape(grouped).sum(3)
    return dq, dk, dv


def swiglu_forward(gate: Array, up: Array) -> tuple[Array]:
    """silu(gate) * up, with silu(x) = x * sigmoid(x).

    gate, up: BSF -> y: BSF
    Source: Section 4.1.
    """
    return (gate * sigmoid(gate) * up,)


def swiglu_backward(dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """silu'(x) = sigmoid(x) * (1 + x * sigmoid(-x)).

    dy: BSF -> dgate: BSF, dup: BSF
    """
    dgate = dy * up * sigmoid(gate) * (1.0 + gate * sigmoid(-gate))
    return dgate, dy * gate * sigmoid(gate)


def gate_forward(hidden: Array, weight: Array, bias: Array) -> tuple[Array]:
    """One logit per position and loop, read from the state after the loop's final norm.

    hidden: RBSD, weight: OD, bias: O -> gate_logit: RBS
    Source: Section 3.2: hazard = sigmoid(w . h + b), one gate for all loops.
    """
    return ((hidden @ weight.T + bias)[..., 0],)


def gate_backward(dgate_logit: Array, hidden: Array, weight: Array) -> tuple[Array, Array, Array]:
    """All loops and positions share one weight, so its gradient is summed over them.

    dgate_logit: RBS -> dhidden: RBSD, dweight: OD, dbias: O
    """
    dweight = np.einsum("rbs,rbsd->d", dgate_logit, hidden)[None]
    return dgate_logit[..., None] * weight[0], dweight, dgate_logit.sum().reshape(1)


def _weighted(prob: Array, value: Array) -> Array:
    """prob * value, where a probability of 0 weighs nothing: 0 * log 0 = 0."""
    return prob * np.where(prob > 0.0, value, 0.0)


def exit_distribution_forward(gate_logit: Array) -> tuple[Array, Array]:
    """Chance to stop exactly at loop r: hazard_r * prod_{j<r} (1 - hazard_j); the last loop takes what is left.

    gate_logit: RBS -> exit_prob: RBS, log_exit_prob: RBS
    Source: Eq. 3, Section 3.2.  The last loop's gate is computed but has no say.  Sums of log-sigmoids: gates at
    +-1e4 give exact zeros and ones, and finite logarithms.
    """
    survival = np.zeros_like(gate_logit)
    survival[1:] = np.cumsum(log_sigmoid(-gate_logit[:-1]), axis=0)
    log_exit_prob = survival + log_sigmoid(gate_logit)
    log_exit_prob[-1] = survival[-1]
    return np.exp(log_exit_prob), log_exit_prob


def exit_distribution_backward(dexit_prob: Array, gate_logit: Array) -> tuple[Array]:
    """Raising gate r wins (1 - hazard_r) of its own p_r and takes hazard_r from each later p_j.

    dexit_prob: RBS -> dgate_logit: RBS
    dz_r = (1 - hazard_r) p_r dp_r - hazard_r * sum_{j>r} p_j dp_j, and 0 for the last loop, whose gate is not used.
    """
    worth = _weighted(exit_distribution_forward(gate_logit)[0], dexit_prob)
    later = worth[::-1].cumsum(0)[::-1] - worth
    dgate_logit = sigmoid(-gate_logit) * worth - sigmoid(gate_logit) * later
    dgate_logit[-1] = 0.0
    return (dgate_logit,)


def exit_loop(exit_prob: Array, exit_threshold: float) -> tuple[Array]:
    """First loop (counted from 0) whose cumulative exit probability reaches the threshold.

    exit_prob: RBS -> exit_index: BS
    Source: Section 3.2, Algorithm 1.  A threshold of 1 or more always means the last loop: a saturated gate or a
    rounded sum may reach 1 early, and the published code then stops there.  A sum that never gets to the threshold
    means the last loop too.
    """
    reached = np.cumsum(exit_prob, axis=0) >= (np.inf if exit_threshold >= 1.0 else exit_threshold)
    reached[-1] = True
    return (reached.argmax(0).astype(np.int64),)


def cross_entropy_forward(logits: Array, target: Array) -> tuple[Array, Array]:
    """-log softmax(logits)[target] in nats; a target of -1 is not counted: loss 0.

    logits: BSV, target: BS -> loss: BS, lse: BS
    Source: Eq. 2, Section 3.1, per token.
    """
    top = logits.max(-1)
    lse = top + np.log(np.exp(logits - top[..., None]).sum(-1))
    wanted = np.take_along_axis(logits, np.maximum(target, 0)[..., None], -1)[..., 0]
    return np.where(target >= 0, lse - wanted, 0.0), lse


def cross_entropy_backward(dloss: Array, logits: Array, target: Array, lse: Array) -> tuple[Array]:
    """softmax(logits) - onehot(target), and 0 where the target is not counted.

    dloss: BS -> dlogits: BSV
    """
    onehot = np.arange(logits.shape[-1]) == target[..., None]
    dcounted = np.where(target >= 0, dloss, 0.0)[..., None]
    return (dcounted * (np.exp(logits - lse[..., None]) - onehot),)


def stage1_forward(loss: Array, gate_logit: Array, log_prior: Array, entropy_weight: float) -> tuple[Array, Array]:
    """Expected loss over loops plus entropy_weight * KL(exit distribution || prior), per position.

    loss, gate_logit: RBS, log_prior: R -> objective: BS, exit_prob: RBS
    Source: Section 3.3 (Eq. 4), and Appendix A for priors other than the uniform one.  Units: nats.
    log_prior = 0 is the paper's sum_r p_r loss_r - entropy_weight * H(p): against the uniform prior KL = log R - H,
    and the constant is left out.  The paper's loss is a sum over tokens beside a single entropy; gates are per token,
    so both terms are taken per token here, which is also the only reading that gives the entropy its reported weight.
    """
    exit_prob, log_exit_prob = exit_distribution_forward(gate_logit)
    divergence = _weighted(exit_prob, log_exit_prob - log_prior[:, None, None])
    return (exit_prob * loss + entropy_weight * divergence).sum(0), exit_prob


def stage1_backward(
    dobjective: Array, loss: Array, gate_logit: Array, log_prior: Array, entropy_weight: float
) -> tuple[Array, Array]:
    """dp_r = loss_r + entropy_weight * (log(p_r / prior_r) + 1) moves the gate; each loss is weighted by its p_r.

    dobjective: BS -> dloss: RBS, dgate_logit: RBS
    Nothing is detached: the gate's gradient flows on into the trunk.
    """
    exit_prob, log_exit_prob = exit_distribution_forward(gate_logit)
    dexit_prob = loss + entropy_weight * (log_exit_prob - log_prior[:, None, None] + 1.0)
    (dgate_logit,) = exit_distribution_backward(dexit_prob, gate_logit)
    return dobjective * exit_prob, dobjective * dgate_logit


def continue_target(
    loss: Array, improvement_slope: float, improvement_threshold: float, target: str
) -> tuple[Array, Array]:
    """Stage II's label per gate, how much it should want to go on: sigmoid(slope * (improvement - threshold)).

    loss: RBS -> continue_prob: RBS, counted: R
    Source: Section 3.4 (Eq. 5-6): slope 50, threshold 0.005 nats, improvement = max(0, loss before - loss after).
    "paper": gates 2..R, by what loop r itself gained over loop r - 1; the first gate has no label, and the last is
    trained though nothing reads it.  "look-ahead": gates 1..R-1, by what loop r + 1 will gain over loop r, the
    question a gate really decides.  "best-later": the same gates, by what the best of all later loops will gain over
    loop r.  The paper lets a label near 0 recommend to stop, but improvement is never negative:
    the label never falls below sigmoid(-0.25) = 0.44, nor does the best hazard rise above 0.56.  `counted` is 1 or 0.
    """
    later = np.minimum.accumulate(loss[:0:-1])[::-1] if target == "best-later" else loss[1:]
    gain = np.maximum(loss[:-1] - later, 0.0)
    gates = slice(1, None) if target == "paper" else slice(None, -1)
    continue_prob, counted = np.zeros_like(loss), np.zeros(loss.shape[0], loss.dtype)
    continue_prob[gates], counted[gates] = sigmoid(improvement_slope * (gain - improvement_threshold)), 1.0
    return continue_prob, counted


def stage2_forward(gate_logit: Array, continue_prob: Array, counted: Array) -> tuple[Array]:
    """Binary cross-entropy between 1 - hazard and its label, summed over counted gates and divided by R.

    gate_logit, continue_prob: RBS, counted: R -> objective: BS
    Source: Section 3.4: the sum has R - 1 terms and is still divided by R.  Units: nats.
    """
    each = continue_prob * log_sigmoid(-gate_logit) + (1.0 - continue_prob) * log_sigmoid(gate_logit)
    return (-(counted[:, None, None] * each).sum(0) / gate_logit.shape[0],)


def stage2_backward(dobjective: Array, gate_logit: Array, continue_prob: Array, counted: Array) -> tuple[Array]:
    """(hazard - (1 - continue_prob)) / R at counted gates; the label is a constant.

    dobjective: BS -> dgate_logit: RBS
    """
    towards = sigmoid(gate_logit) - (1.0 - continue_prob)
    return (dobjective * counted[:, None, None] * towards / gate_logit.shape[0],)


def gradient_norm(grad: Array) -> tuple[float]:
    """Euclidean norm of all gradients together; a gradient longer than the limit c is scaled by c / norm.

    grad: N -> norm: ()
    Source: Table 1: clipped at 1.0.
    """
    return (float(np.sqrt(np.square(grad, dtype=np.float64).sum())),)


def adamw_update(
    weight: Array,
    grad: Array,
    first_moment: Array,
    second_moment: Array,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[()]:
    """One AdamW step, in place; steps count from 1.  Decay acts on the weight, never on the gradient.

    weight, grad, first_moment, second_moment: N -> weight, first_moment, second_moment: N
    Source: Table 1: betas 0.9 and 0.95, decay 0.1.
    """
    first_moment[...] = beta1 * first_moment + (1.0 - beta1) * grad
    second_moment[...] = beta2 * second_moment + (1.0 - beta2) * grad * grad
    mean = first_moment / (1.0 - beta1**step)
    root = np.sqrt(second_moment / (1.0 - beta2**step))
    weight[...] = weight - learning_rate * (weight_decay * weight + mean / (root + eps))
    return ()
