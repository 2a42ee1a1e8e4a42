"""Narrower values, chosen channels against turned ones: python benchmarks/values.py MODEL CALIBRATION TEXT...

All value heads lose --share of their channels and nothing else goes.  For each basis: the error of what the output
projections put out, each layer alone in the unpruned model and refitted, on windows that no fit saw; and perplexity,
cut layer after layer as `prune` does, on the first --windows windows of 512 tokens of every TEXT (`demo` stands for
two), with the standard error of its factor over pairs of windows.
"""

import argparse
import copy

import results
import scoring

from billhook import data
from billhook.checkpoints import load
from billhook.choices import VALUE_BASES
from billhook.cuts import narrowing, values
from billhook.cuts.settings import Narrowing
from billhook.models import sizes
from billhook.models.axes import axes
from billhook.models.plan import Plan
from billhook.runtime.run import Run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("texts", nargs="+")
parser.add_argument("--share", type=float, default=0.5)
parser.add_argument("--samples", type=int, default=64, help="windows to calibrate on")
parser.add_argument("--windows", type=int, default=24, help="score at most this many windows of each text")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

opened = load.open_model(args.model, dtype="float32")
scored = scoring.Scoring(args.texts, args.windows, "float32")
dense = scored(opened.model, opened.tokenizer)
text = data.calibration_text(args.calibration)
tokens = data.windows(text, opened.tokenizer, 512, args.samples, args.seed).tokens
drops = {
    (axis.layer, "value"): round(args.share * axis.units / axis.blocks) * axis.blocks
    for axis in axes(opened.model, ("value",))
}
plan, settings = Plan(drops), Narrowing()
how = {name: getattr(args, name) for name in ("model", "calibration", "samples", "windows", "share", "seed")}
entries = [sizes.kv_cache_entries(opened.model, one, 2048, 1) for one in (Plan(), plan)]
print(f"The KV cache keeps {entries[1] / entries[0]:.0%}.\n\n| values | error | {scored.heads} |")
print("|---|---|" + "---|" * len(dense), flush=True)
for basis in VALUE_BASES:
    model = copy.deepcopy(opened.model)
    if basis == "principal":
        values.turn_values(model, tokens, Run())
        values.turn_values(model, tokens, Run(), plan)
    at = {layer for layer, _ in drops}
    alone = [piece.cut.error_held_out for piece in narrowing.pieces(model, tokens, plan, settings, {}, at, Run())]
    error = sum(one or 0.0 for one in alone) / len(alone)
    narrowing.narrow(model, tokens, plan, settings, Run())
    judged = scoring.measured(scored(model, opened.tokenizer), dense)
    size = sizes.total_parameters(model)
    results.write("values", [{**how, "basis": basis, "parameters": size, "error": error, **one} for one in judged])
    cells = " | ".join(f"×{one['factor']:.3f} ± {one['standard_error']:.3f}" for one in judged)
    print(f"| {basis} | {error:.4f} | {cells} |", flush=True)
