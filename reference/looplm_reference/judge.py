"""The model-level judge: a whole LoopLM against the reference, array by array in forward order.

So the first row that fails names where a candidate goes wrong: loop, layer and tensor, not only the last logits.
Three small random models are enough: sizes differ from each other, norms are far from 1, eps is large enough to matter.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from . import exits
from .contract import Row, relative_error
from .model import LoopLM, Taps
from .ops import Array

Config = Mapping[str, Any]
Tensors = Mapping[str, Array]

TOLERANCE = 2e-5  # relative error of float32 through some loops of some layers
ENTROPY_WEIGHT = 0.3
THRESHOLDS = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)
LENGTHS = (7, 4, 6)  # real tokens of each row; the longest row of a padded batch has no padding
OUTPUTS = ("hidden", "logits", "gate_logit", "exit_prob")


def _config(
    width: int, ff: int, heads: tuple[int, int, int], layers: int, loops: int, vocab: int, **more: Any
) -> Config:
    return {
        "hidden_size": width,
        "intermediate_size": ff,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "num_hidden_layers": layers,
        "total_ut_steps": loops,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-2,
        "rope_theta": 100.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32,
        **more,
    }


MODELS: dict[str, Config] = {
    "grouped": _config(24, 40, (4, 2, 6), 2, 3, 37),
    "tied": _config(20, 28, (3, 3, 8), 1, 4, 31, tie_word_embeddings=True),
    "one loop": _config(18, 26, (4, 1, 10), 3, 1, 29),
}


class Candidate(Protocol):
    """What is judged.  Tensors are float32 under the names of the published files; config has config.json's keys.

    `forward` fills `taps` with (name, array) as LoopLM.forward does; `start` (B) is each row's first real position.
    `cached_hidden` gives the states (RBSD) from one position at a time through a key/value cache.
    `stage1` gives objective, loss and grads (by tensor name), the mean over targets that are not -1.
    """

    name: str

    def forward(
        self,
        tensors: Tensors,
        config: Config,
        input_ids: Array,
        start: Array | None = None,
        taps: Taps | None = None,
    ) -> Mapping[str, Array]: ...

    def stage1(
        self,
        tensors: Tensors,
        config: Config,
        input_ids: Array,
        target: Array,
        entropy_weight: float,
        start: Array | None = None,
    ) -> Mapping[str, Any]: ...

    def cached_hidden(
        self, tensors: Tensors, config: Config, input_ids: Array, start: Array | None = None
    ) -> Array: ...

    def exit_loop(self, exit_prob: Array, exit_threshold: float) -> Array: ...

    def rule_exit(self, tensors: Tensors, config: Config, rule: str, threshold: float, hidden: Array) -> Array: ...


class ReferenceCandidate:
    """The reference itself, or a wrong version of it, in the candidate's seat."""

    def __init__(self, model: type[LoopLM] = LoopLM, name: str = "reference") -> None:
        self.model, self.name = model, name

    def forward(
        self,
        tensors: Tensors,
        config: Config,
        input_ids: Array,
        start: Array | None = None,
        taps: Taps | None = None,
    ) -> Mapping[str, Array]:
        return self.model(tensors, config).forward(input_ids, start, taps=taps)

    def stage1(
        self,
        tensors: Tensors,
        config: Config,
        input_ids: Array,
        target: Array,
        entropy_weight: float,
        start: Array | None = None,
    ) -> Mapping[str, Any]:
        return self.model(tensors, config).stage1(input_ids, target, entropy_weight, start=start)

    def cached_hidden(self, tensors: Tensors, config: Config, input_ids: Array, start: Array | None = None) -> Array:
        return self.model(tensors, config).cached_hidden(input_ids, start)

    def exit_loop(self, exit_prob: Array, exit_threshold: float) -> Array:
        return self.model.exit_loop(exit_prob, exit_threshold)

    def rule_exit(self, tensors: Tensors, config: Config, rule: str, threshold: float, hidden: Array) -> Array:
        return self.model(tensors, config).rule_exit(rule, threshold, hidden)


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, in forward order."""
    width, ff, channels = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * channels, config["num_key_value_heads"] * channels
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in (
            ("input_layernorm", (width,)),
            ("self_attn.q_proj", (query, width)),
            ("self_attn.k_proj", (key, width)),
            ("self_attn.v_proj", (key, width)),
            ("self_attn.o_proj", (width, query)),
            ("input_layernorm_2", (width,)),
            ("post_attention_layernorm", (width,)),
            ("mlp.gate_proj", (ff, width)),
            ("mlp.up_proj", (ff, width)),
            ("mlp.down_proj", (width, ff)),
            ("post_attention_layernorm_2", (width,)),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (width,)
    shapes |= {"model.early_exit_gate.weight": (1, width), "model.early_exit_gate.bias": (1,)}
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": (config["vocab_size"], width)}


def random_tensors(config: Config, seed: int = 0) -> dict[str, Array]:
    """float32 tensors under which every part of the model has a say."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if "norm" in name:
            value = rng.uniform(0.4, 1.6, shape)
        elif name == "model.embed_tokens.weight":
            value = 0.3 * rng.standard_normal(shape)  # small enough for eps to show at once
        else:
            value = rng.standard_normal(shape) / np.sqrt(shape[-1])
        tensors[name] = value.astype(np.float32)
    return tensors


