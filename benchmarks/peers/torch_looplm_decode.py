"""PyTorch's side of the decoding benchmark: greedy decoding of a LoopLM with a key/value cache, random weights.

Every loop keeps its own cache (R x L caches), as the published code does by default; the exit gate is evaluated, no
early exit taken.  Variants: eager | compile (the step through inductor, static cache).

    python benchmarks/peers/torch_looplm_decode.py --config ouro1.4b --dtype bf16 --variants eager --new 32

measures variants in turns within one process and prints one JSON object, prefill of --prompt tokens included.  With
--serve it is one side of benchmarks/decode.py, for one variant.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from benchmarks.side_by_side import DECODE_CONFIGS, LOOPS, Answer, peak_mib, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_NEW = 64  # new positions before a side starts from its prompt again


def weight(n, k, dtype):
    return nn.Parameter(torch.empty(n, k, dtype=dtype).normal_(0, 0.02), requires_grad=False)


class Layer(nn.Module):
    def __init__(self, d, heads, ff, dtype):
        super().__init__()
        self.h = heads
        self.qkv, self.o = weight(3 * d, d, dtype), weight(d, d, dtype)
        self.gu, self.down = weight(2 * ff, d, dtype), weight(d, ff, dtype)
        self.norms = nn.Parameter(torch.ones(4, d, dtype=dtype), requires_grad=False)

    def forward(self, x, cos, sin, kc, vc, pos, n):
        batch, length, d = x.shape

        def rn(z, i):
            return F.rms_norm(z, (d,), self.norms[i], 1e-6)

        def rot(z):
            return z * cos + torch.cat([-z[..., hh:], z[..., :hh]], -1) * sin

        parts = F.linear(rn(x, 0), self.qkv).chunk(3, -1)
        q, k, v = (z.view(batch, length, self.h, -1).transpose(1, 2) for z in parts)
        hh = q.shape[-1] // 2
        q, k = rot(q), rot(k)
        kc[:, :, pos : pos + length] = k
        vc[:, :, pos : pos + length] = v
        a = F.scaled_dot_product_attention(q, kc[:, :, :n], vc[:, :, :n], is_causal=length > 1)
        x = x + rn(F.linear(a.transpose(1, 2).reshape(batch, length, d), self.o), 1)
        g, u = F.linear(rn(x, 2), self.gu).chunk(2, -1)
        return x + rn(F.linear(F.silu(g) * u, self.down), 3)


class LoopLM(nn.Module):
    def __init__(self, d, L, heads, ff, vocab, *, dtype, loops, positions):
        super().__init__()
        self.d, self.h, self.loops, self.positions, self.dtype = d, heads, loops, positions, dtype
        self.emb, self.head, self.gate = weight(vocab, d, dtype), weight(vocab, d, dtype), weight(1, d, dtype)
        self.layers = nn.ModuleList(Layer(d, heads, ff, dtype) for _ in range(L))
        self.norm = nn.Parameter(torch.ones(d, dtype=dtype), requires_grad=False)
        dh = d // heads
        inv = 1e6 ** (-torch.arange(0, dh, 2, dtype=torch.float32) / dh)
        ang = torch.arange(positions, dtype=torch.float32)[:, None] * inv
        ang = torch.cat([ang, ang], -1)
        self.cos, self.sin = ang.cos().to(dtype), ang.sin().to(dtype)

    def cache(self, batch):
        shape = (self.loops, len(self.layers), 2, batch, self.h, self.positions, self.d // self.h)
        return torch.zeros(shape, dtype=self.dtype)

    def forward(self, idx, cache, pos):
        x = F.embedding(idx, self.emb)
        length = idx.shape[1]
        cos, sin = self.cos[pos : pos + length], self.sin[pos : pos + length]
        for r in range(self.loops):
            for i, layer in enumerate(self.layers):
                x = layer(x, cos, sin, cache[r, i, 0], cache[r, i, 1], pos, pos + length)
            x = F.rms_norm(x, (self.d,), self.norm, 1e-6)
            F.linear(x[:, -1], self.gate)  # the exit gate is evaluated, no early exit taken
        return F.linear(x[:, -1], self.head).argmax(-1, keepdim=True)


class Runner:
    """One variant: prompt twice (the first is warm-up), four tokens, then rounds."""

    def __init__(self, variant: str, model: LoopLM, args: argparse.Namespace) -> None:
        self.args, self.model = args, model
        self.step = torch.compile(model, dynamic=True) if variant == "compile" else model
        self.cache, self.rates, self.prefill = model.cache(args.batch), [], []
        prompt = torch.randint(0, model.emb.shape[0], (args.batch, args.prompt))
        for _ in range(2):
            began = time.perf_counter()
            self.token = model(prompt, self.cache, 0)
            self.prefill.append(args.batch * args.prompt / (time.perf_counter() - began))
        self.pos = args.prompt
        began = time.perf_counter()
        for _ in range(4):
            self.decode()
        self.warm_s = time.perf_counter() - began
        began = time.perf_counter()
        self.decode()
        self.token_s = time.perf_counter() - began

    def decode(self) -> None:
        if self.pos >= self.model.positions:
            self.pos = self.args.prompt
        self.token = self.step(self.token, self.cache, self.pos)
        self.pos += 1

    def round(self) -> float:
        """Tokens per second over one round."""
        count = self.args.new or max(2, int(self.args.round_seconds / self.token_s))
        began = time.perf_counter()
        for _ in range(count):
            self.decode()
        self.rates.append(self.args.batch * count / (time.perf_counter() - began))
        return self.rates[-1]


def weight_bytes(model: LoopLM) -> tuple[int, int]:
    """Of the stack and of the head."""
    stack = sum(p.numel() * p.element_size() for p in model.layers.parameters())
    return stack, model.head.numel() * model.head.element_size()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(DECODE_CONFIGS), default="small512")
    parser.add_argument("--R", type=int, default=LOOPS)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--variants", default="eager")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=0, help="tokens per round (0: as many as fit --round-seconds)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-seconds", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve", action="store_true", help="be a side of benchmarks/decode.py")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if "OMP_NUM_THREADS" not in os.environ:  # read at the start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": str(args.threads)})
    torch.set_num_threads(args.threads)
    variants = args.variants.split(",")
    positions = args.prompt + (args.new * (args.rounds + 1) + 8 if args.new else MOST_NEW)
    with torch.inference_mode():
        model = LoopLM(**DECODE_CONFIGS[args.config], dtype=DTYPES[args.dtype], loops=args.R, positions=positions)
        if args.serve:

            def prepare() -> tuple[Answer, Callable[[], Answer]]:
                runner = Runner(variants[0], model, args)
                ready = {
                    "torch": torch.__version__,
                    "bytes_per_token": args.R * weight_bytes(model)[0] + weight_bytes(model)[1],
                    "prefill_tokens_per_s_per_pass": args.R * max(runner.prefill),
                }
                return ready, lambda: {"tokens_per_s": runner.round(), "peak_mib": peak_mib()}

            serve(prepare)
            return
        runners = {variant: Runner(variant, model, args) for variant in variants}
        for _ in range(args.rounds):
            for runner in runners.values():
                runner.round()
    print(json.dumps(report(args, model, runners)))


def report(args: argparse.Namespace, model: LoopLM, runners: dict[str, Runner]) -> Answer:
    stack, head = weight_bytes(model)
    found: Answer = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "config": args.config,
        **DECODE_CONFIGS[args.config],
        "R": args.R,
        "dtype": args.dtype,
        "batch": args.batch,
        "prompt": args.prompt,
        "weight_bytes_per_token": args.R * stack + head,
        "peak_rss_mib": round(peak_mib(), 1),
        "variants": {},
    }
    for variant, runner in runners.items():
        rate = statistics.median(runner.rates)
        found["variants"][variant] = {
            "tokens_per_s": round(rate, 3),
            "min": round(min(runner.rates), 3),
            "max": round(max(runner.rates), 3),
            "warm_s": round(runner.warm_s, 2),
            "prefill_tokens_per_s": round(max(runner.prefill), 2),
            "weight_gb_per_s": round(rate / args.batch * (args.R * stack + head) / 1e9, 2),
        }
    return found


if __name__ == "__main__":
    main()
