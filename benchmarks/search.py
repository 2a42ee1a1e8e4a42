"""What a search for samples and metric is worth: python benchmarks/search.py MODEL TRAIN VALID OTHER... --results DIR > table.md

The pool and the calibration windows come from TRAIN, candidates are tried on the first half of VALID, and everything is judged on its
second half and on every OTHER text: perplexity and its factor to the unpruned model's over the first --windows windows of 512
tokens, matrix products in --precision, ± one standard error over pairs of windows.  Every row has one size.  "Without" and "with" are
without and with restoration (FASP's default).  Each row is kept in DIR: the same command goes on where it was cut off.
"""

import argparse
import copy
import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scoring import Scoring, cells

from billhook import checkpoint, data, planning, quality, searching, store
from billhook.gradients import gradient_sums
from billhook.methods.fasp import Settings, fasp
from billhook.plan import Plan
from billhook.progress import quiet
from billhook.pruning import draw
from billhook.recipe import Recipe, recipe
from billhook.rounds import Search
from billhook.solution import scores
from billhook.taylor import taylor1_element
from billhook.trials import Means, bench_of

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("train")
parser.add_argument("valid")
parser.add_argument("other", nargs="+")
parser.add_argument("--results", type=Path, default=Path("search-results"))
parser.add_argument("--ratios", default="0.2,0.5")
parser.add_argument("--trials", type=int, default=64)
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--rows", default="llm-pruner,fixed,fasp,paper,random,tpe")
parser.add_argument("--layout", default="uniform")
parser.add_argument("--windows", type=int, default=48)
parser.add_argument("--precision", default="auto")
parser.add_argument("--jobs", type=int, default=1)
args = parser.parse_args()

LLM_PRUNER_SEEDS, LLM_PRUNER_WINDOWS, LLM_PRUNER_LENGTH = 5, 10, 64  # its defaults: ten samples of 64 tokens
Scores = Mapping[tuple[int, str], Any]

