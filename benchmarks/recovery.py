"""What heals a cut best: python benchmarks/recovery.py STUDENT TEACHER TRAIN VALID... --results DIR > table.md

Every row trains STUDENT for --tokens of TRAIN by one objective and one set of parameters, `--lr auto` unless given, and
is judged on every VALID text, over the first --windows windows of 512 tokens in --precision; × is of TEACHER, ± one
standard error over pairs of windows.  Rows are kept in DIR: the same command goes on where it was cut off.

A row is OBJECTIVE:PARAMETERS; for a sparse STUDENT then :keep, which keeps its zeros, or :ast, with masks of --pattern
that move; :ast:dense is the same from TEACHER.  At 2:4, from ADMM and from dense:

    billhook prune demo --method admm --pattern 2:4 --calibration TRAIN -o ADMM
    python benchmarks/recovery.py ADMM demo TRAIN VALID demo --tokens 30k --windows 16 \
      --rows both:decoder:keep,both:spp,both:decoder:ast,both:decoder:ast:dense
"""

import argparse
import gc
import shutil
from pathlib import Path
from typing import Any

import results
from scoring import Scoring, cells, measured

import billhook
from billhook.runtime import cache

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("student")
parser.add_argument("teacher")
parser.add_argument("train")
parser.add_argument("valid", nargs="+")
parser.add_argument("--results", type=Path, default=Path("recovery-results"))
parser.add_argument("--rows", default="distill:decoder,distill:all,ce:all,distill:lora,distill:head+last3,distill:seam")
parser.add_argument("--pattern", default="2:4")
parser.add_argument("--tokens", default="50k")
parser.add_argument("--lr", default="auto")
parser.add_argument("--states", default="off")
parser.add_argument("--batch-tokens", type=int)
parser.add_argument("--windows", type=int, default=24)
parser.add_argument("--precision", default="auto")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--save", type=Path, help="also write the last row's checkpoint here")
args = parser.parse_args()

ZEROS: dict[str, dict[str, Any]] = {
    "": {},
    "keep": {"keep_zeros": True},
    "ast": {"masks": "ast", "pattern": args.pattern},
}
scoring = Scoring(args.valid, args.windows, args.precision)


def row(name: str) -> dict[str, Any]:
    objective, trainable, zeros, start = [*name.split(":"), "", ""][:4]
    chosen: dict[str, Any] = dict(
        teacher=args.teacher,
        tokens=args.tokens,
        text=(args.train,),
        held_out=(),
        objective=objective,
        trainable=trainable,
        states=args.states if objective != "ce" else "off",
        lr=args.lr,
        batch_tokens=args.batch_tokens,
        precision=args.precision,
        guard=False,
        seed=args.seed,
        **ZEROS[zeros],
    )
    work = args.results / f"work-{name.replace('+', '').replace(':', '-')}"
    student = args.teacher if start == "dense" else args.student
    found = billhook.recover(student, work=work, lessons=args.results / "lessons", **chosen)
    if args.save:
        shutil.rmtree(args.save, ignore_errors=True)
        args.save.mkdir(parents=True)
        found.write(args.save)
    losses = scoring(found.model.float(), found.tokenizer)
    shutil.rmtree(work)
    gc.collect()
    return {"losses": losses, "recovery": found.healing}


def keep(losses: Any, **row: Any) -> None:
    how = {key: getattr(args, key) for key in ("student", "teacher", "train", "windows", "precision")}
    results.write("recovery", [{**how, **row, **each} for each in measured(losses, dense)])


args.results.mkdir(parents=True, exist_ok=True)
common = {
    "student": args.student,
    "teacher": args.teacher,
    "windows": [args.windows, args.precision, *[text.sha256 for text in scoring.texts]],
}
dense = cache.cached(args.results, "teacher", common, lambda: scoring.of(args.teacher))
cut = cache.cached(args.results, "student", common, lambda: scoring.of(args.student))
print(f"| trained | tokens | rate | {scoring.heads} | trained parameters | tokens/s | peak MiB |")
print("|---|---|---|" + "---|" * len(scoring.texts) + "---|---|---|")
print(
    f"| unpruned | | | {cells(dense, dense)} | | | |\n| right after the cut | 0 | | {cells(cut, dense)} | | | |",
    flush=True,
)
keep(dense, row="unpruned")
keep(cut, row="right after the cut", tokens=0)
for name in args.rows.split(","):
    said = f"{name} {args.pattern}" if ":ast" in name else name
    key = {**common, "row": said} | {k: getattr(args, k) for k in ("tokens", "lr", "states", "batch_tokens", "seed")}
    found = cache.cached(args.results, "row", key, lambda name=name: row(name))
    healing = found["recovery"]
    print(
        f"| {said} | {healing['tokens']:,} | {healing['lr']:g} | {cells(found['losses'], dense)} | {healing['trained_parameters']:,} | "
        f"{healing['tokens_per_second']:.0f} | {healing['peak_growth_bytes'] / 2**20:,.0f} |",
        flush=True,
    )
    how = {key: getattr(args, key) for key in ("tokens", "lr", "states", "batch_tokens", "seed")} | {"row": said}
    numbers = {"trained_parameters": healing["trained_parameters"], "tokens_per_second": healing["tokens_per_second"]}
    numbers |= {"rate": healing["lr"], "peak_mib": healing["peak_growth_bytes"] / 2**20}
    keep(found["losses"], **how, **numbers)
