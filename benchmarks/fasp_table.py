"""Which score, stream and damping keep the most: python benchmarks/fasp_table.py MODEL CALIBRATION TEXT... > table.md

Calibrates on 64 windows of 512 tokens drawn by seed 0, prunes in float32, and prints as a Markdown table the perplexity
of every cell on the first --windows windows of every TEXT, and the factor to the dense model's.  In the dense stream
one walk serves all ratios of the same settings.
"""

import argparse
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import results

from billhook import data
from billhook.checkpoints import load
from billhook.cuts.narrowing import Settings, narrow, narrow_each
from billhook.evaluation import perplexity
from billhook.models.plan import Plan
from billhook.models.sizes import decoder_parameters, total_parameters
from billhook.models.surgery import cast
from billhook.planning.planners import even_planner
from billhook.pruning.recipe import recipe
from billhook.runtime.run import Run

RATIOS = (0.1, 0.2, 0.3, 0.5)
DENSE = [(Settings(score=score), ratio) for ratio in RATIOS for score in ("obs", "wanda", "energy")]
DENSE += [(Settings(damping=damping), 0.2) for damping in (1e-4, 1e-2)]
DENSE += [(Settings(score=score, restoration=False), 0.2) for score in ("obs", "wanda", "energy")]
PRUNED = [("dense_target", Settings(), ratio) for ratio in RATIOS]
PRUNED += [("dense_target", Settings(correction=share), 0.2) for share in (0.15, 0.5, 1.0)]
PRUNED += [("dense_target", Settings(score="wanda"), 0.2), ("sequential", Settings(), 0.2)]
Cell = tuple[str, Settings, float]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("texts", nargs="+")
parser.add_argument(
    "--part", choices=("dense", "pruned", "all"), default="all", help="cells of the dense stream, or others"
)
parser.add_argument("--stream", help="of --part pruned, the cells of this stream alone")
parser.add_argument("--windows", type=int, help="score at most this many windows of each text")
parser.add_argument("--evaluate-dtype", choices=load.DTYPES, default="float32")
args = parser.parse_args()

opened = load.open_model(args.model)
tokens = data.windows(data.calibration_text(args.calibration), opened.tokenizer, 512, 64, 0).tokens
texts = [data.windows(text, opened.tokenizer, 512) for text in data.evaluation_texts(args.texts)]
windows = [dataclasses.replace(one, tokens=one.tokens[: args.windows]) for one in texts]


def perplexities(model: Any) -> list[float]:
    scored = copy.deepcopy(model)
    cast(scored, load.DTYPES[args.evaluate_dtype])
    return [perplexity.perplexity(scored, one).perplexity for one in windows]


def equal(ratio: float) -> Plan:
    return even_planner(opened.model, recipe(method="fasp", ratio=ratio)).make(ratio * decoder_parameters(opened.model))


def dense_cells() -> Iterator[tuple[Cell, Any]]:
    for settings in dict.fromkeys(one for one, _ in DENSE):
        ratios = [ratio for one, ratio in DENSE if one == settings]
        models = narrow_each(opened.model, tokens, [equal(ratio) for ratio in ratios], settings, Run())
        for ratio, (model, _) in zip(ratios, models, strict=True):
            yield ("dense", settings, ratio), model


def pruned_cells() -> Iterator[tuple[Cell, Any]]:
    for stream, settings, ratio in PRUNED:
        if args.stream not in (None, stream):
            continue
        model = copy.deepcopy(opened.model)
        narrow(model, tokens, equal(ratio), dataclasses.replace(settings, stream=stream), Run())
        yield (stream, settings, ratio), model


def keep(parameters: int, measured: list[float], **cell: Any) -> None:
    how = {name: getattr(args, name) for name in ("model", "calibration", "windows", "evaluate_dtype")}
    row = {**how, **cell, "parameters": parameters}
    texts_of = zip(windows, measured, base, strict=True)
    results.write(
        "fasp_table",
        [{**row, "text": text.source, "perplexity": p, "factor": p / dense} for text, p, dense in texts_of],
    )


base, size = perplexities(opened.model), total_parameters(opened.model)
names = " | ".join(f"{one.source} | ×" for one in windows)
print(f"| stream | score | damping | correction | restored | ratio | parameters | {names} |")
print("|---|---|---|---|---|---|---|" + "---|---|" * len(windows))
print(f"| unpruned | | | | | 0 | {size:,} | " + " | ".join(f"{p:.2f} | 1" for p in base) + " |", flush=True)
keep(size, base, stream="unpruned", ratio=0)
parts = []
if args.part != "pruned":
    parts.append(dense_cells())
if args.part != "dense":
    parts.append(pruned_cells())
for cells in parts:
    for (stream, cell, ratio), model in cells:
        measured = perplexities(model)
        found = " | ".join(f"{p:.2f} | {p / dense:.3f}" for p, dense in zip(measured, base, strict=True))
        share = f"{cell.correction:g}" if stream == "dense_target" else ""
        row = f"| {stream} | {cell.score} | {cell.damping:g} | {share} | {'yes' if cell.restoration else 'no'} | {ratio:.0%} "
        print(f"{row}| {total_parameters(model):,} | {found} |", flush=True)
        how = {"stream": stream, "ratio": ratio, "correction": share, "restored": cell.restoration}
        keep(total_parameters(model), measured, score=cell.score, damping=cell.damping, **how)