args.results.mkdir(parents=True, exist_ok=True)
text = data.evaluation_texts([args.valid])[0].text
for name, half in (("validation", text[: len(text) // 2]), ("judged", text[len(text) // 2 :])):
    (args.results / f"{Path(args.valid).stem}-{name}.txt").write_text(half)
VALIDATION, JUDGED = (str(args.results / f"{Path(args.valid).stem}-{name}.txt") for name in ("validation", "judged"))
scoring = Scoring([JUDGED, *args.other], args.windows, args.precision)
opened = checkpoint.open_model(args.model, device="cpu", dtype="float32")
WEIGHTS = store.weights_sha256(opened.model)


def settled(ratio: float, seed: int, **other: Any) -> Recipe:
    given = {"calibration": args.train, "validation": (VALIDATION,), "layout": args.layout, "trials": args.trials}
    return recipe(method="adapruner", ratio=ratio, seed=seed, **{**given, **other})


def searched(ratio: float, seed: int, **other: Any) -> Callable[[], tuple[Scores, Plan, dict[str, Any]]]:
    def found() -> tuple[Scores, Plan, dict[str, Any]]:
        chosen = settled(ratio, seed, **other)
        material = searching.read(opened, chosen)
        _, texts = draw(opened, chosen, material.calibration)
        plan = planning.make_plan(opened.model, chosen, texts, opened.dtype)
        means = Means(jobs=args.jobs, name=args.model)
        fit, folder = planning.settings_of(chosen), args.results / "evidence"
        end = searching.search(opened.model, chosen, plan, material, texts.calibration, fit, folder=folder, means=means)
        return end.scores, end.plan, end.record

    return found


def llm_pruner(ratio: float, seed: int) -> Callable[[], tuple[Scores, Plan, dict[str, Any]]]:
    """param_first on ten random windows of 64 tokens."""

    def found() -> tuple[Scores, Plan, dict[str, Any]]:
        windows = data.windows(
            data.calibration_text(args.train), opened.tokenizer, LLM_PRUNER_LENGTH, LLM_PRUNER_WINDOWS, seed
        )
        sums = gradient_sums(opened.model, windows.tokens, ("ffn",), mean_gradient=True)
        return {place: taylor1_element(each) for place, each in sums.items()}, even(ratio), {}

    return found


def best_fixed(ratio: float) -> Callable[[], tuple[Scores, Plan, dict[str, Any]]]:
    """The fixed metric that a search starts from and may not fall behind: the best on validation windows."""

    def found() -> tuple[Scores, Plan, dict[str, Any]]:
        chosen = settled(ratio, 0)
        material = searching.read(opened, chosen)
        bench = bench_of(opened.model, chosen.objective, args.results / "evidence")
        at = Search(opened.model, chosen, even(ratio), material.pool, material.validation, bench, quiet)
        at.try_known()
        return scores(at.evidence, at.standard), even(ratio), {"standard": at.standard.describe()}

    return found


def even(ratio: float) -> Plan:
    chosen, nothing = settled(ratio, 0), torch.zeros(0, 512, dtype=torch.long)
    return planning.make_plan(opened.model, chosen, planning.Texts(nothing, nothing), opened.dtype)


def judged(ratio: float, find: Callable[[], tuple[Scores | None, Plan, dict[str, Any]]]) -> dict[str, Any]:
    """Losses without and with restoration."""
    unit_scores, plan, record = find()
    windows = draw(opened, settled(ratio, 0), data.calibration_text(args.train))[1].calibration
    ends = {}
    for name, settings in (("without", replace(Settings(), restoration=False)), ("with", Settings())):
        smaller = copy.deepcopy(opened.model)
        fasp(smaller, windows, plan, settings, scores=unit_scores)
        ends[name] = scoring(smaller, opened.tokenizer)
        del smaller
        gc.collect()
    return {"losses": ends, "record": record}


ROWS: dict[str, Callable[[float], dict[str, Callable[[], Any]]]] = {
    "llm-pruner": lambda ratio: {
        f"param_first, {LLM_PRUNER_WINDOWS} windows of {LLM_PRUNER_LENGTH}, seed {n}": llm_pruner(ratio, n)
        for n in range(LLM_PRUNER_SEEDS)
    },
    "fixed": lambda ratio: {"the best fixed metric on the pool": best_fixed(ratio)},
    "fasp": lambda ratio: {"FASP, its default score": lambda: (None, even(ratio), {})},
    "paper": lambda ratio: {
        f"the space 'paper', seed {n}": searched(ratio, n, space="paper") for n in range(args.seeds)
    },
    "random": lambda ratio: {
        f"random search, seed {n}": searched(ratio, n, sampler="random") for n in range(args.seeds)
    },
    "tpe": lambda ratio: {f"TPE, seed {n}": searched(ratio, n) for n in range(args.seeds)},
}
common = {"weights": WEIGHTS, "texts": [one.sha256 for one in scoring.texts], "windows": [args.windows, args.precision]}
dense = store.kept(args.results, "dense", common, lambda: scoring(opened.model, opened.tokenizer))
print(f"| ratio | scores from | restoration | {scoring.heads} |\n|---|---|---|{'---|' * len(dense)}")
print(f"| 0 | unpruned | | {cells(dense, dense)} |", flush=True)
for ratio in map(float, args.ratios.split(",")):
    for kind in args.rows.split(","):
        rows = {}
        for name, find in ROWS[kind](ratio).items():
            key = {**common, "row": name, "ratio": ratio, "trials": args.trials, "layout": args.layout}
            rows[name] = store.kept(args.results, "row", key, lambda find=find: judged(ratio, find))  # noqa: B023
            for end, losses in rows[name]["losses"].items():
                print(f"| {ratio:.0%} | {name} | {end} | {cells(losses, dense)} |", flush=True)
        if len(rows) > 1:
            for end in ("without", "with"):
                factors = [[quality.paired(dense[t], one["losses"][end][t])[0] for t in dense] for one in rows.values()]
                spread = [
                    f"×{statistics.fmean(each):.3f}, {min(each):.3f} to {max(each):.3f}"
                    for each in zip(*factors, strict=True)
                ]
                print(
                    f"| {ratio:.0%} | **{kind}**, mean and range of {len(rows)} seeds | {end} | {' | '.join(spread)} |",
                    flush=True,
                )
