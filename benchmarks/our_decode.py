"""Our side of the decoding benchmark: greedy tokens after a prompt, all loops, random weights in one stored format.

    python benchmarks/our_decode.py --config small --format int8        then one line on standard input per round

With --read-bytes it is no model but a reading of so many bytes, as fast as this machine reads: the limit of decoding.
"""

import argparse
import math
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from benchmarks.side_by_side import DECODE_CONFIGS, LOOPS, Answer, peak_mib, serve
from looplm.arrays import Array, Floats, aligned_empty
from looplm.config import ModelConfig
from looplm.generation import Session
from looplm.kernels.jit import njit
from looplm.quantization import FORMATS, Quantization
from looplm.stored import PROMPT_PRECISIONS, StoredMatrix, StoredWeights, is_matrix
from looplm.threads import run_all, shards
from looplm.weights import parameter_table

NEW = 1 << 14  # positions that there is room for
POOL = 1 << 20  # random numbers; weights repeat them


def model_config(name: str) -> ModelConfig:
    sizes = DECODE_CONFIGS[name]
    return ModelConfig(
        hidden_size=sizes["d"],
        num_hidden_layers=sizes["L"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"],
        head_dim=sizes["d"] // sizes["heads"],
        intermediate_size=sizes["ff"],
        vocab_size=sizes["vocab"],
        total_ut_steps=LOOPS,
        max_position_embeddings=NEW,
        rope_theta=1e6,
    )


def random_weights(config: ModelConfig, chosen: str) -> StoredWeights:
    """Weights of about N(0, 0.02), made in their format: a model of floats need not fit beside it."""
    rng = np.random.default_rng(0)
    floats = rng.standard_normal(POOL, np.float32) * np.float32(0.02)
    words, codes = (floats.view(np.uint32) >> np.uint32(16)).astype(np.uint16), rng.integers(1, 256, POOL, np.uint8)
    quantization = Quantization(chosen) if chosen in FORMATS else None
    matrices, others = {}, {}
    for parameter in parameter_table(config):
        if not is_matrix(parameter.name):
            others[parameter.name] = np.full(parameter.shape, 0.0 if "gate" in parameter.name else 1.0, np.float32)
            continue
        shape = (parameter.shape[0], parameter.shape[1])
        kind = quantization.format_of(parameter.name) if quantization else chosen
        if kind in FORMATS:
            layout = FORMATS[kind]
            scale = np.float32(0.02 / (60 if kind == "int8" else 4)).view(np.uint32) >> np.uint32(16)
            scales = np.full(layout.scales_shape(shape), scale, np.uint16)
            matrices[parameter.name] = StoredMatrix(kind, shape, aligned(codes, layout.codes_shape(shape)), scales)
        else:
            kind = kind or "bfloat16"
            matrices[parameter.name] = StoredMatrix(kind, shape, aligned(floats if kind == "float32" else words, shape))
    return StoredWeights(config, matrices, others)


def aligned(numbers: Array, shape: tuple[int, ...]) -> Array:
    """Numbers over and over, from a cache line on, as tensors lie in a file that this project wrote."""
    size = math.prod(shape)
    made = aligned_empty((-(-size * numbers.itemsize // 4),)).view(numbers.dtype)[:size]
    for begin in range(0, size, numbers.size):
        made[begin : begin + numbers.size] = numbers[: size - begin]
    return made.reshape(shape)


class Decoding:
    """A session after its prompt, that answers rounds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.weights = random_weights(model_config(args.config), args.format)
        self.seconds = args.round_seconds
        most = args.prompt + 64
        self.session = Session(self.weights, threads=args.threads, capacity=most, kv_dtype="bfloat16")
        ids = np.random.default_rng(1).integers(1, self.weights.config.vocab_size, args.prompt)
        self.prefill: dict[str, float] = {}  # tokens/s per pass, by precision
        for precision in 2 * PROMPT_PRECISIONS:  # the first round loads the kernels
            self.weights.prompt_precision, self.session.cache.filled = precision, 0
            began = time.perf_counter()
            self.session.feed(ids[None])
            self.prefill[precision] = args.prompt * LOOPS / (time.perf_counter() - began)
        self.prompt, self.token = args.prompt, np.zeros(1, np.int64)
        self.exit_at = np.full(1, LOOPS - 1, np.int64)
        for _ in range(4):
            began = time.perf_counter()
            self.decode()
            self.token_seconds = time.perf_counter() - began

    def decode(self) -> None:
        """One token: all loops, gates, head, the most likely next."""
        session = self.session
        if session.filled >= self.prompt + 60:
            session.cache.filled = self.prompt  # the same length in every round
        session.begin(self.token)
        for _ in range(LOOPS):
            session.next_loop()
        session.finish(self.exit_at)
        self.token[0] = session.logits(self.exit_at)[0].argmax()

    def answer(self) -> Answer:
        count = max(2, int(self.seconds / self.token_seconds))
        began = time.perf_counter()
        for _ in range(count):
            self.decode()
        rate = count / (time.perf_counter() - began)
        return {"tokens_per_s": rate, "gb_per_s": rate * self.weights.bytes_per_token / 1e9, "peak_mib": peak_mib()}


@njit
def read(numbers: Floats) -> float:
    """Their sum: nothing can be left out."""
    total = np.float32(0.0)
    for i in range(numbers.size):
        total += numbers[i]
    return total


def reading(count: int, threads: int, seconds: float) -> Callable[[], Answer]:
    numbers = aligned_empty((count // 4,))
    numbers[:] = 1.0
    parts = [numbers[part] for part in shards(numbers.size, threads)]
    run_all(read, parts)

    def answer() -> Answer:
        best, end = 0.0, time.perf_counter() + seconds
        while time.perf_counter() < end or not best:
            began = time.perf_counter()
            run_all(read, parts)
            best = max(best, numbers.nbytes / (time.perf_counter() - began) / 1e9)
        return {"gb_per_s": best}

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(DECODE_CONFIGS), default="small")
    parser.add_argument("--format", choices=["float32", "bfloat16", "int8", "int4"], default="bfloat16")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--round-seconds", type=float, default=2.0)
    parser.add_argument("--read-bytes", type=int, default=0)
    args = parser.parse_args()

    def prepare() -> tuple[Answer, Callable[[], Answer]]:
        if args.read_bytes:
            return {}, reading(args.read_bytes, args.threads, args.round_seconds)
        decoding = Decoding(args)
        weights = decoding.weights
        ready = {
            "kernel_path": f"streams, {args.format}",
            "weight_bytes": weights.nbytes,
            "bytes_per_token": weights.bytes_per_token,
            "prefill_tokens_per_s_per_pass": decoding.prefill,
        }
        return ready, decoding.answer

    serve(prepare)


if __name__ == "__main__":
    main()
