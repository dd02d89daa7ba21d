"""Small wrong versions of every operation.  A tolerance that lets one of them pass is too wide.

A mutant wraps any candidate, so the same mistakes can be made on top of the reference or of the engine: it changes what
goes into a function, or what comes out.
"""

import dataclasses
import inspect
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from . import ops
from .contract import DIMS, Row, check, first_failure
from .ops import Array

Given = dict[str, Any]  # the arguments of a call, by name
Result = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class OpMutant:
    """One mistake in one function: `inputs` replaces arguments, `outputs` makes another result of the right one."""

    name: str
    function: str
    inputs: Callable[[Given], Given] = lambda given: {}
    outputs: Callable[[Given, Result], Any] = lambda given, result: result

    @property
    def op(self) -> str:
        return self.function.removesuffix("_forward").removesuffix("_backward")

    def apply(self, candidate: Any) -> types.SimpleNamespace:
        """The candidate with this one function wrong, under the signature of the right one."""
        right = getattr(candidate, self.function)

        def wrong(**given: Any) -> Any:
            return self.outputs(given, right(**(given | self.inputs(given))))

        vars(wrong)["__signature__"] = inspect.signature(getattr(ops, self.function))
        public = {name: getattr(candidate, name) for name in vars(ops) if hasattr(candidate, name)}
        return types.SimpleNamespace(**(public | {self.function: wrong}))

    def first_failure(self, candidate: Any, dtype: Any = np.float32) -> Row | None:
        """The first row that catches it, if any does.  Small sizes are enough."""
        wrong = self.apply(candidate)
        with np.errstate(all="ignore"):
            return first_failure([row for dims in DIMS[:3] for row in check(wrong, self.op, dims, dtype=dtype)])


def interleaved(turn: Callable[[Array], Array], x: Array) -> Array:
    """Pair channels (2i, 2i + 1) in a function that pairs (i, i + K/2)."""
    order = np.arange(x.shape[-1]).reshape(-1, 2).T.ravel()
    y = np.zeros_like(x)
    y[..., order] = turn(x[..., order])
    return y


def other_groups(heads: int, groups: int) -> Array:
    """An order of heads in which head h gets key/value head h % G instead of h // (H / G)."""
    return np.arange(heads).reshape(-1, groups).T.ravel()


def _first(array: Array) -> Array:
    """Zeros but for the first entry of the first axis."""
    only = np.zeros_like(array)
    only[0] = array[0]
    return only


def _repeats_lost(given: Given, result: Result) -> Result:
    dweight = np.zeros_like(given["weight"])
    dweight[given["input_ids"]] += given["dy"]
    return (dweight,)


def _shuffled_heads(given: Given) -> Given:
    q = given["q"]
    return {"q": np.ascontiguousarray(q[:, :, other_groups(q.shape[2], given["k"].shape[2])])}


def _unshuffled_heads(given: Given, result: Result) -> Result:
    back = np.argsort(other_groups(given["q"].shape[2], given["k"].shape[2]))
    return tuple(array[:, :, back] for array in result)


def _one_head_per_group(given: Given, result: Result) -> Result:
    members = given["q"].shape[2] // given["k"].shape[2]
    last = np.arange(given["q"].shape[2]) % members == members - 1
    return result[0], *ops.attention_backward(**(given | {"dy": given["dy"] * last[:, None].astype(given["q"].dtype)}))[
        1:
    ]


def _no_remainder(given: Given, result: Result) -> Result:
    exit_prob, log_exit_prob = result
    exit_prob[-1] *= ops.sigmoid(given["gate_logit"][-1])
    return exit_prob, log_exit_prob


def _one_minus_sigmoid(given: Given, result: Result) -> Result:
    hazard = ops.sigmoid(given["gate_logit"])
    exit_prob = np.ones_like(hazard)
    exit_prob[1:] = np.cumprod(1.0 - hazard[:-1], axis=0)
    exit_prob[:-1] *= hazard[:-1]
    return exit_prob, np.log(exit_prob)


def _no_maximum(given: Given, result: Result) -> Result:
    lse = np.log(np.exp(given["logits"]).sum(-1))
    return result[0] - result[1] + lse, lse


