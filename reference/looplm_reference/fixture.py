"""The fixture folder: a model, and what an independent implementation answered for it.

FOLDER/model/           a model folder in the Hugging Face layout
FOLDER/expected.npz     any of the arrays below; input_ids is required, other names are ignored and listed as such
FOLDER/fixture.yaml     optional: origin, tolerance, entropy_weight, adamw; read by whoever calls `load`

hidden RBSD · logits RBSV · gate_logit, exit_prob RBS · exit_logits@Q, expected_logits BSV · loss R B S-1
stage1_loss, stage2_loss scalars · grad/NAME, stage2_grad/NAME as the tensor
greedy@Q B S' with greedy_prompt, a scalar
tap/loop1.layer1.NAME and so on: what a layer computes, under the names of LoopLM.forward's taps
adamw_loss N with adamw_input_ids N B S: Stage I loss on each batch before the update it causes
"""

import dataclasses
import functools
import pathlib
import re
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from .judge import tensor_shapes
from .model import PER_LAYER, LoopLM
from .model_folder import read_config, read_tensors
from .ops import Array

TOLERANCE = 1e-4
ENTROPY_WEIGHT = 0.05
NUMBERS = ("tolerance", "entropy_weight")
ADAMW = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "clip", "entropy_weight")
BY_REFERENCE = "a model alone; expected is what the reference answers"
INPUTS = {"input_ids", "greedy_prompt", "adamw_input_ids"}  # what other arrays are computed from
GATE = ("model.early_exit_gate.weight", "model.early_exit_gate.bias")
AT_THRESHOLD = re.compile(r"(exit_logits|greedy)@(\d+(?:\.\d*)?|\.\d+)")


class FixtureError(ValueError):
    """The folder is no fixture; the text says which file and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Fixture:
    """What a folder holds, with shapes that fit the model; `tensors` as the judge's own reader found them."""

    folder: pathlib.Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Array]
    expected: Mapping[str, Array]
    ignored: list[str]  # arrays of expected.npz whose names mean nothing here
    tolerance: float = TOLERANCE
    entropy_weight: float = ENTROPY_WEIGHT
    adamw: Mapping[str, float] = dataclasses.field(default_factory=dict)
    origin: str = ""

    @property
    def input_ids(self) -> Array:
        return self.expected["input_ids"]

    @functools.cached_property
    def answers(self) -> Mapping[str, Array]:
        """The reference's own forward pass."""
        return LoopLM(self.tensors, self.config).forward(self.input_ids)


def next_token(input_ids: Array) -> Array:
    """BS: the target of each position; the last has none."""
    return np.concatenate([input_ids[:, 1:], np.full((len(input_ids), 1), -1)], axis=1)


def tap_names(config: Mapping[str, Any]) -> list[str]:
    """Names of all intermediate arrays, in forward order."""
    return [
        f"loop{r}.layer{layer}.{name}"
        for r in range(1, config["total_ut_steps"] + 1)
        for layer in range(1, config["num_hidden_layers"] + 1)
        for name in PER_LAYER
    ]


