"""How a streamed prune grows with a model: python benchmarks/streaming_cost.py CALIBRATION > table.md

FASP's fifth of random LLaMAs (benchmarks/make_random_llama.py), 8 windows of 128 tokens, the model left in its files:
deeper at one width, and wider at one depth.  Each prune is a process of its own; memory is its peak resident set,
seconds are the prune's own stages, without imports and the verified write.  The last lines fit exponents by least
squares on logarithms.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import results

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("calibration")
parser.add_argument("--layers", default="8,16,32")
parser.add_argument("--widths", default="512,1024,2048", help="residual dimensions; FFNs are 8/3 of them")
args = parser.parse_args()

MAKE = Path(__file__).with_name("make_random_llama.py")
ONE = """
import json, resource, sys, billhook
found = billhook.prune(sys.argv[1], ratio=0.2, calibration=sys.argv[2], samples=8, seq_len=128, stream_weights=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found.save(sys.argv[3])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([sum(found.record["seconds"].values()), before / 1024, after / 1024]))
"""


def cost(layers: int, hidden: int) -> list[float]:
    with tempfile.TemporaryDirectory() as scratch:
        model, width = Path(scratch) / "model", round(hidden * 8 / 3 / 64) * 64
        shape = {"layers": layers, "hidden": hidden, "width": width, "heads": hidden // 64}
        flags = [text for key, value in shape.items() for text in (f"--{key}", str(value))]
        subprocess.run([sys.executable, str(MAKE), str(model), *flags], check=True, capture_output=True)
        run = [sys.executable, "-c", ONE, str(model), args.calibration, str(Path(scratch) / "out")]
        return json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def exponent(sizes: list[int], costs: list[float]) -> float:
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(c) for c in costs]).slope


depths, widths = ([int(one) for one in text.split(",")] for text in (args.layers, args.widths))
print(
    "| layers | residual dimension | seconds | peak of the prune, MiB | with the verified write |\n|---|---|---|---|---|"
)
by_depth, by_width = [], []
for pairs, found in (([(n, widths[0]) for n in depths], by_depth), ([(depths[0], n) for n in widths], by_width)):
    for layers, hidden in pairs:
        found.append(cost(layers, hidden))
        seconds, peak, whole = found[-1]
        print(f"| {layers} | {hidden} | {seconds:.1f} | {peak:.0f} | {whole:.0f} |", flush=True)
        row = {"layers": layers, "width": hidden, "seconds": seconds, "peak_mib": peak, "peak_mib_with_write": whole}
        results.write("streaming_cost", [row])
for what, sizes, found in (("layers", depths, by_depth), ("width", widths, by_width)):
    time, memory = (exponent(sizes, [one[n] for one in found]) for n in (0, 1))
    print(f"\nexponents in {what}: time {time:.2f}, peak memory {memory:.2f}", flush=True)
