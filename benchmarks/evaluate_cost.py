"""What measuring and sweeping cost: python benchmarks/evaluate_cost.py MODEL CALIBRATION TEXT > table.md

In one process, in turns: billhook's perplexity pass beside a bare loop of forwards and losses over the same windows;
then one default prune with its evaluation, and a sweep of --ratios from one pass.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import results
import torch

from billhook import data
from billhook.checkpoints import load
from billhook.evaluation.perplexity import head_batches, perplexity
from billhook.pruning import compare
from billhook.pruning.prune import prune_opened
from billhook.pruning.recipe import recipe
from billhook.runtime.run import Run

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("text")
parser.add_argument("--windows", type=int, default=16)
parser.add_argument("--samples", type=int, default=64)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--ratios", default="0.1,0.2,0.3,0.4,0.5,0.6")
args = parser.parse_args()

opened = load.open_model(args.model)
(text,) = data.evaluation_texts([args.text])
by = compare.judged(opened, [text], 512, args.windows, None)


@torch.inference_mode()
def bare() -> float:
    losses = []
    for batch in head_batches(by.windows[0].tokens):
        logits = opened.model(batch, use_cache=False).logits
        for row, ids in zip(logits, batch, strict=True):
            losses.append(torch.nn.functional.cross_entropy(row[:-1].float(), ids[1:]).item())
    return statistics.fmean(losses)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


loops, passes = [], []
for turn in range(args.repeats + 1):
    found = timed(bare), timed(lambda: perplexity(opened.model, by.windows[0]))
    if turn:
        loops.append(found[0])
        passes.append(found[1])


def keep(what: str, seconds: list[float], beside: str = "") -> None:
    row = {"model": args.model, "windows": args.windows, "samples": args.samples, "what": what, "beside": beside}
    spread = {"seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    results.write("evaluate_cost", [row | spread])


loop, ours = statistics.median(loops), statistics.median(passes)
print("| what | seconds | beside |\n|---|---|---|")
print(f"| a bare loop over {args.windows} windows | {loop:.1f} ({min(loops):.1f}-{max(loops):.1f}) | |")
print(
    f"| billhook's perplexity of them | {ours:.1f} ({min(passes):.1f}-{max(passes):.1f}) | {ours / loop:.3f} of the loop |"
)
keep("a bare loop", loops)
keep("billhook's perplexity", passes, f"{ours / loop:.3f} of the loop")

chosen = recipe(method="fasp", ratio=0.2, calibration=args.calibration, samples=args.samples)
copied = replace(opened, model=copy.deepcopy(opened.model))
prune = timed(lambda: prune_opened(copied, chosen, Run()))
print(f"| a default prune | {prune:.0f} | |", flush=True)
keep("a default prune", [prune])
ratios = [float(part) for part in args.ratios.split(",")]
swept = timed(
    lambda: compare.sweep(
        opened,
        "fasp",
        [
            recipe(method="fasp", ratio=one, calibration=args.calibration, samples=args.samples, stream="dense")
            for one in ratios
        ],
        by,
    )
)
rest = swept - (len(ratios) + 1) * ours
beside = f"{rest / prune:.2f} prunes + {len(ratios) + 1} evaluations"
print(f"| a sweep of {len(ratios)} ratios | {swept:.0f} | {beside} |")
keep(f"a sweep of {len(ratios)} ratios", [swept], beside)
