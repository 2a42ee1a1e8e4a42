"""What a search for samples and metric is worth: python benchmarks/search.py MODEL TRAIN VALID OTHER... --results DIR >
table.md

The pool and the calibration windows come from TRAIN, candidates are tried on the first half of VALID (without
paragraphs that quote TRAIN), and everything is judged on its second half and on every OTHER text: perplexity and its
factor to the unpruned model's over the first --windows windows of 512 tokens, ± one standard error over pairs of
windows.  No row has more parameters than FASP's.  "Without" and "with" are without and with restoration (FASP's
default, on --samples windows), each by a search of its own; cuts are restored and judged in --precision, as finalists
of a search are.  Each row is kept in DIR: the same command goes on where it was cut off.

Every promoted trial of a search is judged too, as it was tried, without restoration: overfit.svg in DIR has what it
gained on validation windows against what it gains on the judged ones.
"""

import argparse
import copy
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import results
import torch
from scoring import Scoring, cells, measured

from billhook import data
from billhook.calibration.gradients import gradient_sums
from billhook.checkpoints import load
from billhook.cuts.narrowing import Settings, narrow
from billhook.evaluation import perplexity
from billhook.math import selection
from billhook.math.taylor import taylor1_element
from billhook.methods.searched import asked
from billhook.models.axes import axes
from billhook.models.plan import Plan
from billhook.models.surgery import cast, drop_layers, remove
from billhook.planning.budget import solved
from billhook.planning.planners import planner
from billhook.planning.recipe import Recipe
from billhook.planning.texts import draw
from billhook.pruning.recipe import recipe
from billhook.reports import charts
from billhook.reports.charts import Axis, Point, Series
from billhook.runtime import atomic, cache
from billhook.runtime.progress import quiet
from billhook.runtime.run import Run
from billhook.runtime.workers import Workers
from billhook.search import adapruner
from billhook.search.adapruner import AdaPruner
from billhook.search.evaluator import evaluator_of
from billhook.search.harness import Rounds
from billhook.search.inputs import Inputs, read_inputs
from billhook.search.samplers import Study
from billhook.search.trial import paired_gain

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("train")
parser.add_argument("valid")
parser.add_argument("other", nargs="+")
parser.add_argument("--results", type=Path, default=Path("search-results"))
parser.add_argument("--ratios", default="0.2,0.5")
parser.add_argument("--trials", type=int, default=64)
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--rows", default="fixed,fasp,tpe per_layer,random per_layer,tpe,random,llm-pruner,paper")
parser.add_argument("--layout", default="uniform")
parser.add_argument("--windows", type=int, default=32)
parser.add_argument("--samples", type=int, default=32)
parser.add_argument("--precision", default="auto")
parser.add_argument("--jobs", type=int, default=1)
parser.add_argument("--promoted", type=int, default=8, help="windows of each text that promoted trials are judged on")
args = parser.parse_args()

LLM_PRUNER_SEEDS, LLM_PRUNER_WINDOWS, LLM_PRUNER_LENGTH = 5, 10, 64  # its defaults: ten samples of 64 tokens
Scores = Mapping[tuple[int, str], Any]
Find = Callable[
    [bool], tuple[Scores, Plan, dict[str, Any]]
]  # for a cut that is restored, or not: what goes, and a record

RUN = 80  # characters: a search refuses a validation text that shares passages with the calibration text


def unseen(text: str, other: str) -> str:
    """The paragraphs that share no run of characters with another text."""
    runs = {other[n : n + RUN] for n in range(len(other) - RUN + 1)}
    return "\n".join(
        part
        for part in text.split("\n")
        if not any(part[n : n + RUN] in runs for n in range(max(1, len(part) - RUN + 1)))
    )


