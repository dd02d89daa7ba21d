"""A first training compiles on two cores: compilers of one process wait for each other, those of two do not."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np

from .config import ModelConfig
from .gradient import GradientWorkspace, gradient
from .kernels.jit import JIT_DISABLED, cache_folder, kernels_are_cached
from .kernels.product.select import PATHS
from .objectives import StageOne, log_prior
from .settings import InitConfig, TrainConfig
from .threads import available_threads
from .weights import initialise

SHAPE = ModelConfig(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=32,
    total_ut_steps=2,
)  # of the model that kernels are compiled with


def compile_gradient() -> None:
    """What a training step compiles besides matrix products: attention in bf16, too, where it may be chosen."""
    train, loops = TrainConfig(), SHAPE.total_ut_steps
    ids, target = np.zeros((1, 16), np.int64), np.ones((1, 16), np.int64)
    objective = StageOne(train.entropy_weight, log_prior(train.prior, loops))
    rounding = [name for name in ("tiles", "pairs") if not PATHS[name].missing()]
    for name in ("blas", *rounding[:1]):
        workspace = GradientWorkspace(SHAPE, *ids.shape, threads=1, path=PATHS[name])
        gradient(initialise(SHAPE, InitConfig(), seed=0), workspace, ids, target, objective)


@contextlib.contextmanager
def compiling_beside(sharing: int = 1) -> Iterator[Callable[[], object]]:
    """Another process does `compile_gradient` while the block runs; what is given waits for it.

    Not where kernels are there already, nor where the `sharing` processes that train have no core to spare.  Whatever
    becomes of it, kernels that it has not left are compiled when they are called.
    """
    kept = cache_folder() is not None and not JIT_DISABLED  # else what another process compiles is of no use
    if kernels_are_cached() or not kept or available_threads() // sharing < 2:
        yield lambda: None
        return
    command = [sys.executable, "-c", f"from {__name__} import compile_gradient; compile_gradient()"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other:
        try:
            yield other.wait
        finally:
            other.kill()
