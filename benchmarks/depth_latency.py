"""What dropped layers are worth in time: python benchmarks/depth_latency.py MODEL CHOPPED... > table.md

In turns, each model's prefill of --context tokens and --new-tokens single steps through the cache, batch 1: of the
decoder stack (embeddings, head and sampling left out) and of the whole model.  Median and range of --repeats after a
warm-up; the layers that are timed are those that the checkpoint has.  Run it on an idle machine.
"""

import argparse
import statistics
import time
from typing import Any

import results
import torch

from billhook.checkpoints import load
from billhook.models import sizes
from billhook.models.cached import after
from billhook.models.families import layers

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("models", nargs="+")
parser.add_argument("--context", type=int, default=512)
parser.add_argument("--new-tokens", type=int, default=32)
parser.add_argument("--repeats", type=int, default=7)
parser.add_argument("--dtype", default="auto")
args = parser.parse_args()

opened = [load.open_model(name, dtype=args.dtype) for name in args.models]
ids = torch.randint(1000, (1, args.context), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def seconds(module: Any, embed: Any) -> tuple[float, float]:
    """Of one prefill, and of one step after it; with `embed`, of the stack on states that are already embedded."""
    given = {"inputs_embeds": embed(ids)} if embed else {"input_ids": ids}
    one = {"inputs_embeds": embed(ids[:, :1])} if embed else {"input_ids": ids[:, :1]}
    started = time.perf_counter()
    step = module(**given, use_cache=True)
    filled = time.perf_counter()
    for _ in range(args.new_tokens):
        step = module(**one, **after(step))
    return filled - started, (time.perf_counter() - filled) / args.new_tokens


found: dict[tuple[int, str], list[tuple[float, float]]] = {}
for turn in range(args.repeats + 1):
    for n, one in enumerate(opened):
        for what in ("decoder stack", "whole model"):
            stack = what == "decoder stack"
            module = one.model.base_model if stack else one.model
            taken = seconds(module, one.model.get_input_embeddings() if stack else None)
            if turn:
                found.setdefault((n, what), []).append(taken)

print("| model | layers | parameters | timed | prefill, ms | × | step, ms | × |\n|---|---|---|---|---|---|---|---|")
for (n, what), times in found.items():
    cells, row = [], {}
    for name, each, base in zip(
        ("prefill", "step"), zip(*times, strict=True), zip(*found[0, what], strict=True), strict=True
    ):
        faster = statistics.median(b / a for a, b in zip(each, base, strict=True))
        cells += [f"{1e3 * statistics.median(each):.1f} ({1e3 * min(each):.1f}-{1e3 * max(each):.1f})", f"{faster:.2f}"]
        row |= {f"{name}_ms": 1e3 * statistics.median(each), f"{name}_speedup": faster}
        row |= {f"{name}_least": 1e3 * min(each), f"{name}_most": 1e3 * max(each)}
    model = opened[n].model
    print(
        f"| {args.models[n]} | {len(layers(model))} | {sizes.total_parameters(model):,} | {what} | {' | '.join(cells)} |"
    )
    row |= {"model": args.models[n], "layers": len(layers(model)), "timed": what, "context": args.context}
    results.write("depth_latency", [row | {"parameters": sizes.total_parameters(model)}])