class _Trial:
    """One random model, its inputs, and what the reference answers."""

    def __init__(self, config: Config, truth: Callable[..., LoopLM]) -> None:
        self.config, self.tensors = config, random_tensors(config)
        # With this seed no gradient cancels to nearly nothing; that of the gate's bias, one sum, can.
        rng = np.random.default_rng(5)
        batch, length = len(LENGTHS), max(LENGTHS)
        self.ids = rng.integers(0, config["vocab_size"], (batch, length))
        self.target = np.where(rng.random((batch, length)) < 0.2, -1, np.roll(self.ids, -1, 1))
        self.start = length - np.array(LENGTHS)
        self.padded_target = np.where(np.arange(length) < self.start[:, None], -1, self.target)
        model = truth(self.tensors, config)
        self.taps: Taps = []
        self.out = model.forward(self.ids, taps=self.taps)
        self.stage1 = model.stage1(self.ids, self.target, ENTROPY_WEIGHT)
        self.padded_stage1 = model.stage1(self.ids, self.padded_target, ENTROPY_WEIGHT, start=self.start)
        self.left = [slice(begin, None) for begin in self.start]
        self.right = [slice(None, end) for end in LENGTHS]
        self.left_alone, self.right_alone = (
            [_with_taps(model, self.ids[b : b + 1, span]) for b, span in enumerate(spans)]
            for spans in (self.left, self.right)
        )


