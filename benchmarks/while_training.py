"""Pruned while it trains, or at once before: python benchmarks/while_training.py MODEL CALIBRATION TEXT... --work DIR

Every row cuts MODEL to the parameters that FASP's equal widths leave at each of --ratios, and trains what is left on
CALIBRATION against MODEL, at one rate.  Tokens that gates learned on count: all rows have --tokens together, and one
that needs more to begin with is refused.  Judged on the first --windows windows of 512 tokens of every TEXT (`demo`
stands for two); × is of MODEL, ± one standard error over pairs of windows.  DIR keeps every row as it is, cut or half
trained: the same command goes on.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import results
from scoring import Scoring, cells, measured

import billhook
from billhook.checkpoints import load
from billhook.models import sizes
from billhook.planning.budget import solved
from billhook.planning.planners import planner
from billhook.pruning.recipe import recipe
from billhook.reports import records
from billhook.reports.gate_tables import learned_tokens
from billhook.runtime import cache

LEARNS = {"samples": 128, "layout": "per_layer"}
ROWS: dict[str, tuple[dict[str, Any], str]] = {  # a prune, and what is trained after it
    "fasp": ({"method": "fasp"}, "decoder"),
    "fasp, sensitivity": ({"method": "fasp", "layout": "per_layer", "allocation": "sensitivity"}, "decoder"),
    "gates": ({"method": "gates", **LEARNS}, "decoder"),
    "softtopk": ({"method": "softtopk", "samples": 128}, "decoder"),
    "l0": ({"method": "l0", **LEARNS, "steps": 128}, "decoder"),
    "mlpruning": ({"method": "mlpruning", **LEARNS, "axes": ("groups", "ffn")}, "decoder"),
    "fasp, lora": ({"method": "fasp"}, "lora"),
    "loraprune, lora": ({"method": "loraprune", "samples": 128}, "lora"),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("texts", nargs="+")
parser.add_argument("--work", type=Path, default=Path("while-training"))
parser.add_argument("--ratios", default="0.2,0.5", help="of the decoder, with commas")
parser.add_argument("--rows", default=";".join(ROWS), help=f"separated by ;: {'; '.join(ROWS)}")
parser.add_argument("--tokens", type=int, default=131072, help="in all")
parser.add_argument("--seq-len", type=int, default=512)
parser.add_argument("--rate", type=float, default=1e-4, help="of the training after the cut; of lora three times that")
parser.add_argument("--windows", type=int, default=24)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()


def cut(ratio: float, row: str, folder: Path) -> Path:
    """The folder of a row's cut model."""
    if not (folder / "cut").exists():
        equal = recipe(method="fasp", ratio=ratio)
        saved = sizes.saved_by(skeleton, solved(opened, equal, planner(skeleton, equal)))
        given = {"calibration": args.calibration, "seq_len": args.seq_len, "seed": args.seed, "look": False}
        given |= {"params": sizes.total_parameters(skeleton) - saved, "work": folder / "prune", **ROWS[row][0]}
        billhook.prune(args.model, quiet=True, **given).save(folder / "cut")
    return folder / "cut"


def trained(ratio: float, row: str) -> dict[str, Any]:
    """A row's losses, how many parameters are left, and how its tokens were shared."""
    said = cache.digest({**common, "ratio": ratio, "row": row, "code": cache.code_sha256()})
    folder = args.work / f"{row.replace(', ', '-')}-{said}"
    student, trainable = cut(ratio, row, folder), ROWS[row][1]
    before = learned_tokens(records.stored_cut(student) or {})
    if args.tokens - before < args.seq_len:
        raise SystemExit(f"{row} learns on {before:,} tokens before the cut: give more --tokens")
    found = billhook.recover(
        student,
        teacher=args.model,
        text=(args.calibration,),
        held_out=(),
        guard=False,
        tokens=args.tokens - before,
        trainable=trainable,
        lr=args.rate * (3 if trainable == "lora" else 1),
        seq_len=args.seq_len,
        seed=args.seed,
        work=folder / "recovery",
        lessons=args.work / "lessons",
        quiet=True,
    )
    left = sum(parameter.numel() for parameter in found.model.parameters())
    losses = scoring(found.model.float(), found.tokenizer)
    shutil.rmtree(folder)
    return {"losses": losses, "parameters": left, "before": before, "after": found.healing["tokens"]}


scoring = Scoring(args.texts, args.windows, "float32")
opened = load.open_model(args.model, dtype="float32")
skeleton = opened.model
common = {
    "model": cache.model_sha256(skeleton),
    **{name: getattr(args, name) for name in ("tokens", "seq_len", "rate", "seed")},
}
common |= {"calibration": args.calibration, "texts": [text.sha256 for text in scoring.texts], "windows": args.windows}
dense = scoring(skeleton, opened.tokenizer)
print(f"| ratio | row | parameters | tokens before the cut, after | {scoring.heads} |")
print(f"|---|---|---|---|{'---|' * len(dense)}", flush=True)
for ratio in map(float, args.ratios.split(",")):
    for row in map(str.strip, args.rows.split(";")):
        key = {**common, "ratio": ratio, "row": row, "settings": results.said(ROWS[row])}
        found = cache.cached(args.work / "rows", "row", key, lambda: trained(ratio, row))  # noqa: B023
        shared = f"{found['before']:,}, {found['after']:,}"
        print(
            f"| {ratio:g} | {row} | {found['parameters']:,} | {shared} | {cells(found['losses'], dense)} |", flush=True
        )
        how = {name: getattr(args, name) for name in ("model", "calibration", "tokens", "seq_len", "windows", "seed")}
        how |= {"ratio": ratio, "row": row, "rate": args.rate}
        counts = {"parameters": found["parameters"], "before": found["before"], "after": found["after"]}
        results.write("while_training", [{**how, **counts, **one} for one in measured(found["losses"], dense)])
