"""What thin weights lose of what a weight puts out: python benchmarks/low_rank.py MODEL CALIBRATION

Some layers of the unpruned model, each weight alone: the relative error of its output, ||Y - Y_r|| / ||Y||, at some
shares of its entries and by every moment, on the windows that the factors saw and on others, as the mean of the layers.
Nothing is pruned, and no layer after the last of --layers is run.  What whole models lose: benchmarks/seeds.py.
"""

import argparse
import itertools
from collections import defaultdict
from statistics import fmean

import results

from billhook import data
from billhook.calibration.inputs import inputs
from billhook.calibration.passage import Route
from billhook.checkpoints import load
from billhook.math.low_rank import MOMENTS, factors, output_error, rank_for
from billhook.models.families import weight_of
from billhook.planning.rank_plan import weights
from billhook.runtime.run import Run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("--layers", default="3,10,17", help="numbers from 0, with commas")
parser.add_argument("--shares", default="0.46,0.8", help="of the entries of each weight that its factors may hold")
parser.add_argument("--samples", type=int, default=16, help="windows of 512 tokens; a quarter is held out")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

opened = load.open_model(args.model, dtype="float32")
model, chosen = opened.model, [int(n) for n in args.layers.split(",")]
tokens = data.windows(data.calibration_text(args.calibration), opened.tokenizer, 512, args.samples, args.seed).tokens
roles = {path: role for path, (n, role) in weights(model).items() if n in chosen}
errors = defaultdict[tuple[float, str, str], list[tuple[float, float]]](list)
for layer in inputs(model, tokens, roles, Run(), Route("dense", held_out=0.25, only=chosen)):
    for (path, sums), moment in itertools.product(layer.fit.items(), MOMENTS):
        W = weight_of(model, path)
        whole = factors(W, sums, moment)
        for share in map(float, args.shares.split(",")):
            found = whole.at(rank_for(share, *W.shape))
            both = output_error(W, found, sums), output_error(W, found, layer.held_out[path])
            errors[share, moment, roles[path]].append(both)

how = {name: getattr(args, name) for name in ("model", "calibration", "samples", "seed", "layers")}
names = list(dict.fromkeys(roles.values()))
print(f"| share | moment | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
for share, moment in itertools.product(map(float, args.shares.split(",")), MOMENTS):
    cells = []
    for role in names:
        seen, unseen = (fmean(side) for side in zip(*errors[share, moment, role], strict=True))
        said = {"share": share, "moment": moment, "role": role, "error": seen, "error_held_out": unseen}
        results.write("low_rank", [{**how, **said}])
        cells.append(f"{seen:.3f} ({unseen:.3f})")
    print(f"| {share:g} | {moment} | {' | '.join(cells)} |", flush=True)
