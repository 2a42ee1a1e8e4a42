"""What heals a cut best: python benchmarks/recovery.py STUDENT TEACHER TRAIN VALID... --results DIR > table.md

Every row trains STUDENT for --tokens of TRAIN (several texts: joined by commas) by one objective and one set of
parameters, `--lr auto` unless given, and is judged on every VALID text, over the first --windows windows of 512 tokens
in --precision; × is of TEACHER, ± one standard error over pairs of windows; the excess is the loss beyond TEACHER's.
Rows are kept in DIR: the same command goes on where it was cut off.

A row is OBJECTIVE:PARAMETERS; for a sparse STUDENT then :keep, which keeps its zeros, or :ast, with masks of --pattern
that move; :ast:dense is the same from TEACHER.  At 2:4, from ADMM and from dense:

    billhook prune demo --method admm --pattern 2:4 --calibration TRAIN -o ADMM
    python benchmarks/recovery.py ADMM demo TRAIN VALID demo --tokens 30k --windows 16 \
      --rows both:decoder:keep,both:spp,both:decoder:ast,both:decoder:ast:dense:mask-score=wanda

More settings of `recover` follow, such as distill:decoder:mixture=dro:seq-len=256.  `keep-data=random-0.7` trains on
windows drawn by lot.  The last lines compare every row with the first one, paired; and of rows that keep windows, what
share of all in either any two have in common.
"""

import argparse
import gc
import json
import math
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import results
import torch
from scoring import Losses, Scoring, cells, measured

import billhook
from billhook.checkpoints import load
from billhook.evaluation.perplexity import paired
from billhook.recovery.settings import recovery
from billhook.reports import records
from billhook.runtime import cache
from billhook.training import kept_windows
from billhook.training.text_windows import Draw, read

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
    objective, trainable, *more = name.split(":")
    zeros, start = [*(word for word in more if "=" not in word), "", ""][:2]
    chosen: dict[str, Any] = dict(
        teacher=args.teacher,
        tokens=args.tokens,
        text=tuple(args.train.split(",")),
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
    chosen |= {key.replace("-", "_"): value for key, value in (word.split("=") for word in more if "=" in word)}
    if (share := str(chosen.get("keep_data", ""))).startswith("random-"):
        chosen["keep_data"] = str(drawn(float(share.removeprefix("random-")), chosen))
    work = args.results / f"work-{cache.digest({'row': name})}"
    student = args.teacher if start == "dense" else args.student
    found = billhook.recover(student, work=work, lessons=args.results / "lessons", **chosen)
    if args.save:
        shutil.rmtree(args.save, ignore_errors=True)
        args.save.mkdir(parents=True)
        found.write(args.save)
    losses = scoring(found.model.float(), found.tokenizer)
    shutil.rmtree(work)
    gc.collect()
    kept = [json.loads(line)["window"] for line in found.beside.get(kept_windows.NAME, "").splitlines()]
    return {"losses": losses, "recovery": found.healing, "kept": kept}


def drawn(share: float, chosen: dict[str, Any]) -> Path:
    """A file of so many training windows, drawn by lot."""
    settings = recovery(**chosen | {"keep_data": ""})
    tokenizer, draw = load.open_tokenizer(args.student), Draw(settings.seq_len, settings.seed)
    texts = read(settings.text, (), tokenizer, draw, record=records.stored_cut(Path(args.student)))
    order = torch.randperm(len(texts.train), generator=torch.Generator().manual_seed(settings.seed + 1))
    numbers = order[: round(share * len(texts.train))].sort().values.tolist()
    path = args.results / f"random-{share:g}-{settings.seed}.jsonl"
    path.write_text(kept_windows.lines(texts, numbers, tokenizer), encoding="utf-8")
    return path


def excesses(losses: Losses) -> str:
    """The largest and the mean loss beyond the teacher's, of all texts, in nats."""
    beyond = [math.log(paired(dense[text], losses[text])[0]) for text in dense]
    return f"{max(beyond):.4f} | {sum(beyond) / len(beyond):.4f}"


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
print(f"| trained | tokens | rate | {scoring.heads} | worst excess | mean excess | parameters | tokens/s | peak MiB |")
print("|---|---|---|" + "---|" * len(scoring.texts) + "---|---|---|---|---|")
print(
    f"| unpruned | | | {cells(dense, dense)} | | | | | |\n"
    f"| right after the cut | 0 | | {cells(cut, dense)} | {excesses(cut)} | | | |",
    flush=True,
)
keep(dense, row="unpruned")
keep(cut, row="right after the cut", tokens=0)
trained: dict[str, Losses] = {}
kept: dict[str, set[str]] = {}
for name in args.rows.split(","):
    said = f"{name} {args.pattern}" if ":ast" in name else name
    key = {**common, "row": said} | {k: getattr(args, k) for k in ("tokens", "lr", "states", "batch_tokens", "seed")}
    found = cache.cached(args.results, "row", key, lambda name=name: row(name))
    healing = found["recovery"]
    print(
        f"| {said} | {healing['tokens']:,} | {healing['lr']:g} | {cells(found['losses'], dense)} | "
        f"{excesses(found['losses'])} | {healing['trained_parameters']:,} | {healing['tokens_per_second']:.0f} | "
        f"{healing['peak_growth_bytes'] / 2**20:,.0f} |",
        flush=True,
    )
    how = {key: getattr(args, key) for key in ("tokens", "lr", "states", "batch_tokens", "seed")} | {"row": said}
    numbers = {"trained_parameters": healing["trained_parameters"], "tokens_per_second": healing["tokens_per_second"]}
    numbers |= {"rate": healing["lr"], "peak_mib": healing["peak_growth_bytes"] / 2**20}
    keep(found["losses"], **how, **numbers)
    trained[name] = found["losses"]
    kept |= {name: set(found["kept"])} if found.get("kept") else {}
(first, before), *others = trained.items()
for name, losses in others:
    print(f"\n{name} against {first}: {cells(losses, before)}")
for (one, own), (other, theirs) in combinations(kept.items(), 2):
    print(f"\nkept alike by {one} and {other}: {len(own & theirs) / len(own | theirs):.2f}")
