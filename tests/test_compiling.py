"""The process that compiles beside a first training: it leaves what training calls, and never more than it should."""

import os
import pathlib
import subprocess
import sys

import pytest

from looplm import compiling
from looplm.kernels import jit

# Compiled forms of a kernel by its name: after what the second process does, and after a training step.
BOTH = """
import importlib, pkgutil, numpy as np
import looplm.kernels as kernels
from looplm import compiling
from looplm.data import TextSource
from looplm.settings import InitConfig, TrainConfig
from looplm.training import Trainer
from looplm.weights import initialise

def forms():
    modules = [importlib.import_module(one.name) for one in pkgutil.iter_modules(kernels.__path__, "looplm.kernels.")]
    called = {f"{m.__name__}.{n}": f for m in modules for n, f in vars(m).items() if hasattr(f, "signatures")}
    return {name: len(function.signatures) for name, function in called.items() if "adamw" not in name}

compiling.compile_gradient()
left = forms()
ids = np.arange(200, dtype=np.uint16) % 32
source = TextSource(ids, ids, 2, 16, 0, 1.0, 32)
how = TrainConfig(steps=1, batch_size=2, seq_len=16, kernels="blas", threads=1)
Trainer(initialise(compiling.SHAPE, InitConfig(), seed=0), source, how).step()
assert left["looplm.kernels.attention._attend_backward"] == 1, left
print({name: count for name, count in forms().items() if count != left[name]})
"""


def test_a_training_step_calls_what_the_other_process_compiles() -> None:
    ran = subprocess.run([sys.executable, "-c", BOTH], capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("{}", "")


# What training and decoding give, in digits that differ if a bit does.
RESULTS = """
import hashlib, numpy as np
from looplm import kernels
from looplm.config import ModelConfig
from looplm.generation import Session
from looplm.gradient import GradientWorkspace, gradient
from looplm.kernels import choice
from looplm.kernels.product.select import PATHS
from looplm.objectives import StageOne, log_prior
from looplm.settings import InitConfig
from looplm.weights import initialise

config = ModelConfig(vocab_size=97, hidden_size=96, intermediate_size=160, num_hidden_layers=1, num_attention_heads=3,
                     num_key_value_heads=3, head_dim=32, total_ut_steps=2, max_position_embeddings=256)
weights = initialise(config, InitConfig(), seed=0)
ids = np.random.default_rng(0).integers(0, 97, (2, 128))
for name in ("panels", "blas", "pairs", "tiles"):
    if PATHS[name].missing():
        continue
    workspace = GradientWorkspace(config, *ids.shape, threads=1, path=PATHS[name])
    gradient(weights, workspace, ids, ids[::-1], StageOne(0.1, log_prior("uniform", 2)))
    print(name, hashlib.sha256(workspace.total.contiguous().tobytes()).hexdigest())
session = Session(weights)
states = [session.feed(ids[:1]).hidden, *(session.feed(ids[1:, i : i + 1]).hidden for i in range(40))]
logits = np.random.default_rng(1).standard_normal(5000, np.float32)
print(choice.choose(logits, 0.7, 0.3), choice.log_total(logits))
print(kernels.prediction_kl(logits[None], logits[None] * 0.5))
print("decoding", hashlib.sha256(np.concatenate(states, axis=2).tobytes()).hexdigest())
"""


@pytest.mark.skipif(jit.JIT_DISABLED, reason="nothing is compiled")
def test_kernels_just_compiled_give_the_bits_of_those_from_the_cache(tmp_path: pathlib.Path) -> None:
    found = []
    for _ in ("compiles", "loads"):
        ran = subprocess.run(
            [sys.executable, "-c", RESULTS],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        found.append(ran.stdout)
        assert list(tmp_path.rglob("*.nbc"))
    assert found[0] == found[1]


def first_time(monkeypatch: pytest.MonkeyPatch, cores: int = 2) -> None:
    monkeypatch.setattr(compiling, "kernels_are_cached", lambda: False)
    monkeypatch.setattr(compiling, "available_threads", lambda: cores)


def test_the_first_time_another_process_compiles_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    first_time(monkeypatch)
    with compiling.compiling_beside() as compiled:
        assert compiled() == 0


def test_whoever_leaves_early_leaves_nobody_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    first_time(monkeypatch)
    begun: list[subprocess.Popen[bytes]] = []
    kind = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: begun.append(kind(*args, **more)) or begun[0])
    with pytest.raises(KeyboardInterrupt), compiling.compiling_beside():
        raise KeyboardInterrupt
    assert begun[0].poll() not in (None, 0)


@pytest.mark.parametrize(("cores", "sharing"), [(1, 1), (2, 2)])
def test_without_a_core_to_spare_there_is_no_other_process(
    monkeypatch: pytest.MonkeyPatch, cores: int, sharing: int
) -> None:
    first_time(monkeypatch, cores)
    with compiling.compiling_beside(sharing) as compiled:
        assert compiled() is None


def test_with_kernels_there_already_there_is_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    first_time(monkeypatch)
    monkeypatch.setattr(compiling, "kernels_are_cached", lambda: True)
    with compiling.compiling_beside() as compiled:
        assert compiled() is None