def load(folder: str | pathlib.Path, settings: Mapping[str, Any] | None = None) -> Fixture:
    """Read a fixture folder; `settings` is what its fixture.yaml says.

    Raises: FixtureError naming the file, if anything is missing, does not fit, or there is nothing to compare.
    """
    path, given = pathlib.Path(folder), dict(settings or {})
    try:
        config, tensors = read_config(path / "model"), read_tensors(path / "model")
        with (path / "expected.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
            expected = {name: stored[name] for name in stored.files}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise FixtureError(f"{path} is no fixture folder: {error}") from error
    missing = sorted(tensor_shapes(config).keys() - tensors.keys())
    if missing:
        raise FixtureError(f"{path}/model lacks {', '.join(missing)}")
    numbers = {name: _number(path, name, value) for name, value in given.items() if name in NUMBERS}
    optimizer = given.get("adamw") or {}
    if not isinstance(optimizer, Mapping):
        raise FixtureError(f"{path}/fixture.yaml: adamw={optimizer!r} is not `key: value` lines")
    adamw = {name: _number(path, f"adamw.{name}", value) for name, value in optimizer.items()}
    known, ignored = _checked(path, config, expected, adamw)
    return Fixture(path, config, tensors, known, ignored, adamw=adamw, origin=str(given.get("origin", "")), **numbers)


def of_model(model: str | pathlib.Path, input_ids: Array) -> Fixture:
    """A model folder alone as a fixture: expected is what the reference itself answers, layer by layer.

    So a candidate is judged by it, with its own reading of the folder, where nobody else's answers are at hand.
    """
    path = pathlib.Path(model)
    config, tensors, taps = read_config(path), read_tensors(path), list[tuple[str, Array]]()
    answers = LoopLM(tensors, config).forward(input_ids, taps=taps)
    inner = {f"tap/{name}": value for name, value in taps if name in set(tap_names(config))}
    return Fixture(path, config, tensors, {"input_ids": input_ids, **inner, **answers}, [], origin=BY_REFERENCE)


def _number(path: pathlib.Path, name: str, value: Any) -> float:
    try:
        number = float(value)  # YAML reads 1e-4 as text
    except (TypeError, ValueError):
        number = np.nan
    if not 0.0 <= number < np.inf:
        raise FixtureError(f"{path}/fixture.yaml: {name}={value!r} is not a number of 0 or more")
    return number


def _checked(
    path: pathlib.Path, config: Mapping[str, Any], expected: Mapping[str, Array], adamw: Mapping[str, float]
) -> tuple[dict[str, Array], list[str]]:
    """The arrays known here, in shapes that fit the model, and the names of the others."""
    where = f"{path}/expected.npz"
    ids = expected.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise FixtureError(f"{where}: input_ids (B x S integers) is required")
    shapes = _shapes(config, *ids.shape)
    known, ignored = {}, []
    for name, value in expected.items():
        at_threshold = AT_THRESHOLD.fullmatch(name)
        kind = at_threshold[1] if at_threshold else "layer" if name.startswith("tap/") else name
        if kind == "layer" and name.removeprefix("tap/") not in tap_names(config):
            ignored.append(name)
        elif kind in shapes:
            known[name] = _fitting(where, name, value, shapes[kind])
        elif name.startswith(("grad/", "stage2_grad/")):
            raise FixtureError(f"{where}: {name} is no tensor of the model, or not of its gate")
        else:
            ignored.append(name)
    for needed, by in (("greedy_prompt", "greedy@"), ("adamw_input_ids", "adamw_loss")):
        if any(name.startswith(by) for name in known) and needed not in known:
            raise FixtureError(f"{where}: there is {by} but no {needed}")
    if "adamw_loss" in known and set(adamw) != set(ADAMW):
        raise FixtureError(f"{path}/fixture.yaml: adamw must hold {', '.join(ADAMW)}")
    if not known.keys() - INPUTS:
        raise FixtureError(f"{where} holds nothing to compare")
    for name in ("input_ids", "adamw_input_ids"):
        if name in known and not 0 <= known[name].min() <= known[name].max() < config["vocab_size"]:
            raise FixtureError(f"{where}: {name} has ids outside the vocabulary of {config['vocab_size']}")
    return known, sorted(ignored)


def _shapes(config: Mapping[str, Any], batch: int, length: int) -> dict[str, tuple[int | None, ...] | None]:
    """Kind of array -> its shape; None stands for any size, or any shape at all."""
    loops, width, vocab = config["total_ut_steps"], config["hidden_size"], config["vocab_size"]
    place = (batch, length)
    tensors = tensor_shapes(config)
    return {
        "input_ids": place,
        "hidden": (loops, *place, width),
        "logits": (loops, *place, vocab),
        "gate_logit": (loops, *place),
        "exit_prob": (loops, *place),
        "exit_logits": (*place, vocab),
        "expected_logits": (*place, vocab),
        "loss": (loops, batch, length - 1),
        "stage1_loss": (),
        "stage2_loss": (),
        **{f"grad/{name}": shape for name, shape in tensors.items()},
        **{f"stage2_grad/{name}": tensors[name] for name in GATE},
        "greedy": (batch, None),
        "greedy_prompt": (),
        "layer": None,
        "adamw_input_ids": (None, None, None),
        "adamw_loss": (None,),
    }


def _fitting(where: str, name: str, value: Array, shape: tuple[int | None, ...] | None) -> Array:
    if value.dtype.kind not in "fiu":
        raise FixtureError(f"{where}: {name} holds {value.dtype}, not numbers")
    if shape == () and value.size == 1:
        return value.reshape(())
    sizes = shape if shape is not None else value.shape
    if len(sizes) != value.ndim or any(s not in (None, n) for s, n in zip(sizes, value.shape, strict=True)):
        wanted = " x ".join("N" if size is None else str(size) for size in sizes) or "one number"
        raise FixtureError(f"{where}: {name} has shape {value.shape}, not {wanted}")
    return value
