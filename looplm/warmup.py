"""Run every compiled kernel once, in the forms that commands use, so that it is compiled and kept."""

from collections.abc import Iterator
from typing import get_args

import numpy as np

from .analysis import inspect
from .cache import KeyValueType
from .calibration import CalibrateConfig, Gate, fit_gate, observe
from .compiling import SHAPE
from .data import TextSource
from .exits import MEASURED, ExitRule, LearnedGate, bind
from .generation import Session
from .kernels.product.select import measured
from .kernels.product.stored import FEW_ROWS
from .objectives import StageTwo
from .settings import InitConfig, TrainConfig
from .stored import PROMPT_PRECISIONS, Format, convert
from .training import Trainer
from .weights import initialise


def compile_everything() -> Iterator[str]:
    """Each part is named when it is done."""
    rates = measured().rates
    yield f"matrix products: {', '.join(f'{name} {rate:.0f} GFLOP/s' for name, rate in rates.items())}"
    ids = np.random.default_rng(0).integers(0, SHAPE.vocab_size, 200).astype(np.uint16)
    source = TextSource(ids, ids, 2, 16, 0, 1.0, SHAPE.vocab_size)
    weights = initialise(SHAPE, InitConfig(), seed=0)
    for name in rates:
        how = TrainConfig(steps=1, batch_size=2, seq_len=16, kernels=name, threads=1)
        for _ in Trainer(weights, source, how).run():
            pass
    yield "training"
    seen = observe(weights, source.validation(), 64)
    fit_gate(Gate(weights.gate_weight, weights.gate_bias), seen, StageTwo(), CalibrateConfig(steps=1))
    yield "calibration"
    for kv_dtype in get_args(KeyValueType):
        session = Session(weights, threads=2, kv_dtype=kv_dtype)
        for session.weights.prompt_precision in PROMPT_PRECISIONS:
            session.feed(np.zeros((1, FEW_ROWS + 1), np.int64))
        session.feed(np.zeros((1, 1), np.int64))
    rules: list[ExitRule] = [LearnedGate(0.5), *(kind(1.0) for kind in MEASURED.values())]
    for rule in rules:
        session.advance(np.zeros(1, np.int64), bind(rule, weights))
    inspect(weights, np.zeros((1, 8), np.int64))
    yield "generation and inspection"
    for name in get_args(Format):
        convert(weights.head, name).multiply(weights.head[:1])
    yield "quantized weights"