args.results.mkdir(parents=True, exist_ok=True)
text = unseen(data.evaluation_texts([args.valid])[0].text, data.calibration_text(args.train).text)
for name, half in (("validation", text[: len(text) // 2]), ("judged", text[len(text) // 2 :])):
    (args.results / f"{Path(args.valid).stem}-{name}.txt").write_text(half)
VALIDATION, JUDGED = (str(args.results / f"{Path(args.valid).stem}-{name}.txt") for name in ("validation", "judged"))
scoring = Scoring([JUDGED, *args.other], args.windows, args.precision)
opened = load.open_model(args.model, device="cpu", dtype="float32")
WEIGHTS = cache.model_sha256(opened.model)


def settled(ratio: float, seed: int, **other: Any) -> Recipe:
    given = {"calibration": args.train, "validation": (VALIDATION,), "layout": args.layout, "trials": args.trials}
    given["samples"] = args.samples
    return recipe(method="adapruner", ratio=ratio, seed=seed, **{**given, **other})


def searched(ratio: float, seed: int, **other: Any) -> Find:
    def found(restoration: bool) -> tuple[Scores, Plan, dict[str, Any]]:
        chosen = settled(ratio, seed, restoration=restoration, **other)
        inputs, plan = read_inputs(opened, asked(chosen)), even(ratio)
        texts = draw(opened, chosen, inputs.calibration)
        fit, folder = chosen.settings.cut, args.results / "evidence"
        run = Run(statistics=folder, workers=Workers(jobs=args.jobs, name=args.model))
        end = adapruner.search(opened.model, asked(chosen), plan, inputs, texts.calibration, fit, run)
        trials = {} if chosen.settings.space == "paper" else {"judged": judged_trials(chosen, plan, inputs, folder)}
        return end.scores, end.plan, {**end.record, **trials}

    return found


def judged_trials(chosen: Recipe, plan: Plan, inputs: Inputs, folder: Path) -> dict[str, list[list[float]]]:
    """What each promoted trial gains over the standard, by text: on validation windows, and on windows of the text.

    `folder` has every loss of the search, so that it is repeated without a forward pass.
    """
    problem = begun(chosen, plan, inputs, folder)
    rounds = Rounds(problem, quiet)
    study = Study(problem.opening.dimensions, chosen.settings.sampler, chosen.calibration.seed)
    promoted = rounds.promote(rounds.run(study, chosen.settings.trials, lambda: False))
    trials = [problem.opening.standard, *promoted]
    gains = {}
    for text in scoring.texts:
        windows = data.windows(text, opened.tokenizer, 512).tokens[: args.promoted]
        (_, standard), *others = problem.losses(trials, windows, quiet)
        gains[text.name] = [
            [
                paired_gain(trial.losses["standard"], trial.losses["promoted"])["gain"],
                paired_gain(standard, losses)["gain"],
            ]
            for trial, (_, losses) in zip(promoted, others, strict=True)
        ]
    return gains


def begun(chosen: Recipe, plan: Plan, inputs: Inputs, folder: Path) -> AdaPruner:
    """A search up to its known metrics."""
    evaluator, nothing = (
        evaluator_of(opened.model, chosen.settings.objective, folder),
        torch.zeros(0, 512, dtype=torch.long),
    )
    return adapruner.begin(evaluator, asked(chosen), plan, inputs, nothing, Settings(), Run())


def llm_pruner(ratio: float, seed: int) -> Find:
    """param_first on ten random windows of 64 tokens."""

    def found(restoration: bool) -> tuple[Scores, Plan, dict[str, Any]]:
        windows = data.windows(
            data.calibration_text(args.train), opened.tokenizer, LLM_PRUNER_LENGTH, LLM_PRUNER_WINDOWS, seed
        )
        sums = gradient_sums(opened.model, windows.tokens, ("ffn",), mean_gradient=True)
        return {place: taylor1_element(each) for place, each in sums.items()}, even(ratio), {}

    return found


def best_fixed(ratio: float) -> Find:
    """The fixed metric that a search starts from and may not fall behind: the best on validation windows."""

    def found(restoration: bool) -> tuple[Scores, Plan, dict[str, Any]]:
        chosen = settled(ratio, 0)
        problem = begun(chosen, even(ratio), read_inputs(opened, asked(chosen)), args.results / "evidence")
        standard = problem.opening.standard.candidate
        return problem.measured.scores(standard), even(ratio), {"standard": standard.solution.describe()}

    return found


def even(ratio: float) -> Plan:
    chosen = settled(ratio, 0)
    return solved(opened, chosen, planner(opened.model, chosen))


def ranked(values: Sequence[float]) -> list[int]:
    return [sorted(values).index(each) for each in values]


def judged(ratio: float, find: Find) -> dict[str, Any]:
    """Losses without and with restoration."""
    windows = draw(opened, settled(ratio, 0), data.calibration_text(args.train)).calibration
    ends, record = {}, {}
    for name in ("without", "with"):
        unit_scores, plan, record[name] = find(name == "with")
        smaller = copy.deepcopy(opened.model)
        cast(smaller, scoring.autocast or smaller.dtype)
        if name == "with" or not unit_scores:
            narrow(smaller, windows, plan, Settings(restoration=name == "with"), Run(), unit_scores)
        else:
            cut(smaller, plan, unit_scores)
        ends[name] = scoring(smaller, opened.tokenizer)
        del smaller
        gc.collect()
    return {"losses": ends, "record": record["with"], "unrestored": record["without"]}


def cut(model: Any, plan: Plan, unit_scores: Scores) -> None:
    for axis in axes(model, plan.kinds):
        if count := plan.drops.get((axis.layer, axis.kind), 0):
            remove(model, axis, selection.lowest(unit_scores[axis.layer, axis.kind], count, axis.blocks)[0])
    drop_layers(model, plan.layers)


ROWS: dict[str, Callable[[float], dict[str, Find]]] = {
    "llm-pruner": lambda ratio: {
        f"param_first, {LLM_PRUNER_WINDOWS} windows of {LLM_PRUNER_LENGTH}, seed {n}": llm_pruner(ratio, n)
        for n in range(LLM_PRUNER_SEEDS)
    },
    "fixed": lambda ratio: {"the best fixed metric on the pool": best_fixed(ratio)},
    "fasp": lambda ratio: {"FASP, its default score": lambda _: ({}, even(ratio), {})},
    "paper": lambda ratio: {
        f"the space 'paper', seed {n}": searched(ratio, n, space="paper") for n in range(args.seeds)
    },
    "random": lambda ratio: {
        f"random search, seed {n}": searched(ratio, n, sampler="random") for n in range(args.seeds)
    },
    "tpe": lambda ratio: {f"TPE, seed {n}": searched(ratio, n) for n in range(args.seeds)},
    "random per_layer": lambda ratio: {
        f"random search, per_layer, seed {n}": searched(ratio, n, sampler="random", layout="per_layer")
        for n in range(args.seeds)
    },
    "tpe per_layer": lambda ratio: {
        f"TPE, per_layer, seed {n}": searched(ratio, n, layout="per_layer") for n in range(args.seeds)
    },
}


def keep(ratio: float, row: str, restoration: str, losses: Any) -> None:
    how = {key: getattr(args, key) for key in ("model", "train", "trials", "layout", "samples", "windows", "precision")}
    how |= {"ratio": ratio, "row": row, "restoration": restoration}
    results.write("search", [{**how, **each} for each in measured(losses, dense)])


common = {"weights": WEIGHTS, "texts": [one.sha256 for one in scoring.texts], "windows": [args.windows, args.precision]}
dense = cache.cached(args.results, "dense", common, lambda: scoring(opened.model, opened.tokenizer))
print(f"| ratio | scores from | restoration | {scoring.heads} |\n|---|---|---|{'---|' * len(dense)}")
print(f"| 0 | unpruned | | {cells(dense, dense)} |", flush=True)
keep(0, "unpruned", "", dense)
overfit: dict[str, dict[str, list[list[float]]]] = {}  # by what sampled and by text
for ratio in map(float, args.ratios.split(",")):
    for kind in args.rows.split(","):
        rows = {}
        for name, find in ROWS[kind](ratio).items():
            key = {**common, "row": name, "ratio": ratio, "trials": args.trials, "layout": args.layout}
            key["samples"] = args.samples
            rows[name] = cache.cached(args.results, "row", key, lambda find=find: judged(ratio, find))  # noqa: B023
            for text, pairs in rows[name]["record"].get("judged", {}).items():
                overfit.setdefault(f"{kind}, {ratio:.0%}", {}).setdefault(text, []).extend(pairs)
            for end, losses in rows[name]["losses"].items():
                print(f"| {ratio:.0%} | {name} | {end} | {cells(losses, dense)} |", flush=True)
                keep(ratio, name, end, losses)
        if len(rows) > 1:
            for end in ("without", "with"):
                factors = [
                    [perplexity.paired(dense[t], one["losses"][end][t])[0] for t in dense] for one in rows.values()
                ]
                spread = [
                    f"×{statistics.fmean(each):.3f}, {min(each):.3f} to {max(each):.3f}"
                    for each in zip(*factors, strict=True)
                ]
                print(
                    f"| {ratio:.0%} | **{kind}**, mean and range of {len(rows)} seeds | {end} | {' | '.join(spread)} |",
                    flush=True,
                )
if overfit:
    print(
        "\n| promoted trials | judged on | trials | gain, validation | gain, judged | share that lasts | rank correlation |"
    )
    print("|---|---|---|---|---|---|---|")
series = []
for kind, by_text in overfit.items():
    for text, pairs in by_text.items():
        seen, lasting = zip(*pairs, strict=True)
        before, after = statistics.fmean(seen), statistics.fmean(lasting)
        ranks = statistics.correlation(ranked(seen), ranked(lasting)) if len(pairs) > 1 else 0
        print(f"| {kind} | {text} | {len(pairs)} | {before:.3f} | {after:.3f} | {after / before:.0%} | {ranks:.2f} |")
        row, ratio = kind.rsplit(", ", 1)
        how = {"model": args.model, "ratio": float(ratio.rstrip("%")) / 100, "row": row, "promoted": args.promoted}
        gains = {"gain_validation": before, "gain_judged": after, "share_that_lasts": after / before}
        how |= {"text": text, "trials": len(pairs), "rank_correlation": float(ranks)}
        results.write("search_overfit", [how | gains])
        series.append(Series(f"{kind}, {text}", [Point(x, y) for x, y in pairs], drawn="points"))
if series:
    ends = [f([float(p.x) for one in series for p in one.points]) for f in (min, max)]
    series.append(Series("as much", [Point(x, x) for x in ends]))
    x, y = (Axis(f"gain over the standard on {what} windows, nats a token") for what in ("validation", "judged"))
    drawing = charts.curves("Does the search overfit?", series, x, y)
    head, rest = drawing.split(">", 1)
    name = "" if "xmlns=" in head else ' xmlns="http://www.w3.org/2000/svg"'
    atomic.write_text(args.results / "overfit.svg", f"{head}{name}><style>{charts.PICTURE}</style>{rest}\n")
