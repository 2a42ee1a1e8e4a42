"""What each method that makes zeros leaves: python benchmarks/masks.py MODEL CALIBRATION TEXT... --results DIR >
table.md

Every row prunes MODEL once (64 windows of 512 tokens of CALIBRATION, seed 0) and judges it on every TEXT: perplexity
and its factor to the unpruned model's over the first --windows windows of 512 tokens, matrix products in --precision, ±
one standard error over pairs of windows.  Errors are relative, of the operators' outputs, the mean over layers; in
brackets on held-out windows.  Each row is kept in DIR: the same command goes on where it was cut off.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import results
from scoring import Scoring, cells, measured

import billhook
from billhook.checkpoints import load
from billhook.runtime import cache

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("text", nargs="+")
parser.add_argument("--results", type=Path, default=Path("mask-results"))
parser.add_argument("--budgets", default="0.5,2:4,4:8,0.7", help="with commas: 0.5, 2:4, 0.5 block16")
parser.add_argument("--rows", default="", help="some of the rows, with semicolons; empty: all")
parser.add_argument("--samples", type=int, default=64)
parser.add_argument("--windows", type=int, default=84)
parser.add_argument("--precision", default="auto")
args = parser.parse_args()

PUBLISHED = {"method": "fistapruner", "normalised": False, "refit": False}
ROWS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "fistapruner as published, from dense": {**PUBLISHED, "init": "dense"},
    "fistapruner as published, from wanda": {**PUBLISHED, "init": "wanda"},
    "fistapruner as published, from sparsegpt": {**PUBLISHED, "init": "sparsegpt"},
    "fistapruner, normalised": {**PUBLISHED, "normalised": True},
    "fistapruner, refit": {**PUBLISHED, "refit": True},
    "fistapruner": {"method": "fistapruner"},
    "fistapruner, dense target throughout": {"method": "fistapruner", "stream": "dense_target"},
    "magnitude, refit": {"method": "magnitude", "refit": True},
    "wanda, refit": {"method": "wanda", "refit": True},
    "sparsegpt, refit": {"method": "sparsegpt", "refit": True},
    "sparsegpt, layer target": {"method": "sparsegpt", "stream": "layer_target"},
    "sparsegpt, dense target": {"method": "sparsegpt", "stream": "dense_target"},
    "sparsegpt, dense target, refit": {"method": "sparsegpt", "stream": "dense_target", "refit": True},
    "admm as published, from dense": {"method": "admm", "stream": "sequential", "init": "dense"},
    "admm, sequential": {"method": "admm", "stream": "sequential"},
    "admm": {"method": "admm", "stream": "layer_target"},
    "admm, refit": {"method": "admm", "stream": "layer_target", "refit": True},
    "admm, dense target": {"method": "admm", "stream": "dense_target"},
}
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
scoring = Scoring(args.text, args.windows, args.precision)
WEIGHTS = cache.model_sha256(load.open_model(args.model, device="cpu", dtype="float32").model)
common = {"texts": [one.sha256 for one in scoring.texts], "windows": [args.windows, args.precision]}


def asked(budget: str) -> dict[str, Any]:
    """A budget of --budgets, as a recipe has it."""
    if ":" in budget:
        return {"pattern": budget}
    share, _, pattern = budget.partition(" ")
    return {"sparsity": float(share), "pattern": pattern}


def row(budget: str, chosen: dict[str, Any]) -> dict[str, Any]:
    how = {**asked(budget), **chosen}
    found = billhook.prune(args.model, calibration=args.calibration, samples=args.samples, look=False, **how)
    return {"losses": scoring(found.model, found.tokenizer), "report": found.record}


def errors(report: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """By role, the mean over layers: on the calibration windows, and on held-out ones."""
    means = {}
    for role in ROLES:
        own = [one for one in report["zeros"]["operators"] if one["role"] == role]
        means[role] = tuple(statistics.fmean(one[key] for one in own) for key in ("error", "error_held_out"))
    return means


def keep(budget: str, name: str, found: dict[str, Any]) -> None:
    how = {key: getattr(args, key) for key in ("model", "calibration", "samples")} | {"zeros": budget, "method": name}
    judged = {"windows": args.windows, "precision": args.precision}
    seconds = found["report"]["seconds"]
    judged |= {f"{stage}_seconds": seconds.get(stage) for stage in ("forward", "gram", "solver", "errors")}
    results.write("masks", [{**how, **judged, **row} for row in measured(found["losses"], dense)])
    of_roles = errors(found["report"]).items()
    results.write(
        "mask_errors", [{**how, "role": role, "error": fit, "error_held_out": off} for role, (fit, off) in of_roles]
    )


dense = cache.cached(args.results, "dense", {**common, "model": args.model}, lambda: scoring.of(args.model))
print(f"| zeros | method | {scoring.heads} | error | seconds |")
print(f"|---|---|{'---|' * len(dense)}---|---|")
print(f"| 0 | unpruned | {cells(dense, dense)} | | |", flush=True)
for budget in args.budgets.split(","):
    for name, chosen in ROWS.items():
        if args.rows and name not in args.rows.split(";"):
            continue
        key = {
            **common,
            "weights": WEIGHTS,
            "budget": budget,
            "samples": args.samples,
            **chosen,
        }
        key["calibration"] = args.calibration
        found = cache.cached(args.results, "row", key, lambda: row(budget, chosen))  # noqa: B023
        took = ", ".join(f"{stage} {s:.0f}" for stage, s in found["report"]["seconds"].items())
        erring = ", ".join(f"{role} {fit:.3f} ({off:.3f})" for role, (fit, off) in errors(found["report"]).items())
        print(f"| {budget} | {name} | {cells(found['losses'], dense)} | {erring} | {took} |", flush=True)
        keep(budget, name, found)
