"""Which trials tell close cuts apart: python benchmarks/trials.py MODEL CALIBRATION --ratio 0.3

Every way to cut that the default may try is fitted on as many windows as --fitted says, one number after the other,
refined by one pass, and compared with the unpruned model on --probes windows of the calibration's text and as many of
another kind: by how much it is behind the best of them, and the standard error of that, on the first --first of these
windows and on all.  The default's own trials are `--fitted 16 --first 16`.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import results

from billhook import data
from billhook.checkpoints import load
from billhook.methods.minutes import SPAN, SPENT
from billhook.methods.rivals import RIVALS, ready
from billhook.methods.trials import Bench, behind, losses_of, tried
from billhook.pruning.recipe import recipe
from billhook.reports.formatting import with_error
from billhook.runtime.activations import Room
from billhook.runtime.run import Run
from billhook.training.refinement import Refining

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("--ratio", type=float, default=0.3)
parser.add_argument("--layout", default="uniform")
parser.add_argument("--fitted", default="16,64", help="windows that a trial is fitted on, with commas")
parser.add_argument("--probes", type=int, default=24, help="windows of each kind of text that judge")
parser.add_argument(
    "--first", type=int, default=16, help="of these, both kinds together, that judge by themselves, too"
)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

how = {name: getattr(args, name) for name in ("model", "calibration", "ratio", "layout", "seed")}
chosen = recipe("auto", **{name: how[name] for name in how if name != "model"}, probes=args.probes)
opened = load.open_model(args.model, dtype="float32")
texts = chosen.method.draw(opened, chosen, data.calibration_text(args.calibration), Run())
effort = replace(SPENT["normal"], rivals=len(RIVALS))
with tempfile.TemporaryDirectory() as scratch:  # blocks of layers and curves as the default measures them
    few = replace(texts, probe=texts.judges[: args.first // 2])
    found, refused = ready(opened, chosen, effort, few, Run(statistics=Path(scratch)))
for name, why in refused.items():
    print(f"{name}: {why}")
print("| fitted on | judged by | cut | nats a token | behind | seconds |\n|---|---|---|---|---|---|", flush=True)
for fitted in map(int, args.fitted.split(",")):
    windows = replace(texts, calibration=texts.calibration[:fitted], probe=texts.judges)
    done = tried(Bench(opened.model, windows, Refining(passes=1, length=SPAN), Room()), found, Run())
    for judged in sorted({min(args.first, len(texts.judges)), len(texts.judges)}):
        each = {name: losses[:judged] for name, losses in losses_of(done).items()}
        apart = behind(each)
        for name, losses in each.items():
            more, error = apart[name]
            seconds = done[name].seconds
            cells = f"{fmean(losses):.3f} | {with_error(more, error, '{:.3f}')} | {seconds:.0f}"
            print(f"| {fitted} | {judged} | {name} | {cells} |", flush=True)
            numbers = {"loss": fmean(losses), "behind": more, "standard_error": error, "seconds": seconds}
            results.write("trials", [{**how, "fitted": fitted, "judged": judged, "cut": name, **numbers}])
