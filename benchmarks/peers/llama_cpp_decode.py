"""llama.cpp's side of the decoding benchmark: a dense Llama model with the per-loop shape of a LoopLM, random weights.

llama.cpp runs the stack once per token; a looped model does so R times, and the head once.  The looped equivalent is
1 / (R * stack time + head time) with the time split by bytes (`tokens_per_s`; the dense rate is given too).

    pip install llama-cpp-python gguf        builds llama.cpp from source, about ten minutes on two cores
    python benchmarks/peers/llama_cpp_decode.py --config ouro1.4b --type bf16 --dir /tmp

prints one JSON object.  With --serve it is one side of benchmarks/decode.py.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from benchmarks.side_by_side import DECODE_CONFIGS, LOOPS, Answer, BenchmarkError, peak_mib, serve

MOST_NEW = 64  # new positions before a side starts from its prompt again


def write(path: pathlib.Path, sizes: dict[str, int], kind_name: str) -> None:
    """A GGUF file of that shape; token ids only, no tokenizer."""
    import gguf

    kind = gguf.GGMLQuantizationType[kind_name.upper()]
    d, layers, heads, ff, vocab = (sizes[key] for key in ("d", "L", "heads", "ff", "vocab"))
    unfinished = path.with_suffix(".unfinished")
    w = gguf.GGUFWriter(str(unfinished), "llama")
    w.add_context_length(4096)
    w.add_embedding_length(d)
    w.add_block_count(layers)
    w.add_feed_forward_length(ff)
    w.add_head_count(heads)
    w.add_head_count_kv(heads)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_dimension_count(d // heads)
    w.add_rope_freq_base(1e6)
    w.add_vocab_size(vocab)
    w.add_tokenizer_model("none")
    pool = np.random.default_rng(0).standard_normal(1 << 20, np.float32) * np.float32(0.02)

    def matrix(name: str, n: int, k: int) -> None:
        x = np.resize(np.roll(pool, sum(name.encode()) % 1000), (n, k)).astype(np.float32)
        w.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)

    def ones(name: str) -> None:
        w.add_tensor(name, np.ones(d, np.float32))

    matrix("token_embd.weight", vocab, d)
    ones("output_norm.weight")
    matrix("output.weight", vocab, d)
    for i in range(layers):
        ones(f"blk.{i}.attn_norm.weight")
        ones(f"blk.{i}.ffn_norm.weight")
        for name in ("q", "k", "v", "output"):
            matrix(f"blk.{i}.attn_{name}.weight", d, d)
        matrix(f"blk.{i}.ffn_gate.weight", ff, d)
        matrix(f"blk.{i}.ffn_up.weight", ff, d)
        matrix(f"blk.{i}.ffn_down.weight", d, ff)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    unfinished.replace(path)


class Runner:
    """A loaded model after its prompt (fed twice, the first is warm-up) and four tokens."""

    def __init__(self, args: argparse.Namespace) -> None:
        import llama_cpp as ll

        self.ll, self.args, self.sizes = ll, args, DECODE_CONFIGS[args.config]
        path = pathlib.Path(args.dir, f"{args.config}-{args.type}.gguf")
        if not path.exists():
            write(path, self.sizes, args.type)
        with quiet():
            ll.llama_backend_init()
            how = ll.llama_model_default_params()
            if args.no_repack:
                how.use_extra_bufts = False
            self.model = ll.llama_model_load_from_file(str(path).encode(), how)
            p = ll.llama_context_default_params()
            p.n_ctx = args.prompt + max(MOST_NEW, args.new * (args.rounds + 1)) + 64
            p.n_batch = p.n_ubatch = 512
            p.n_threads = p.n_threads_batch = args.threads
            self.context = ll.llama_init_from_model(self.model, p) if self.model else None
        if not self.context:
            raise BenchmarkError(f"llama.cpp could not load {path}", "delete the file, and try --no-repack")
        self.prompt = [int(x) for x in np.random.default_rng(1).integers(1, self.sizes["vocab"], args.prompt)]
        self.decode(self.prompt)
        self.clear()
        began = time.perf_counter()
        self.decode(self.prompt)
        self.prefill = args.prompt / (time.perf_counter() - began)
        self.new, self.rates = 0, []
        for _ in range(4):
            began = time.perf_counter()
            self.decode([5])
            self.token_s = time.perf_counter() - began

    def decode(self, ids: list[int]) -> None:
        array = (self.ll.llama_token * len(ids))(*ids)
        assert self.ll.llama_decode(self.context, self.ll.llama_batch_get_one(array, len(ids))) == 0

    def clear(self) -> None:
        self.ll.llama_memory_clear(self.ll.llama_get_memory(self.context), True)

    def round(self) -> float:
        """Dense tokens per second; the positions of the last round are forgotten first."""
        self.ll.llama_memory_seq_rm(self.ll.llama_get_memory(self.context), -1, len(self.prompt), -1)
        count = self.args.new or min(MOST_NEW, max(2, int(self.args.round_seconds / self.token_s)))
        turns = 1 if self.args.new else max(1, int(self.args.round_seconds / self.token_s) // count)
        seconds = 0.0
        for _ in range(turns):
            self.ll.llama_memory_seq_rm(self.ll.llama_get_memory(self.context), -1, len(self.prompt), -1)
            began = time.perf_counter()
            for i in range(count):
                self.decode([7 + i % 16])
            seconds += time.perf_counter() - began
        self.rates.append(turns * count / seconds)
        return self.rates[-1]

    @property
    def loop_factor(self) -> float:
        """Time of a looped token over that of a dense one, by bytes."""
        d, layers, ff, vocab = (self.sizes[key] for key in ("d", "L", "ff", "vocab"))
        stack, head = layers * (4 * d * d + 3 * d * ff), vocab * d
        return (self.args.R * stack + head) / (stack + head)


class quiet:
    """No messages of llama.cpp on standard error."""

    def __enter__(self) -> None:
        sys.stderr.flush()
        self.kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)

    def __exit__(self, *_: object) -> None:
        os.dup2(self.kept, 2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(DECODE_CONFIGS), default="small512")
    parser.add_argument("--type", choices=["f32", "bf16", "q8_0", "q4_0"], default="bf16")
    parser.add_argument("--R", type=int, default=LOOPS)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=0, help="tokens per round (0: as many as fit --round-seconds)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dir", default=".", help="where the random GGUF file is kept")
    parser.add_argument(
        "--no-repack",
        action="store_true",
        help="plain weight layout; without it llama.cpp may pick AMX buffers, whose q8_0 and q4_0 decoding can crash",
    )
    parser.add_argument("--serve", action="store_true", help="be a side of benchmarks/decode.py")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.serve:

        def prepare() -> tuple[Answer, Callable[[], Answer]]:
            runner = Runner(args)

            def answer() -> Answer:
                dense = runner.round()
                looped = dense / runner.loop_factor
                return {"tokens_per_s": looped, "dense_tokens_per_s": dense, "peak_mib": peak_mib()}

            return {"prefill_tokens_per_s_per_pass": runner.prefill}, answer

        serve(prepare)
        return
    runner = Runner(args)
    for _ in range(args.rounds):
        runner.round()
    rate = statistics.median(runner.rates)
    found = {
        "config": args.config,
        "type": args.type,
        "threads": args.threads,
        "R": args.R,
        "dense_tokens_per_s": round(rate, 2),
        "min": round(min(runner.rates), 2),
        "max": round(max(runner.rates), 2),
        "loop_factor": round(runner.loop_factor, 3),
        "looped_tokens_per_s": round(rate / runner.loop_factor, 3),
        "prefill_tokens_per_s_per_pass": round(runner.prefill, 1),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