def _gain_below_zero(given: Given, result: Result) -> Result:
    loss, wish = given["loss"], np.zeros_like(given["loss"])
    gain = loss[:-1] - loss[1:] - given["improvement_threshold"]
    wish[slice(1, None) if given["target"] == "paper" else slice(None, -1)] = ops.sigmoid(
        given["improvement_slope"] * gain
    )
    return wish, result[1]


def _gain_of_the_last_loop(given: Given, result: Result) -> Result:
    if given["target"] != "best-later":
        return result
    gain = np.maximum(given["loss"][:-1] - given["loss"][-1], 0.0) - given["improvement_threshold"]
    wish = np.zeros_like(result[0])
    wish[:-1] = ops.sigmoid(given["improvement_slope"] * gain)
    return wish, result[1]


def _margin_of_probabilities(given: Given, result: Result) -> Result:
    logits = given["logits"]
    prob = np.exp(logits - ops.cross_entropy_forward(logits, np.zeros(logits.shape[:-1], int))[1][..., None])
    ordered = np.sort(prob, axis=-1)
    return (ordered[..., -1] - ordered[..., -2],)


def _second_best(given: Given) -> Given:
    logits = given["logits"].copy()
    np.put_along_axis(logits, logits.argmax(-1)[..., None], -np.inf, axis=-1)
    return {"logits": logits}


def _input_overwritten(given: Given, result: Result) -> Result:
    given["gate"][...] = result[0]
    return result


def _end_not_written(given: Given, result: Result) -> Result:
    y = np.empty_like(result[0])
    y.reshape(-1)[:-1] = result[0].reshape(-1)[:-1]
    return (y,)


def _other_dtype(given: Given, result: Result) -> Result:
    return (result[0].astype(np.float32 if result[0].dtype == np.float64 else np.float64),)


