"""A long prompt takes the memory of its keys and values, and beyond them no more than a short one."""

import pathlib
import subprocess
import sys

import pytest

SLACK = 10 << 20  # what a longer prompt may take beyond its keys and values: its ids, and scores for a row of them

SCRIPT = """
import dataclasses, pathlib, sys
import numpy as np
from looplm import generation
from looplm.exits import LearnedGate
from looplm.sampling import GREEDY
from looplm.sizes import key_value_bytes
from random_models import CONFIG, random_weights

def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

def run(length):
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, length)
    settings = {"rule": LearnedGate(1.0), "rng": np.random.default_rng(0), "sampling": GREEDY, "kv_dtype": kv_dtype}
    return list(generation.generate(weights, prompt, max_new_tokens=2, threads=2, **settings))

kv_dtype, chunk, *lengths = sys.argv[1], *map(int, sys.argv[2:])
sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "total_ut_steps": 2, "head_dim": 16}
config = dataclasses.replace(CONFIG, max_position_embeddings=max(lengths) + 2, **sizes)
weights = random_weights(config)
generation.PREFILL_ROWS = chunk or generation.PREFILL_ROWS
run(600)
for length in lengths:
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run(length)
    print(status("VmHWM") - before, (length + 2) * key_value_bytes(config, config.total_ut_steps, kv_dtype))
"""

linux = pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's to tell")


def peaks(kv_dtype: str, *lengths: int, chunk: int = 0) -> list[tuple[int, int]]:
    """For each length in turn: bytes by which the peak grows, and bytes of keys and values."""
    here = str(pathlib.Path(__file__).parent)
    command = [sys.executable, "-c", SCRIPT, kv_dtype, str(chunk), *map(str, lengths)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=here)
    return [(int(grown), int(size)) for grown, size in (line.split() for line in result.stdout.splitlines())]


@linux
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_memory_grows_with_the_cache_alone(kv_dtype: str) -> None:
    for grown, size in peaks(kv_dtype, 1000, 5000):
        assert size - SLACK < grown < size + SLACK


@linux
def test_a_prompt_fed_at_once_is_noticed() -> None:
    ((grown, size),) = peaks("float32", 5000, chunk=5000)
    assert grown > size + SLACK
