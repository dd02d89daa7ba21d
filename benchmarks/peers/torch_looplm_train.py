"""PyTorch's side of the training benchmark: the same model, objective and optimizer as its users would write them.

Architecture: token embedding; L decoder layers (attention with rotary positions, SwiGLU, a norm before and after each)
applied R times with shared weights, the final norm at the end of every loop; a head and an exit gate read every normed
state.  Objective: the expected loss over loops minus beta times the exit distribution's entropy.  AdamW, fused.

Variants: eager | eager-fc | compile | compile-layer, each optionally followed by +bf16 (autocast), +ck (activation
checkpointing per layer), +naive (attention written out instead of PyTorch's own).  eager-fc checkpoints head and loss
of each loop, which saves memory.  The cross-entropy is always taken in float32.

    python benchmarks/peers/torch_looplm_train.py --config small --variants eager,compile-layer

measures variants in turns within one process and prints one JSON object; peak_rss_mib is the process's, so for a clean
number run one variant.  With --serve it is one side of benchmarks/train.py, for one variant.
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
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from benchmarks.side_by_side import CONFIGS, LOOPS, SHOWN, Answer, gemm_flops_per_token, peak_mib, serve

# glibc gives memory back and asks for it again at every step unless told not to; with these PyTorch is faster.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


SLOW = 5  # rounds: a step that takes longer is as warm as it gets (bfloat16 without instructions for it)


class RMSNorm(nn.Module):
    def __init__(self, d, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rope_tables(length, channels, base=10000.0):
    inv = base ** (-torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * inv
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rope(x, cos, sin):
    """x: B x heads x S x channels; channel i turns with channel i + channels / 2."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class Layer(nn.Module):
    def __init__(self, d, heads, ff, naive):
        super().__init__()
        self.h, self.naive = heads, naive
        self.n1, self.n2, self.n3, self.n4 = (RMSNorm(d) for _ in range(4))
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.o = nn.Linear(d, d, bias=False)
        self.gu = nn.Linear(d, 2 * ff, bias=False)  # gate and up in one product
        self.down = nn.Linear(ff, d, bias=False)

    def forward(self, x, cos, sin):
        B, S, d = x.shape
        q, k, v = (z.view(B, S, self.h, -1).transpose(1, 2) for z in self.qkv(self.n1(x)).chunk(3, -1))
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        if self.naive:
            s = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5)
            s = s.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), float("-inf"))
            a = s.softmax(-1) @ v
        else:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.n2(self.o(a.transpose(1, 2).reshape(B, S, d)))
        g, u = self.gu(self.n3(x)).chunk(2, -1)
        return x + self.n4(self.down(F.silu(g) * u))


class LoopLM(nn.Module):
    def __init__(self, d, L, heads, ff, vocab, S, R, beta, tied=False, naive=False, ck=False, ck_head=False, **_):
        super().__init__()
        self.R, self.beta, self.ck, self.ck_head = R, beta, ck, ck_head
        self.emb = nn.Embedding(vocab, d)
        self.layers = nn.ModuleList(Layer(d, heads, ff, naive) for _ in range(L))
        self.norm = RMSNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)
        self.gate = nn.Linear(d, 1)
        cos, sin = rope_tables(S, d // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.gate.bias)
        if tied:
            self.head.weight = self.emb.weight

    def head_ce(self, x, y):
        return F.cross_entropy(self.head(x).float().flatten(0, 1), y.flatten(), reduction="none")

    def forward(self, idx, y):
        x = self.emb(idx)
        ces, lam = [], []
        for _ in range(self.R):
            for layer in self.layers:
                x = (
                    checkpoint(layer, x, self.cos, self.sin, use_reentrant=False)
                    if self.ck
                    else layer(x, self.cos, self.sin)
                )
            x = self.norm(x)
            ces.append(checkpoint(self.head_ce, x, y, use_reentrant=False) if self.ck_head else self.head_ce(x, y))
            lam.append(self.gate(x).float().flatten())
        logsurv, logp = 0.0, []
        for r in range(self.R):
            if r < self.R - 1:
                logp.append(logsurv + F.logsigmoid(lam[r]))
                logsurv = logsurv + F.logsigmoid(-lam[r])
            else:
                logp.append(logsurv + torch.zeros_like(lam[r]))
        logp, ce = torch.stack(logp), torch.stack(ces)
        p = logp.exp()
        return ((p * ce).sum(0) + self.beta * (p * logp).sum(0)).mean()


class Runner:
    """One variant: its model, optimizer and batches, warmed up when made."""

    def __init__(self, spec: str, sizes: dict[str, int], args: argparse.Namespace) -> None:
        kind, *more = spec.split("+")
        options = set(more)
        if kind not in ("eager", "eager-fc", "compile", "compile-layer") or not options <= {"bf16", "ck", "naive"}:
            raise SystemExit(f"variant {spec!r} is not known")
        torch.manual_seed(args.seed)
        self.spec, self.sizes, self.args = spec, sizes, args
        self.bf16 = "bf16" in options
        self.model = LoopLM(
            **sizes,
            R=args.R,
            beta=args.beta,
            tied=args.tied,
            naive="naive" in options,
            ck="ck" in options,
            ck_head=kind == "eager-fc",
        )
        self.f: Callable[..., torch.Tensor] = self.model
        if kind == "compile":
            self.f = torch.compile(self.model, dynamic=False)
        elif kind == "compile-layer":
            for layer in self.model.layers:
                layer.compile(dynamic=False)
        how = {"fused": {"fused": True}, "foreach": {"foreach": True}, "forloop": {"foreach": False}}[args.optimizer]
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, **how)
        draw = torch.Generator().manual_seed(1)
        self.data = torch.randint(0, sizes["vocab"], (8, sizes["B"], sizes["S"] + 1), generator=draw)
        self.i, self.rates, self.last = 0, [], 0.0
        began = time.perf_counter()
        self.step()
        self.first_step_s = self.step_s = time.perf_counter() - began
        self.first_loss = self.last
        for _ in range(args.warmup):
            began = time.perf_counter()
            self.step()
            self.step_s = time.perf_counter() - began
            if self.step_s > SLOW * args.round_seconds:
                break

    def step(self) -> None:
        b = self.data[self.i % len(self.data)]
        self.i += 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            loss = self.f(b[:, :-1], b[:, 1:])
        loss.backward()
        if self.args.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        self.last = loss.item()

    def round(self) -> float:
        """Tokens per second over one round."""
        n = self.args.steps or max(1, int(self.args.round_seconds / max(self.step_s, 1e-9)))
        began = time.perf_counter()
        for _ in range(n):
            self.step()
        self.rates.append(n * self.sizes["B"] * self.sizes["S"] / (time.perf_counter() - began))
        return self.rates[-1]


