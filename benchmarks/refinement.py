"""What block-local refinement is worth after a patch: python benchmarks/refinement.py MODEL CALIBRATION TEXT...

Drops --drop and patches the cut unless told otherwise, or takes --ratio by FASP's equal widths; the closed form sees
--fitted windows.  Then refines copies as --rows say: LENGTH:PASSES:RATE:WINDOWS for layers in a span, passes over the
calibration windows, the peak rate, and windows in a step.  Scores --windows windows of every TEXT.
"""

import argparse
import copy
import dataclasses
import time
from typing import Any

import results

import billhook
from billhook import data
from billhook.checkpoints import load
from billhook.cuts.chopping import chop
from billhook.cuts.settings import Chopping
from billhook.evaluation.perplexity import paired, perplexity
from billhook.math import layer_presets
from billhook.models.families import layers
from billhook.models.plan import Plan
from billhook.reports.formatting import number
from billhook.runtime.run import Run
from billhook.training.refinement import Refining, aims, refine, spans

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("texts", nargs="+")
parser.add_argument("--drop", default="13-18")
parser.add_argument("--patch", default="linear", choices=("linear", "none"), help="what the cut starts from")
parser.add_argument("--rows", default="10:1:3e-4:1,10:2:3e-4:1", help="separated by commas")
parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"), help="of a step's products")
parser.add_argument("--samples", type=int, default=64, help="windows to refine on")
parser.add_argument("--fitted", type=int, help="as many of them to fit the closed form on  [default: all]")
parser.add_argument("--ratio", type=float, help="in place of --drop: share of the decoder that goes by equal widths")
parser.add_argument("--windows", type=int, default=12, help="score at most this many windows of each text")
args = parser.parse_args()


def judged(model: Any) -> list[Any]:
    return [perplexity(model, one) for one in windows]


def told(name: str, measured: list[Any], seconds: float, **row: object) -> None:
    found = [
        (one.text, one.perplexity, *paired(before.window_losses, one.window_losses))
        for before, one in zip(dense, measured, strict=True)
    ]
    cells = " | ".join(f"{p:.2f} (×{factor:.3f} ± {number(error, '{:.3f}')})" for _, p, factor, error in found)
    print(f"| {name} | {cells} | {seconds:.0f} |", flush=True)
    given = ("model", "calibration", "samples", "fitted", "windows", "drop", "ratio", "patch", "precision")
    how = {key: getattr(args, key) for key in given} | row
    results.write(
        "refinement",
        [
            {**how, "seconds": seconds, "text": text, "perplexity": p, "factor": factor, "standard_error": error}
            for text, p, factor, error in found
        ],
    )


opened = load.open_model(args.model, dtype="float32")
tokens = data.windows(data.calibration_text(args.calibration), opened.tokenizer, 512, args.samples, 0).tokens
windows = []
for text in data.evaluation_texts(args.texts):
    whole = data.windows(text, opened.tokenizer, 512)
    every = max(1, len(whole.tokens) // args.windows)
    windows.append(dataclasses.replace(whole, tokens=whole.tokens[::every][: args.windows]))
dense, total = judged(opened.model), len(layers(opened.model))
gone = () if args.ratio else tuple(layer_presets.parse_layers(args.drop, total))
kept = [n for n in range(total) if n not in gone]
narrowed = kept if args.ratio else ()
print("| refined | " + " | ".join(one.text for one in dense) + " | seconds |\n|---|" + "---|" * len(dense) + "---|")
patched = copy.deepcopy(opened.model)
started = time.perf_counter()
if args.ratio:
    args.drop = args.patch = "none"
    cut = {
        "method": "fasp",
        "ratio": args.ratio,
        "calibration": args.calibration,
        "samples": args.fitted or args.samples,
    }
    patched = billhook.prune(patched, tokenizer=opened.tokenizer, look=False, quiet=True, **cut).model.float()
else:
    chop(patched, tokens[: args.fitted], Plan(layers=gone), Chopping(args.patch), Run())
told("not refined", judged(patched), time.perf_counter() - started, length=0, passes=0, rate=0, rows=0)
for row in args.rows.split(","):
    length, passes, rate, rows = (float(part) for part in row.split(":"))
    settings = Refining(passes=passes, rate=rate, length=int(length), rows=int(rows), precision=args.precision)
    wanted, model = spans(kept, narrowed, total, settings.length), copy.deepcopy(patched)
    started = time.perf_counter()
    refine(model, tokens, aims(opened.model, tokens, wanted, settings, Run()), settings, Run())
    took = time.perf_counter() - started
    told(row, judged(model), took, **{"length": int(length), "passes": passes, "rate": rate, "rows": int(rows)})
