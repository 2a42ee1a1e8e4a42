"""Ways to cut at equal size: python benchmarks/seeds.py MODEL CALIBRATION TEXT...

Every row is one prune of a copy, to the parameters that FASP's equal widths leave at --ratio, whatever the row's
method, axes and layout; what that costs on the first --windows windows of 512 tokens of every TEXT (`demo` stands for
two), with the standard error of its factor over pairs of windows; its seconds, and those of all cores together, which
other work beside it hardly changes.  Rows that the table of results
holds already for the same settings are printed from there, unless --again.
"""

import argparse
import copy
import os
import time
from pathlib import Path
from typing import Any

import results
import scoring

import billhook
from billhook.checkpoints import load
from billhook.models import sizes
from billhook.planning.budget import solved
from billhook.planning.planners import planner
from billhook.pruning.recipe import recipe
from billhook.reports.formatting import number

UNEVEN = {"method": "fasp", "layout": "per_layer"}
CHANCES = {"method": "policy", "layout": "per_layer"}
GATED = {"method": "gates", "layout": "per_layer"}
MISSED = {"method": "mope", "layout": "per_layer", "axes": ("groups", "ffn", "layers")}
ROWS: dict[str, dict[str, Any]] = {
    "fasp": {"method": "fasp"},
    "fasp, wanda": {"method": "fasp", "score": "wanda"},
    "fasp, not restored": {"method": "fasp", "restoration": False},
    "fasp, wanda, not restored": {"method": "fasp", "score": "wanda", "restoration": False},
    "fasp, sensitivity": {**UNEVEN, "allocation": "sensitivity"},
    "fasp, global": {**UNEVEN, "allocation": "global"},
    "fasp, sensitivity, two probes": {**UNEVEN, "allocation": "sensitivity", "probes": 2},
    "fasp, sensitivity, not restored": {**UNEVEN, "allocation": "sensitivity", "probes": 2, "restoration": False},
    "gates": {**GATED},
    "gates, 48 steps": {**GATED, "steps": 48},
    "gates, straight-through": {**GATED, "way": "straight-through"},
    "gates, equal widths": {**GATED, "layout": "uniform"},
    "gates, not restored": {**GATED, "restoration": False},
    "gates, 48 steps, not restored": {**GATED, "steps": 48, "restoration": False, "scaling": 24},
    "gates, 48 steps, neither restored nor scaled": {**GATED, "steps": 48, "restoration": False, "scaling": 0},
    "softtopk": {"method": "softtopk"},
    "softtopk, not restored": {"method": "softtopk", "restoration": False},
    "softtopk, not reopened, not restored": {"method": "softtopk", "reopen": False, "restoration": False},
    "loraprune": {"method": "loraprune"},
    "loraprune, shuffled": {"method": "loraprune", "shuffled": True},
    "l0": {"method": "l0", "layout": "per_layer"},
    "mlpruning": {"method": "mlpruning", "layout": "per_layer", "axes": ("groups", "ffn")},
    "mlpruning, widths alone": {"method": "mlpruning", "layout": "per_layer"},
    "mlpruning, equal widths": {"method": "mlpruning"},
    "mope": {**MISSED},
    "mope, equal widths": {**MISSED, "layout": "uniform"},
    "mope, widths alone": {**MISSED, "axes": ("groups", "ffn")},
    "mope, joint": {**MISSED, "stage": "joint"},
    "mope, in its own order": {**MISSED, "order": "global"},
    "mope, not restored": {**MISSED, "restoration": False},
    "policy": {**CHANCES},
    "policy, not restored": {**CHANCES, "restoration": False},
    "policy, not restored, shuffled": {**CHANCES, "restoration": False, "shuffled": True},
    "policy, not restored, moving average": {
        **CHANCES,
        "restoration": False,
        "baseline": "ema",
        "masks": 2,
        "steps": 256,
    },
    "policy, groups and ffn": {**CHANCES, "axes": ("groups", "ffn")},
    "policy, equal widths": {**CHANCES, "layout": "uniform"},
    "rom": {"method": "rom", "layout": "per_layer"},
    "rom, plain": {"method": "rom", "layout": "per_layer", "moment": "plain"},
    "rom, all layers": {"method": "rom", "layout": "per_layer", "last": 30},
    "bolaco": {"method": "bolaco", "layout": "per_layer"},
    "bolaco, equal shares": {"method": "bolaco", "layout": "per_layer", "rounds": 1},
    "adapruner": {"method": "adapruner", "layout": "per_layer"},
    "goa": {"method": "goa"},
    "goa, not recovered": {"method": "goa", "recovery": False},
    "goa, share 0.3": {"method": "goa", "share": 0.3},
    "goa, damping 0.1": {"method": "goa", "damping": 0.1},
    "goa, measured": {"method": "goa", "score": "measured"},
    "goa, after": {"method": "goa", "after": True},
    "goa, share 0.3, after": {"method": "goa", "share": 0.3, "after": True},
    "goa, not recovered, after": {"method": "goa", "recovery": False, "after": True},
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("texts", nargs="+")
parser.add_argument("--ratio", type=float, default=0.2)
parser.add_argument("--rows", default=";".join(ROWS), help=f"separated by ;: {'; '.join(ROWS)}")
parser.add_argument("--samples", type=int, default=64, help="windows to calibrate on")
parser.add_argument("--windows", type=int, default=24, help="score at most this many windows of each text")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--work", type=Path, help="folder in which rows that were cut off go on, where their method can")
parser.add_argument("--again", action="store_true", help="rows that are there already, too")
args = parser.parse_args()


def settings_of(row: str) -> str:
    """What tells a row from others of its name."""
    return ", ".join(f"{name} {results.said(value)}" for name, value in ROWS[row].items())


def processor_seconds() -> float:
    """What this process and those that it waited for have computed so far, all cores together."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def known(row: str) -> list[dict[str, str]]:
    """What was measured of a row by the same settings, a text each; nothing where a text is missing."""
    same = {**{name: results.said(value) for name, value in how.items()}, "row": row, "settings": settings_of(row)}
    found = {one["text"]: one for one in results.read("seeds") if same.items() <= one.items()}
    return [found[text.name] for text in scored.texts] if all(text.name in found for text in scored.texts) else []


def measured(row: str) -> list[dict[str, str]]:
    """The same, measured now and kept."""
    given = {"calibration": args.calibration, "samples": args.samples, "seed": args.seed, "params": size, **ROWS[row]}
    if args.work:
        given["work"] = args.work / row.replace(", ", "-").replace(" ", "-")
    copied, started, before = copy.deepcopy(opened.model), time.perf_counter(), processor_seconds()
    cut = billhook.prune(copied, tokenizer=opened.tokenizer, look=False, quiet=True, **given).model.float()
    said = {
        "seconds": time.perf_counter() - started,
        "processor_seconds": processor_seconds() - before,
        "parameters": sizes.total_parameters(cut),
    }
    judged = scoring.measured(scored(cut, opened.tokenizer), dense)
    results.write("seeds", [{**how, "row": row, "settings": settings_of(row), **said, **one} for one in judged])
    return known(row)


how = {name: getattr(args, name) for name in ("model", "calibration", "samples", "windows", "ratio", "seed")}
opened = load.open_model(args.model, dtype="float32")
equal = recipe(method="fasp", ratio=args.ratio)
size = sizes.total_parameters(opened.model) - sizes.saved_by(
    opened.model, solved(opened, equal, planner(opened.model, equal))
)
scored = scoring.Scoring(args.texts, args.windows, "float32")
dense = scored(opened.model, opened.tokenizer)
print(
    f"| | parameters | {scored.heads} | seconds | of all cores |\n|---|---|" + "---|" * len(dense) + "---|---|",
    flush=True,
)
for name in map(str.strip, args.rows.split(";")):
    rows = (not args.again and known(name)) or measured(name)
    cells = " | ".join(
        f"{float(one['perplexity']):.2f} (×{float(one['factor']):.3f} ± {number(float(one['standard_error'] or 0), '{:.3f}')})"
        for one in rows
    )
    used = number(float(rows[0].get("processor_seconds") or "nan"), "{:.0f}")
    print(
        f"| {name} | {int(rows[0]['parameters']):,} | {cells} | {float(rows[0]['seconds']):.0f} | {used} |", flush=True
    )
