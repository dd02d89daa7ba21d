"""The engine in the seat of the judge's candidate: the same code paths as training, decoding and inspection use."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from looplm import kernels, model
from looplm.arrays import Array, Floats, Ints
from looplm.calibration import Gate, gate_gradient
from looplm.config import model_config_from_json
from looplm.exits import LearnedGate, bind, exit_index, make_rule
from looplm.generation import Session
from looplm.gradient import GradientWorkspace, gradient
from looplm.kernels.product.select import PATHS, Path
from looplm.objectives import StageOne, StageTwo
from looplm.settings import TrainConfig
from looplm.training import Optimizer
from looplm.weights import Weights
from looplm_reference.fixture import GATE, next_token

Tensors = Mapping[str, Array]
Config = Mapping[str, Any]


class EngineCandidate:
    """Tensors come under the names of the file, config under those of config.json, as in looplm_reference.judge."""

    name = "engine"

    def __init__(
        self, threads: int = 1, prefill: int = 0, path: Path = PATHS["panels"], recompute: str = "none"
    ) -> None:
        self.threads = threads
        self.prefill = prefill  # positions that `cached_hidden` feeds at once before it goes on one by one
        self.path, self.recompute = path, recompute  # of training steps
        self._latest: tuple[Any, Weights] | None = None

    def _weights(self, tensors: Tensors, config: Config) -> Weights:
        if self._latest is None or self._latest[0] is not tensors:
            floats = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
            self._latest = tensors, Weights.from_tensors(model_config_from_json(config, "the fixture"), floats)
        return self._latest[1]

    def forward(
        self,
        tensors: Tensors,
        config: Config,
        input_ids: Ints,
        start: Ints | None = None,
        taps: list[tuple[str, Array]] | None = None,
    ) -> dict[str, Array]:
        weights = self._weights(tensors, config)
        trace = model.forward(weights, input_ids, start=start, threads=self.threads, taps=taps)
        logits = np.stack([trace.logits(r) for r in range(len(trace.hidden))])
        return {
            "hidden": trace.hidden,
            "logits": logits,
            "gate_logit": trace.gate_logit,
            "exit_prob": trace.exit_prob,
        }

    def stage1(
        self,
        tensors: Tensors,
        config: Config,
        input_ids: Ints,
        target: Ints,
        entropy_weight: float,
        start: Ints | None = None,
    ) -> dict[str, Any]:
        weights = self._weights(tensors, config)
        batch, length = input_ids.shape
        workspace = self._workspace(weights, batch, length)
        report = gradient(weights, workspace, input_ids, target, self._stage1(weights, entropy_weight), start)
        loss = model.forward(weights, input_ids, start=start, threads=self.threads).token_loss(target)
        objective = report.objective / max(1, report.tokens)
        return {"loss": loss, "objective": objective, "grads": workspace.total.tensors}

    def _workspace(self, weights: Weights, batch: int, length: int) -> GradientWorkspace:
        return GradientWorkspace(weights.config, batch, length, self.threads, self.recompute, self.path)

    def _stage1(self, weights: Weights, entropy_weight: float) -> StageOne:
        return StageOne(entropy_weight, np.zeros(weights.config.total_ut_steps, np.float32))

    def stage2(self, tensors: Tensors, config: Config, input_ids: Ints, target: Ints) -> dict[str, Any]:
        weights, counted = self._weights(tensors, config), target >= 0
        trace = model.forward(weights, input_ids, threads=self.threads)
        loss, hidden = trace.token_loss(target)[:, counted], trace.hidden[:, counted]
        gate = Gate(weights.gate_weight, weights.gate_bias)
        value, dweight, dbias = gate_gradient(gate, hidden, loss, StageTwo("paper"))
        return {"objective": value, "grads": dict(zip(GATE, (dweight, dbias), strict=True))}

    def cached_hidden(
        self,
        tensors: Tensors,
        config: Config,
        input_ids: Ints,
        start: Ints | None = None,
    ) -> Floats:
        weights = self._weights(tensors, config)
        session = Session(weights, batch=len(input_ids), start=start, policy="full")
        states = [session.feed(input_ids[:, : self.prefill]).hidden] if self.prefill else []
        last = np.full(len(input_ids), session.loops - 1, np.int64)
        for s in range(self.prefill, input_ids.shape[1]):
            session.begin(np.ascontiguousarray(input_ids[:, s]))
            for _ in range(session.loops):
                session.next_loop()
            session.finish(last)
            states.append(session.hidden[:, :, None].copy())
        return np.concatenate(states, axis=2)

    def exit_loop(self, exit_prob: Floats, exit_threshold: float) -> Ints:
        return kernels.exit_loop(exit_prob, exit_threshold)[0]

    def rule_exit(self, tensors: Tensors, config: Config, rule: str, threshold: float, hidden: Floats) -> Ints:
        loops, batch, length, width = hidden.shape
        states, unused = hidden.reshape(loops, -1, width), np.zeros((loops, batch * length), np.float32)
        bound = bind(make_rule(rule, threshold), self._weights(tensors, config))
        return exit_index(bound, states, unused).reshape(batch, length)

    def greedy(
        self,
        tensors: Tensors,
        config: Config,
        input_ids: Ints,
        exit_threshold: float,
        new_tokens: int,
    ) -> Ints:
        """Cached decoding in which all loops run: what decoding computes, without its saving."""
        weights, ids = self._weights(tensors, config), np.ascontiguousarray(input_ids)
        rule = LearnedGate(min(exit_threshold, 1.0))
        session = Session(weights, batch=len(ids), policy="full")
        trace = session.feed(ids)
        states, gate_logit = trace.hidden[:, :, -1], np.ascontiguousarray(trace.gate_logit[:, :, -1])
        exit_at = exit_index(rule, states, gate_logit)
        logits = weights.logits(states[exit_at, np.arange(len(ids))])
        for made in range(1, new_tokens + 1):
            token = logits.argmax(-1)
            ids = np.concatenate([ids, token[:, None]], axis=1)
            if made < new_tokens:
                logits = session.logits(session.advance(token, rule))
        return ids

    def adamw(
        self,
        tensors: Tensors,
        config: Config,
        batches: Ints,
        settings: Mapping[str, float],
    ) -> Array:
        weights = self._weights(tensors, config).copy()
        how = TrainConfig(
            beta1=settings["beta1"],
            beta2=settings["beta2"],
            adam_eps=settings["eps"],
            weight_decay=settings["weight_decay"],
            clip=settings["clip"],
        )
        optimizer = Optimizer(weights, how)
        _, batch, length = batches.shape
        workspace = self._workspace(weights, batch, length)
        objective, losses = self._stage1(weights, settings["entropy_weight"]), []
        for step, ids in enumerate(batches, 1):
            report = gradient(weights, workspace, ids, next_token(ids), objective)
            losses.append(report.objective / report.tokens)
            optimizer.update(workspace.total.contiguous(), step, settings["learning_rate"])
        return np.array(losses)
