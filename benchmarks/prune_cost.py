"""What FASP costs, in plain forward passes: python benchmarks/prune_cost.py MODEL TEXT [--stream dense] [--repeats 3]

Times, in one process and in turns, the plain forward of the calibration tokens through the decoder layers and the whole
of FASP after loading (statistics, score, restoration, surgery), on a fresh copy of the model each time.  Prints the
median of each, their ratio, the split by stage, and the peak memory beyond the loaded model.
"""

import argparse
import copy
import statistics
import time

import results

from billhook import data
from billhook.calibration.walk import walk
from billhook.checkpoints import load
from billhook.choices import AXIS_STREAMS
from billhook.cuts.narrowing import Settings, narrow
from billhook.models.sizes import decoder_parameters
from billhook.planning.planners import even_planner
from billhook.pruning.recipe import recipe
from billhook.runtime.memory import peak_growth
from billhook.runtime.run import Run

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("text")
parser.add_argument("--stream", choices=AXIS_STREAMS, default="dense")
parser.add_argument("--score", default="obs")
parser.add_argument("--ratio", type=float, default=0.2)
parser.add_argument("--samples", type=int, default=64)
parser.add_argument("--seq-len", type=int, default=512)
parser.add_argument("--repeats", type=int, default=3)
args = parser.parse_args()

opened = load.open_model(args.model)
text = data.calibration_text(args.text)
windows = data.windows(text, opened.tokenizer, args.seq_len, args.samples)
plan = even_planner(opened.model, recipe(method="fasp", ratio=args.ratio)).make(
    args.ratio * decoder_parameters(opened.model)
)

forward, whole, stages, peaks = [], [], [], []
for _ in range(args.repeats):
    start = time.perf_counter()
    for _layer in walk(opened.model, windows.tokens, (), Run()):  # no axis, so no Gram: the forward alone
        pass
    forward.append(time.perf_counter() - start)
    model, run = copy.deepcopy(opened.model), Run()
    with peak_growth(model.device) as growth:
        start = time.perf_counter()
        narrow(model, windows.tokens, plan, Settings(score=args.score, stream=args.stream), run)
        whole.append(time.perf_counter() - start)
    peaks.append(growth())
    stages.append(run.clock.seconds)
    print(f"forward {forward[-1]:.1f} s, FASP {whole[-1]:.1f} s, ratio {whole[-1] / forward[-1]:.2f}", flush=True)

print(
    f"\n{len(windows.tokens)} windows of {args.seq_len} tokens of {windows.source}, stream {args.stream}, {args.ratio:.0%} of the decoder"
)
ratios = [w / f for w, f in zip(whole, forward, strict=True)]
print(f"plain forward  {statistics.median(forward):7.2f} s")
print(
    f"FASP           {statistics.median(whole):7.2f} s   ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
)
names = {"model": args.model, "calibration": args.text, "stream": args.stream, "score": args.score, "ratio": args.ratio}
row: dict[str, object] = {**names, "samples": args.samples, "seq_len": args.seq_len, "peak_mib": max(peaks) / 2**20}
row |= {"plain_forward_seconds": statistics.median(forward), "fasp_seconds": statistics.median(whole)}
row |= {"forwards": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
for stage in stages[0]:
    seconds = statistics.median(s[stage] for s in stages)
    if f"{stage}_part" in results.columns("prune_cost"):
        row[f"{stage}_part"] = seconds / statistics.median(forward)
    print(f"  {stage:12s} {seconds:7.2f} s   {seconds / statistics.median(forward):.2f}")
print(f"peak memory beyond the loaded model: {max(peaks) / 2**20:.0f} MiB")
results.write("prune_cost", [row])
