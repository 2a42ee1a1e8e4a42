"""What allocations and layouts are worth at equal size: python benchmarks/allocation.py MODEL CALIBRATION TEXT... >
table.md

Every row is one `billhook.prune` with the default settings (64 windows of 512 tokens drawn by seed 0) but for what
it names; it prints parameters, the perplexity on every TEXT and its factor to the unpruned model's, and where the
layers went.  What an allocation measures is kept in --statistics and serves every ratio.
"""

import argparse
import copy
from typing import Any

import results

import billhook
from billhook import data
from billhook.checkpoints import load
from billhook.evaluation import perplexity
from billhook.models import sizes
from billhook.models.surgery import cast
from billhook.runtime.progress import quiet

PER_LAYER = {"layout": "per_layer"}
ROWS: dict[str, dict[str, Any]] = {
    "equal": {"layout": "uniform"},
    "skip:4,2": PER_LAYER | {"allocation": "skip:4,2"},
    "global": PER_LAYER | {"allocation": "global"},
    "standardised": PER_LAYER | {"allocation": "standardised"},
    "sensitivity": PER_LAYER | {"allocation": "sensitivity"},
    "sensitivity, ffn and groups": PER_LAYER | {"allocation": "sensitivity", "axes": ("ffn", "groups")},
    "sensitivity, ffn and layers": PER_LAYER | {"allocation": "sensitivity", "axes": ("ffn", "layers")},
    "equal, ffn and value": PER_LAYER | {"axes": ("ffn", "value")},
}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("texts", nargs="+")
parser.add_argument("--ratios", default="0.1,0.2,0.3,0.5")
parser.add_argument(
    "--rows", default=",".join(n for n in ROWS if "," not in n), help="separated by commas, or ; where names hold some"
)
parser.add_argument("--statistics", default="statistics")
parser.add_argument("--probes", type=int, default=8, help="windows that sensitivity judges by")
parser.add_argument("--dtype", default="auto", help="to prune in: on a CPU auto is float32")
parser.add_argument("--evaluate-dtype", choices=load.DTYPES, default="float32")
args = parser.parse_args()

opened = load.open_model(args.model, dtype=args.dtype)
texts = [data.windows(text, opened.tokenizer, 512) for text in data.evaluation_texts(args.texts)]


def perplexities(model: Any) -> list[float]:
    cast(model, load.DTYPES[args.evaluate_dtype])
    return [perplexity.perplexity(model, one).perplexity for one in texts]


def said(report: dict[str, Any]) -> str:
    widths = [cut["units"] - cut["dropped"] for cut in report["cuts"] if cut["kind"] == "ffn"]
    gone = f"without layers {', '.join(map(str, report['dropped_layers']))}; " if report["dropped_layers"] else ""
    return gone + (str(widths[0]) if len(set(widths)) == 1 else " ".join(map(str, widths)))


def keep(ratio: float, name: str, parameters: int, measured: list[float], widths: str) -> None:
    how = {name: getattr(args, name) for name in ("model", "calibration", "dtype", "evaluate_dtype", "probes")}
    row = {**how, "ratio": ratio, "layout": ROWS.get(name, {}).get("layout"), "allocation": name}
    row |= {"parameters": parameters, "widths": widths}
    texts_of = zip(texts, measured, base, strict=True)
    results.write(
        "allocation",
        [{**row, "text": text.source, "perplexity": p, "factor": p / dense} for text, p, dense in texts_of],
    )


base = perplexities(copy.deepcopy(opened.model))
keep(0, "unpruned", sizes.total_parameters(opened.model), base, "")
names = " | ".join(f"{one.source} | ×" for one in texts)
print(f"| ratio | layout | allocation | parameters | {names} | FFN widths |")
print("|---|---|---|---|" + "---|---|" * len(texts) + "---|")
print(
    "| 0 | | unpruned | "
    + f"{sizes.total_parameters(opened.model):,} | "
    + " | ".join(f"{p:.2f} | 1" for p in base)
    + " | |",
    flush=True,
)
for ratio in map(float, args.ratios.split(",")):
    for name in args.rows.split(";" if ";" in args.rows else ","):
        result = billhook.prune(
            copy.deepcopy(opened.model),
            method="fasp",
            tokenizer=opened.tokenizer,
            statistics=args.statistics,
            tick=quiet,
            ratio=ratio,
            calibration=args.calibration,
            probes=args.probes,
            look=False,
            **ROWS[name],
        )
        measured = perplexities(result.model)
        found = " | ".join(f"{p:.2f} | {p / dense:.3f}" for p, dense in zip(measured, base, strict=True))
        size = result.record["sizes"]["after"]["parameters"]
        print(
            f"| {ratio:.0%} | {ROWS[name]['layout']} | {name} | {size:,} | {found} | {said(result.record)} |",
            flush=True,
        )
        keep(ratio, name, size, measured, said(result.record))
