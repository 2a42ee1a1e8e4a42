"""Which layers to drop, for which healing budget: python benchmarks/depth.py MODEL TRAIN VALID... --results DIR >
table.md

Every cell drops layers by one preset, trains on TRAIN by distillation (all parameters, one learning rate, the teacher's
answers from disk), and is judged on every VALID text: perplexity and its factor to the unpruned model's, over the first
--windows windows of 512 tokens, matrix products in --precision.  Each cell is kept in DIR: the same command goes on
where it was cut off, and one cell's longer budget is a run of its own, with a schedule of its own.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import results
from scoring import Scoring, cells, measured

import billhook
from billhook.runtime import cache

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("train")
parser.add_argument("valid", nargs="+")
parser.add_argument("--results", type=Path, default=Path("depth-results"))
parser.add_argument("--presets", default="input,output,middle,both,max-gap,block-influence,contiguous")
parser.add_argument("--ratios", default="0.25,0.5")
parser.add_argument("--tokens", default="0,10k,50k")
parser.add_argument("--lr", default="5e-4")
parser.add_argument("--trainable", default="all")
parser.add_argument("--objective", default="distill")
parser.add_argument("--states", default="off")
parser.add_argument("--patch", default="none")
parser.add_argument("--windows", type=int, default=24)
parser.add_argument("--precision", default="auto")
args = parser.parse_args()

scoring = Scoring(args.valid, args.windows, args.precision)


def pruned(preset: str, ratio: float) -> Path:
    """The folder of the model without its layers."""
    out = args.results / f"pruned-{preset}-{ratio:g}-{args.patch}"
    if not out.exists():
        patch = {} if args.patch == "none" else {"patch": args.patch}
        given = {
            "method": "layerchop",
            "preset": preset,
            "ratio": ratio,
            "calibration": args.train,
            "look": False,
            **patch,
        }
        billhook.prune(args.model, statistics=args.results / "statistics", **given).save(out)
    return out


def cell(preset: str, ratio: float, tokens: str) -> dict[str, Any]:
    folder = pruned(preset, ratio)
    dropped = json.loads((folder / "billhook.json").read_text())["dropped_layers"]
    if tokens == "0":
        return {"dropped": dropped, "losses": scoring.of(str(folder)), "recovery": None}
    chosen: dict[str, Any] = dict(
        teacher=args.model,
        tokens=tokens,
        text=(args.train,),
        held_out=(),
        lr=args.lr,
        trainable=args.trainable,
        objective=args.objective,
        states=args.states,
        precision=args.precision,
        guard=False,
    )
    work, out = args.results / "work", args.results / "healed"
    if (work / "run.json").exists() and (args.results / "at.json").read_text() != f"{preset} {ratio} {tokens}":
        shutil.rmtree(work)
    (args.results / "at.json").write_text(f"{preset} {ratio} {tokens}")
    found = billhook.recover(folder, work=work, lessons=args.results / "lessons", **chosen)
    shutil.rmtree(out, ignore_errors=True)
    found.model.save_pretrained(out)
    found.tokenizer.save_pretrained(out)
    shutil.rmtree(work)
    return {"dropped": dropped, "losses": scoring.of(str(out)), "recovery": found.healing}


def keep(found: dict[str, Any], **how: Any) -> None:
    how = {**{name: getattr(args, name) for name in ("model", "train", "windows", "precision")}, **how}
    if healing := found["recovery"]:
        how["tokens_per_second"], how["seconds"] = healing["tokens_per_second"], sum(healing["seconds"].values())
    results.write("depth", [{**how, **row} for row in measured(found["losses"], dense)])


args.results.mkdir(parents=True, exist_ok=True)
common = {
    "model": args.model,
    "windows": args.windows,
    "precision": args.precision,
    "texts": [t.sha256 for t in scoring.texts],
}
dense = cache.cached(args.results, "dense", common, lambda: scoring.of(args.model))
print(f"| ratio | preset | layers dropped | tokens | {scoring.heads} | training tokens/s | seconds |")
print("|---|---|---|---|" + "---|" * len(scoring.texts) + "---|---|")
print(f"| 0 | unpruned | | | {cells(dense, dense)} | | |", flush=True)
keep({"losses": dense, "recovery": None}, ratio=0, preset="unpruned")
for ratio in map(float, args.ratios.split(",")):
    for tokens in args.tokens.split(","):
        for preset in args.presets.split(","):
            trained = {} if tokens == "0" else {k: getattr(args, k) for k in ("lr", "trainable", "objective", "states")}
            key = {**common, "ratio": ratio, "preset": preset, "tokens": tokens, "patch": args.patch, **trained}
            found = cache.cached(args.results, "cell", key, lambda: cell(preset, ratio, tokens))  # noqa: B023
            healing = found["recovery"] or {}
            took = f"{healing['tokens_per_second']:.0f} | {sum(healing['seconds'].values()):.0f}" if healing else " | "
            print(
                f"| {ratio:.0%} | {preset} | {','.join(map(str, found['dropped']))} | {tokens} | "
                f"{cells(found['losses'], dense)} | {took} |",
                flush=True,
            )
            dropped = " ".join(map(str, found["dropped"]))
            keep(found, ratio=ratio, preset=preset, dropped=dropped, patch=args.patch, tokens=tokens, **trained)