OP_MUTANTS = (
    OpMutant(
        "the next token's row", "embedding_forward", lambda g: {"input_ids": (g["input_ids"] + 1) % len(g["weight"])}
    ),
    OpMutant("repeated tokens counted once", "embedding_backward", outputs=_repeats_lost),
    OpMutant(
        "weights in half precision",
        "linear_forward",
        lambda g: {"weight": g["weight"].astype(np.float16).astype(g["weight"].dtype)},
    ),
    OpMutant(
        "weight gradient of the first sequence only",
        "linear_backward",
        outputs=lambda g, out: (out[0], ops.linear_backward(**(g | {"dy": _first(g["dy"])}))[1]),
    ),
    OpMutant("eps forgotten", "rmsnorm_forward", lambda g: {"eps": 0.0}),
    OpMutant(
        "scale taken for a constant",
        "rmsnorm_backward",
        outputs=lambda g, out: (g["dy"] * g["weight"] * g["rrms"][..., None], out[1]),
    ),
    OpMutant(
        "norm after the sum instead of before",
        "rmsnorm_residual_forward",
        lambda g: {"x": g["x"] + g["residual"], "residual": np.zeros_like(g["x"])},
    ),
    OpMutant(
        "no gradient for the residual",
        "rmsnorm_residual_backward",
        outputs=lambda g, out: (out[0], np.zeros_like(out[1]), out[2]),
    ),
    OpMutant(
        "RoPE interleaved instead of half-split",
        "rope_forward",
        outputs=lambda g, out: (interleaved(lambda x: ops.rope_forward(**(g | {"x": x}))[0], g["x"]),),
    ),
    OpMutant(
        "gradient turned forward",
        "rope_backward",
        outputs=lambda g, out: ops.rope_forward(g["dy"], g["position"], g["theta"]),
    ),
    OpMutant(
        "causal mask off by one",
        "attention_forward",
        lambda g: {"k": np.roll(g["k"], -1, 1), "v": np.roll(g["v"], -1, 1)},
    ),
    OpMutant("padding is seen", "attention_forward", lambda g: {"start": np.zeros_like(g["start"])}),
    OpMutant("query heads read the wrong group", "attention_forward", _shuffled_heads, _unshuffled_heads),
    OpMutant(
        "scores divided by K instead of its root",
        "attention_forward",
        lambda g: {"q": g["q"] * g["q"].shape[-1] ** -0.5},
    ),
    OpMutant("softmax gradient without its mean", "attention_backward", lambda g: {"y": np.zeros_like(g["y"])}),
    OpMutant("keys learn from one head of their group", "attention_backward", outputs=_one_head_per_group),
    OpMutant("gate and up exchanged", "swiglu_forward", lambda g: {"gate": g["up"], "up": g["gate"]}),
    OpMutant(
        "derivative misses a term",
        "swiglu_backward",
        outputs=lambda g, out: (g["dy"] * g["up"] * ops.sigmoid(g["gate"]), out[1]),
    ),
    OpMutant("a list instead of a tuple", "swiglu_forward", outputs=lambda g, out: list(out)),
    OpMutant("input overwritten", "swiglu_forward", outputs=_input_overwritten),
    OpMutant("end of the output not written", "swiglu_forward", outputs=_end_not_written),
    OpMutant("another dtype", "swiglu_forward", outputs=_other_dtype),
    OpMutant("bias forgotten", "gate_forward", lambda g: {"bias": np.zeros_like(g["bias"])}),
    OpMutant(
        "gradient of the first loop only",
        "gate_backward",
        outputs=lambda g, out: (out[0], *ops.gate_backward(**(g | {"dgate_logit": _first(g["dgate_logit"])}))[1:]),
    ),
    OpMutant("last loop does not take the remainder", "exit_distribution_forward", outputs=_no_remainder),
    OpMutant("1 - sigmoid(z) for sigmoid(-z)", "exit_distribution_forward", outputs=_one_minus_sigmoid),
    OpMutant(
        "loops in reverse",
        "exit_distribution_backward",
        outputs=lambda g, out: (np.ascontiguousarray(out[0][::-1]),),
    ),
    OpMutant(
        "exit off by one",
        "exit_loop",
        outputs=lambda g, out: (np.minimum(out[0] + 1, len(g["exit_prob"]) - 1),),
    ),
    OpMutant(
        "above the threshold instead of at it",
        "exit_loop",
        lambda g: {"exit_threshold": float(np.nextafter(g["exit_threshold"], 2.0))},
    ),
    OpMutant(
        "a threshold of 1 exits early", "exit_loop", lambda g: {"exit_threshold": min(g["exit_threshold"], 1 - 1e-9)}
    ),
    OpMutant(
        "measured against the state before",
        "relative_change",
        outputs=lambda g, out: ops.relative_change(g["hidden"], g["before"]),
    ),
    OpMutant("KL the other way round", "prediction_kl", lambda g: {"before": g["logits"], "logits": g["before"]}),
    OpMutant("probability of the second best", "top_probability", _second_best),
    OpMutant("margin of probabilities", "top_margin", outputs=_margin_of_probabilities),
    OpMutant("one loop too many", "stable_loops", outputs=lambda g, out: (out[0] + 1,)),
    OpMutant(
        "agreement with the first loop",
        "stable_loops",
        lambda g: {"best": np.ascontiguousarray(g["best"][::-1])},
    ),
    OpMutant("maximum not subtracted", "cross_entropy_forward", outputs=_no_maximum),
    OpMutant("target -1 counted", "cross_entropy_backward", lambda g: {"target": np.maximum(g["target"], 0)}),
    OpMutant("entropy with the wrong sign", "stage1_forward", lambda g: {"entropy_weight": -g["entropy_weight"]}),
    OpMutant("prior ignored", "stage1_backward", lambda g: {"log_prior": np.zeros_like(g["log_prior"])}),
    OpMutant(
        "improvement of the other neighbour",
        "continue_target",
        lambda g: {"target": "look-ahead" if g["target"] == "paper" else "paper"},
    ),
    OpMutant("the last loop's gain for the best later one", "continue_target", outputs=_gain_of_the_last_loop),
    OpMutant("improvement below zero", "continue_target", outputs=_gain_below_zero),
    OpMutant("a gate without label counted", "stage2_forward", lambda g: {"counted": np.ones_like(g["counted"])}),
    OpMutant("continue taken for stop", "stage2_backward", lambda g: {"continue_prob": 1 - g["continue_prob"]}),
    OpMutant("root forgotten", "gradient_norm", outputs=lambda g, out: (out[0] ** 2,)),
    OpMutant("moments keep their bias", "adamw_update", lambda g: {"step": 10**6}),
    OpMutant("eps forgotten", "adamw_update", lambda g: {"eps": 0.0}),
    OpMutant(
        "decay through the gradient",
        "adamw_update",
        lambda g: {"grad": g["grad"] + g["weight_decay"] * g["weight"], "weight_decay": 0.0},
    ),
)