def _with_taps(model: LoopLM, input_ids: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    taps: Taps = []
    out = model.forward(input_ids, taps=taps)
    return out, dict(taps)


@functools.cache
def _trial(name: str, truth: Any) -> _Trial:
    return _Trial(MODELS[name], truth)


Comparison = tuple[str, Any, Any]  # row name, expected, actual
Judge = Callable[[Candidate, _Trial], Iterator[Comparison]]


def judge_model(candidate: Candidate, tolerance: float = TOLERANCE, models: Iterable[str] = tuple(MODELS)) -> list[Row]:
    """All comparisons of a candidate with the reference; names start with the model's, then follow the computation."""
    return list(compare(candidate, tolerance, models))


def compare(
    candidate: Candidate,
    tolerance: float = TOLERANCE,
    models: Iterable[str] = tuple(MODELS),
) -> Iterator[Row]:
    """The same rows one at a time, so that whoever wants the first failure need not wait for the rest."""
    parts = (_judge_forward, _judge_exit, _judge_cache, _judge_padding, _judge_gradients)
    yield from _compare(candidate, tolerance, models, LoopLM, parts)


def compare_gradients(
    candidate: Candidate, tolerance: float = TOLERANCE, truth: type[LoopLM] = LoopLM
) -> Iterator[Row]:
    """Only Stage I: losses, objective and every gradient, against the reference or a version of it."""
    yield from _compare(candidate, tolerance, MODELS, truth, (_judge_gradients,))


def _compare(
    candidate: Candidate, tolerance: float, models: Iterable[str], truth: type[LoopLM], parts: Iterable[Judge]
) -> Iterator[Row]:
    for name in models:
        trial = _trial(name, truth)  # type: ignore[arg-type]  # a class is hashable
        for judge in parts:
            for row, expected, actual in judge(candidate, trial):
                exact = isinstance(expected, np.ndarray) and expected.dtype.kind == "i"
                missing = actual is None
                error = np.inf if missing else relative_error(expected, actual)
                yield Row(f"{name}: {row}", error, 0.0 if exact else tolerance, "missing" if missing else "")


def _judge_forward(candidate: Candidate, trial: _Trial) -> Iterator[Comparison]:
    taps: Taps = []
    out = candidate.forward(trial.tensors, trial.config, trial.ids, taps=taps)
    found = dict(taps)
    for name, expected in trial.taps:
        yield name, expected, found.get(name)
    for name in OUTPUTS:
        yield name, trial.out[name], out.get(name)


def _judge_exit(candidate: Candidate, trial: _Trial) -> Iterator[Comparison]:
    """The candidate's rule on the reference's probabilities, so that rounding upstream cannot move an exit."""
    prob = trial.out["exit_prob"].astype(np.float32)
    for q in THRESHOLDS:
        yield f"exit_loop@{q:g}", LoopLM.exit_loop(prob, q), candidate.exit_loop(prob, q)
    hidden, model = trial.out["hidden"].astype(np.float32), LoopLM(trial.tensors, trial.config)
    for rule in exits.RULES:
        value = model.exit_statistic(rule, hidden.astype(np.float64))
        for threshold in (1.0, 2.0, 3.0) if rule == "stable" else (0.0, exits.between(value)):
            expected = exits.exit_loop(rule, threshold, value)
            found = candidate.rule_exit(trial.tensors, trial.config, rule, threshold, hidden)
            yield f"exit_rule.{rule}@{threshold:.3g}", expected, found


def _judge_cache(candidate: Candidate, trial: _Trial) -> Iterator[Comparison]:
    """The last state of every prefix, position by position through the cache, against the full forward pass."""
    cached = candidate.cached_hidden(trial.tensors, trial.config, trial.ids)
    for s in range(trial.ids.shape[1]):
        for r, hidden in enumerate(trial.out["hidden"]):
            yield f"cached.prefix{s + 1}.loop{r + 1}.hidden", hidden[:, s], cached[r][:, s]


def _rows(array: Array, spans: list[slice], lead: int) -> Array:
    """The real positions of all rows side by side; `lead` (0 or 1) axes stand before the batch."""
    rows = np.moveaxis(array, lead, 0)
    return np.concatenate(
        [row[:, span] if lead else row[span] for row, span in zip(rows, spans, strict=True)], axis=lead
    )


def _alone(arrays: list[Array], lead: int) -> Array:
    return np.concatenate([array.squeeze(lead) for array in arrays], axis=lead)


def _judge_padding(candidate: Candidate, trial: _Trial) -> Iterator[Comparison]:
    """Rows of a padded batch against the same rows alone."""
    taps: Taps = []
    out = candidate.forward(trial.tensors, trial.config, trial.ids, start=trial.start, taps=taps)
    found = dict(taps)
    for name, _ in trial.taps:
        expected = _alone([arrays[name] for _, arrays in trial.left_alone], 0)
        yield f"left padding.{name}", expected, _rows(found[name], trial.left, 0) if name in found else None
    hidden = _alone([arrays["hidden"] for arrays, _ in trial.left_alone], 1)
    for name in OUTPUTS:
        expected = _alone([arrays[name] for arrays, _ in trial.left_alone], 1)
        yield f"left padding.{name}", expected, _rows(out[name], trial.left, 1)
    cached = candidate.cached_hidden(trial.tensors, trial.config, trial.ids, trial.start)
    yield "left padding.cached.hidden", hidden, _rows(cached, trial.left, 1)
    out = candidate.forward(trial.tensors, trial.config, trial.ids)
    for name in OUTPUTS:
        expected = _alone([arrays[name] for arrays, _ in trial.right_alone], 1)
        yield f"right padding.{name}", expected, _rows(out[name], trial.right, 1)


def _judge_gradients(candidate: Candidate, trial: _Trial) -> Iterator[Comparison]:
    for label, expected, target, start in (
        ("stage1", trial.stage1, trial.target, None),
        ("left padding.stage1", trial.padded_stage1, trial.padded_target, trial.start),
    ):
        found = candidate.stage1(trial.tensors, trial.config, trial.ids, target, ENTROPY_WEIGHT, start)
        for name in ("loss", "objective"):
            yield f"{label}.{name}", expected[name], found.get(name)
        for name in trial.tensors:
            yield f"{label}.grad/{name}", expected["grads"][name], found["grads"].get(name)
