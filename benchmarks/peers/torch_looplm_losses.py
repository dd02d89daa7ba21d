"""PyTorch's losses from given weights and batches: the other half of benchmarks/same_losses.py.

Reads an .npz with the tensors of a model under the names of its file, `batches` (number x B x (S + 1) token ids) and
the sizes as JSON; trains in float32 and prints the objective of every step.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from benchmarks.peers.torch_looplm_train import LoopLM
from benchmarks.side_by_side import LOOPS, serve


def load(model: LoopLM, tensors: dict[str, torch.Tensor]) -> None:
    """Our names to the peer's, which holds query, key and value in one matrix, and gate and up in another."""

    def stacked(prefix: str, *names: str) -> torch.Tensor:
        return torch.cat([tensors[f"{prefix}.{name}.weight"] for name in names])

    found = {
        "emb.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
        "head.weight": tensors["lm_head.weight"],
        "gate.weight": tensors["model.early_exit_gate.weight"],
        "gate.bias": tensors["model.early_exit_gate.bias"],
    }
    for index in range(len(model.layers)):
        ours, theirs = f"model.layers.{index}", f"layers.{index}"
        found |= {
            f"{theirs}.n1.weight": stacked(ours, "input_layernorm"),
            f"{theirs}.qkv.weight": stacked(ours, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            f"{theirs}.o.weight": stacked(ours, "self_attn.o_proj"),
            f"{theirs}.n2.weight": stacked(ours, "input_layernorm_2"),
            f"{theirs}.n3.weight": stacked(ours, "post_attention_layernorm"),
            f"{theirs}.gu.weight": stacked(ours, "mlp.gate_proj", "mlp.up_proj"),
            f"{theirs}.down.weight": stacked(ours, "mlp.down_proj"),
            f"{theirs}.n4.weight": stacked(ours, "post_attention_layernorm_2"),
        }
    model.load_state_dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    def answer() -> dict[str, list[float]]:
        torch.set_num_threads(args.threads)
        start = {name: np.array(value) for name, value in np.load(args.start).items()}
        sizes, batches = json.loads(str(start.pop("sizes"))), torch.from_numpy(start.pop("batches"))
        model = LoopLM(**sizes, R=LOOPS, beta=0.1)
        load(model, {name: torch.from_numpy(value) for name, value in start.items()})
        decayed = [p for p in model.parameters() if p.dim() == 2 and p.shape[0] > 1]
        others = [p for p in model.parameters() if not (p.dim() == 2 and p.shape[0] > 1)]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-8)
        losses = []
        for step in range(args.steps):
            ids = batches[step % len(batches)]
            loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return {"losses": losses}

    serve(lambda: ({"torch": torch.__version__}, answer))


if __name__ == "__main__":
    main()
