"""Ways to make the KV cache smaller, at equal bytes: python benchmarks/kv_cache.py MODEL CALIBRATION TEXT...

Every row is one prune of a copy with `--method lorc`, to --kv of the cache: the share that it then has, the parameters,
perplexity on the first --windows windows of 512 tokens of every TEXT (`demo` stands for two), with the standard error
of its factor over pairs of windows; then, in turns with the unpruned model, greedy tokens a second after prompts of
--contexts tokens, with the cache.
"""

import argparse
import copy
import time
from typing import Any

import results
import scoring

import billhook
from billhook.checkpoints import load
from billhook.evaluation.speed import speeds
from billhook.models import sizes
from billhook.models.plan import Plan

VALUES = {"layout": "per_layer"}
ROWS: dict[str, dict[str, Any]] = {
    "values": VALUES,
    "values, uniform": {**VALUES, "rule": "uniform"},
    "values, sensitivity": {**VALUES, "allocation": "sensitivity"},
    "shorter heads": {"keys": "pairs"},
    "values and pairs": {**VALUES, "keys": "pairs"},
    "values and pairs, uniform": {**VALUES, "keys": "pairs", "rule": "uniform"},
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("texts", nargs="+")
parser.add_argument("--kv", type=float, default=0.75)
parser.add_argument("--rows", default=";".join(ROWS), help=f"separated by ;: {'; '.join(ROWS)}")
parser.add_argument("--samples", type=int, default=64, help="windows to calibrate on")
parser.add_argument("--windows", type=int, default=24, help="score at most this many windows of each text")
parser.add_argument("--contexts", default="", help="separated by commas, like 512,4096; empty: no speeds")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

CONTEXTS = [int(one) for one in args.contexts.split(",") if one]
how = {name: getattr(args, name) for name in ("model", "calibration", "samples", "windows", "kv", "seed")}
opened = load.open_model(args.model, dtype="float32")
scored = scoring.Scoring(args.texts, args.windows, "float32")
dense = scored(opened.model, opened.tokenizer)
whole = sizes.kv_cache_entries(opened.model, Plan(), 2048, 1)
of_speed = [f"tokens a second after {context} (unpruned)" for context in CONTEXTS]
heads = ["", "KV cache", "parameters", *(text.name for text in scored.texts), "seconds", *of_speed]
print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
for row in map(str.strip, args.rows.split(";")):
    started = time.perf_counter()
    given = {name: how[name] for name in ("calibration", "samples", "kv", "seed")} | ROWS[row]
    cut = billhook.prune(
        copy.deepcopy(opened.model), method="lorc", tokenizer=opened.tokenizer, look=False, quiet=True, **given
    ).model.float()
    losses = scored(cut, opened.tokenizer)
    said = {
        "share": sizes.kv_cache_entries(cut, Plan(), 2048, 1) / whole,
        "parameters": sizes.total_parameters(cut),
        "seconds": time.perf_counter() - started,
    }
    timed = speeds([opened.model, cut], [(1, context) for context in CONTEXTS]) if CONTEXTS else [[], []]
    pairs = list(zip(*timed, strict=True))
    said["decode"] = " ".join(
        f"{context}:{own.decode:.1f}/{before.decode:.1f}"
        for context, (before, own) in zip(CONTEXTS, pairs, strict=True)
    )
    results.write("kv_cache", [{**how, "row": row, **said, **one} for one in scoring.measured(losses, dense)])
    cells = [f"{said['share']:.1%}", f"{said['parameters']:,}", scoring.cells(losses, dense), f"{said['seconds']:.0f}"]
    cells += [f"{own.decode:.1f} ({before.decode:.1f})" for before, own in pairs]
    print(f"| {row} | {' | '.join(cells)} |", flush=True)