def measured(runners: list[Runner], args: argparse.Namespace) -> Answer:
    """All rounds of all variants, in turns."""
    for _ in range(args.rounds):
        for runner in runners:
            runner.round()
    base = runners[0]
    flops = gemm_flops_per_token(**base.sizes, R=args.R)
    found: Answer = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "config": args.config,
        **base.sizes,
        "R": args.R,
        "params": sum(parameter.numel() for parameter in base.model.parameters()),
        "gemm_mflop_per_token": round(flops / 1e6, 2),
        "optimizer": args.optimizer,
        "clip": args.clip,
        "malloc": "plain" if args.plain_malloc else "tuned",
        "peak_rss_mib": round(peak_mib(), 1),
        "variants": {},
    }
    for runner in runners:
        rate = statistics.median(runner.rates)
        found["variants"][runner.spec] = {
            "tokens_per_s": round(rate, 1),
            "min": round(min(runner.rates), 1),
            "max": round(max(runner.rates), 1),
            "ratio_to_first": round(statistics.median(a / b for a, b in zip(runner.rates, base.rates, strict=True)), 3),
            "gemm_gflops": round(rate * flops / 1e9, 1),
            "first_step_s": round(runner.first_step_s, 2),
            "first_loss": round(runner.first_loss, 4),
            "last_loss": round(runner.last, 4),
        }
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(CONFIGS), default="small", metavar="|".join(SHOWN))
    for key in CONFIGS["small"]:
        parser.add_argument("--" + key, type=int, help="instead of the configuration's")
    parser.add_argument("--R", type=int, default=LOOPS)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--variants", default="eager", help="separated by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=0, help="per round (0: as many as fit --round-seconds)")
    parser.add_argument("--round-seconds", type=float, default=2.0)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clip", type=float, default=0.0, help="gradient norm; 0: off")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--optimizer", choices=["fused", "foreach", "forloop"], default="fused")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain-malloc", action="store_true", help="leave glibc's thresholds as they are")
    parser.add_argument("--serve", action="store_true", help="be a side of benchmarks/train.py")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    wanted = {} if args.plain_malloc else MALLOC
    wanted = {**wanted, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(args.threads))}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})  # both are read at the start
    torch.set_num_threads(args.threads)
    sizes = {key: getattr(args, key) or value for key, value in CONFIGS[args.config].items()}
    specs = args.variants.split(",")
    if not args.serve:
        print(json.dumps(measured([Runner(spec, sizes, args) for spec in specs], args)))
        return

    def prepare() -> tuple[Answer, Callable[[], Answer]]:
        runner = Runner(specs[0], sizes, args)
        ready = {"torch": torch.__version__, "first_step_s": runner.first_step_s}
        return ready, lambda: {"tokens_per_s": runner.round(), "peak_mib": peak_mib()}

    serve(prepare)


if __name__ == "__main__":
    main()
