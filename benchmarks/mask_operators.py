"""What solvers make of single operators: python benchmarks/mask_operators.py MODEL CALIBRATION > table.md

Sums of what enters q, o, up and down of layers 2, 14 and 27 (--layers) in the unpruned model, over --samples windows of
512 tokens, the last tenth held out.  Every row prunes these operators by one method from the sums; errors are relative,
||X (V - W)^T|| / ||X W^T||, the mean over operators.  Minutes, where benchmarks/masks.py takes hours: for choosing
settings, not for judging models.
"""

import argparse
import statistics
import time
from dataclasses import replace

import results

from billhook import data
from billhook.calibration.linears import operators
from billhook.calibration.passage import Route
from billhook.checkpoints import load
from billhook.cuts.masking import weight_of
from billhook.math import admm, fistapruner, sparsegpt, wanda
from billhook.math.layerwise import Prune, Settings, Target, squared_error
from billhook.math.pattern import Pattern, parse
from billhook.runtime.run import Run
from billhook.tensors import Weight

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("--layers", default="2,14,27")
parser.add_argument("--samples", type=int, default=32)
parser.add_argument("--budgets", default="0.5,2:4")
args = parser.parse_args()

OWN = Settings()
BOTH = replace(OWN, normalised=True, refit=True)
ROWS: dict[str, tuple[Prune, Settings]] = {
    "wanda": (wanda.prune, OWN),
    "sparsegpt": (sparsegpt.prune, OWN),
    "sparsegpt, refit": (sparsegpt.prune, replace(OWN, refit=True)),
    "fistapruner as published": (fistapruner.prune, OWN),
    "fistapruner, normalised": (fistapruner.prune, replace(OWN, normalised=True)),
    "fistapruner, refit": (fistapruner.prune, replace(OWN, refit=True)),
    "fistapruner, normalised, refit": (fistapruner.prune, BOTH),
    "the same, from wanda": (fistapruner.prune, replace(BOTH, init="wanda")),
    "admm, from dense": (admm.prune, replace(OWN, init="dense")),
    "admm": (admm.prune, OWN),
    "admm, refit": (admm.prune, replace(OWN, refit=True)),
    "admm, damping 0.1": (admm.prune, replace(OWN, damping=0.1)),
    "admm, 40 iterations, 30 gradual": (admm.prune, replace(OWN, iterations=40, gradual=30)),
    "admm, penalty 0.3": (admm.prune, replace(OWN, rho=0.3)),
    "admm, penalty 3": (admm.prune, replace(OWN, rho=3.0)),
}
chosen = [int(n) for n in args.layers.split(",")]
opened = load.open_model(args.model, device="cpu", dtype="float32")
windows = data.windows(data.calibration_text(args.calibration), opened.tokenizer, 512, args.samples, 0)
kept: list[tuple[Weight, Target, Target]] = []
route = Route(only=range(max(chosen) + 1))
for group in operators(opened.model, windows.tokens, ("q", "o", "up", "down"), Run(), route):
    if group.layer in chosen and group.held_out is not None:
        sums = Target(group.fit.gram), Target(group.held_out.gram)
        kept += [(weight_of(opened.model, name).double(), *sums) for name in group.names.values()]


def error(V: Weight, W: Weight, target: Target) -> float:
    return float((squared_error(V, W, target).sum() / ((W @ target.gram) * W).sum()).sqrt())


print("| zeros | method | error | error, held out | seconds |\n|---|---|---|---|---|")
for budget in args.budgets.split(","):
    pattern = parse(budget) if ":" in budget else Pattern(float(budget))
    for name, (prune, settings) in ROWS.items():
        began = time.perf_counter()
        found = [prune(W, fit, pattern, settings).weight for W, fit, _ in kept]
        seconds = time.perf_counter() - began
        own = statistics.fmean(error(V, W, fit) for V, (W, fit, _) in zip(found, kept, strict=True))
        off = statistics.fmean(error(V, W, apart) for V, (W, _, apart) in zip(found, kept, strict=True))
        print(f"| {budget} | {name} | {own:.4f} | {off:.4f} | {seconds:.1f} |", flush=True)
        row = {key: getattr(args, key) for key in ("model", "calibration", "samples", "layers")}
        row |= {"zeros": budget, "method": name, "error": own, "error_held_out": off, "seconds": seconds}
        results.write("mask_operators", [row])
