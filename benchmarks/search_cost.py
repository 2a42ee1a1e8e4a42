"""What a trial of a search costs: python benchmarks/search_cost.py MODEL TRAIN VALID > table.md

In turns, on the same four windows of 128 tokens: a forward pass of the unpruned model, a trial as a search makes it
(scores from the pool's evidence, a mask, the cut in place, a forward pass, everything back), and a trial in the paper's
way (gradients of ten windows of 64 tokens for the candidate's metric, a copy of the model that is cut, a forward pass).
Run it on an idle machine.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import results

from billhook.calibration.gradients import gradient_sums
from billhook.checkpoints.load import open_model
from billhook.data import calibration_text, windows
from billhook.math import selection
from billhook.math.taylor import taylor1_element
from billhook.methods.searched import asked
from billhook.models.axes import axes
from billhook.models.surgery import remove
from billhook.planning.budget import solved
from billhook.planning.planners import planner
from billhook.pruning.recipe import recipe
from billhook.runtime.run import Run
from billhook.search.budgets import BaseCut
from billhook.search.evaluator import evaluator_of, masked_losses
from billhook.search.inputs import read_inputs
from billhook.search.ladder import RUNGS
from billhook.search.measured import prepare
from billhook.search.metrics import Solution
from billhook.search.space import Candidate
from billhook.search.validation import RungWindows

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("train")
parser.add_argument("valid")
parser.add_argument("--ratio", type=float, default=0.2)
parser.add_argument("--repeats", type=int, default=9)
args = parser.parse_args()

opened = open_model(args.model, device="cpu", dtype="float32")
model = opened.model
chosen = recipe(method="adapruner", ratio=args.ratio, calibration=args.train, validation=(args.valid,))
inputs, plan = read_inputs(opened, asked(chosen)), solved(opened, chosen, planner(model, chosen))
evaluator, rungs = evaluator_of(model, "nll", None), RungWindows(inputs.texts.validation.rungs)
base = BaseCut(model, plan, chosen.shape.width_step, chosen.shape.layout)
started = time.perf_counter()
problem = prepare(base, asked(chosen), inputs.pool, inputs.texts.validation, evaluator, rungs, Run())
print(f"evidence: {time.perf_counter() - started:.0f} s, once", flush=True)
rung = rungs.take(RUNGS[0])
few = windows(calibration_text(args.train), opened.tokenizer, 64, 10).tokens
numbers = iter(range(10**6))


def forward() -> None:
    masked_losses(model, {}, rung, None, None, evaluator.autocast)


def trial() -> None:
    n = next(numbers)  # another mixture each time: nothing is found in a cache
    terms = {"param_second": 1.0, "gate_fisher": 0.1 + n % 10 / 10, "energy": 0.5, "param_first": 0.3}
    solution = Solution((1,) * problem.evidence.count, 8 + n % 50, n, terms)
    masked_losses(model, problem.mask(Candidate(solution)), rung, None, None, evaluator.autocast)


def papers_way() -> None:
    sums = gradient_sums(model, few, ("ffn",), mean_gradient=True)
    smaller = copy.deepcopy(model)
    for axis in axes(smaller, ("ffn",)):
        place = axis.layer, axis.kind
        remove(smaller, axis, selection.lowest(taylor1_element(sums[place]), plan.drops[place], axis.blocks)[0])
    masked_losses(smaller, {}, rung, None, None, evaluator.autocast)


def timed(what: Callable[[], None]) -> float:
    before = time.perf_counter()
    what()
    return time.perf_counter() - before


ways = {"a forward pass, unpruned": forward, "a trial": trial, "a trial in the paper's way": papers_way}
found: dict[str, list[float]] = {name: [] for name in ways}
for turn in range(args.repeats + 1):
    for name, way in ways.items():
        seconds = timed(way)
        if turn:
            found[name].append(seconds)
print("| | seconds, median (range) | of a forward pass |\n|---|---|---|")
base = next(iter(found.values()))
for name, times in found.items():
    share = statistics.median(a / b for a, b in zip(times, base, strict=True))
    print(f"| {name} | {statistics.median(times):.3f} ({min(times):.3f}-{max(times):.3f}) | {share:.2f} |")
    spread = {"seconds": statistics.median(times), "least": min(times), "most": max(times)}
    results.write("search_cost", [{"model": args.model, "what": name, **spread, "forward_passes": share}])
