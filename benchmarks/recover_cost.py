"""What the training loop costs beside a bare one: python benchmarks/recover_cost.py STUDENT TEACHER TRAIN > table.md

In turns, on the same windows and lessons, each on a copy of the model (where buffers lie in memory makes a quarter of a
difference, and a model that accelerate wrapped before is slower): a bare loop of forward, loss, backward, clipping and
AdamW step, and the same steps by billhook's Trainer with its checks, logging and progress, judging and checkpoints left
out.  Then the bare pace of every set of parameters, on random tokens without lessons.  Run it on an idle machine.
"""

import argparse
import copy
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import results
import torch

from billhook.checkpoints import load
from billhook.math.losses import divergence
from billhook.runtime.precision import autocast_dtype, computing
from billhook.training import teacher, text_windows, throughput, trainables
from billhook.training.early_stopping import EarlyStopping
from billhook.training.schedule import Schedule
from billhook.training.trainer import RecoveryTrainer, _stacked, _Steps

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("student")
parser.add_argument("teacher")
parser.add_argument("train")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--rows", type=int, default=1, help="windows of 512 tokens in a step")
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--seconds", type=float, default=15.0, help="for the pace of each set of parameters")
parser.add_argument("--precision", default="auto")
args = parser.parse_args()

opened = load.open_model(args.student, device="cpu", dtype="float32")
model, autocast = opened.model.requires_grad_(True), autocast_dtype(args.precision, torch.device("cpu"))
texts = text_windows.read((args.train,), (), opened.tokenizer, text_windows.Draw(512))
order = list(range(args.steps * args.rows))
schedule = Schedule(texts.train, order, args.rows, 1e-6, autocast=autocast, cpu=True)
scratch = Path(tempfile.mkdtemp())
dense = load.open_model(args.teacher, device="cpu", dtype="float32").model
predictions = teacher.fill_cache(
    dense, texts.train[: len(schedule.order)], scratch / "lessons", teacher.Lesson(256, autocast=autocast)
)
del dense


def bare() -> float:
    """Seconds of all steps but the first, which allocates."""
    fresh = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=schedule.lr, weight_decay=0.0, fused=True)
    items, started = _Steps(schedule, predictions), 0.0
    fresh.train()
    for step in range(args.steps):
        if step == 1:
            started = time.perf_counter()
        for row in range(args.rows):
            batch = _stacked([items[step * args.rows + row]])
            with computing(torch.device("cpu"), autocast):
                logits = fresh(batch["tokens"], use_cache=False).logits
            loss = divergence(logits[:, :-1], batch["ids"], batch["chances"], batch["tail"]).mean()
            (loss / args.rows).backward()
        torch.nn.utils.clip_grad_norm_(fresh.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def ours() -> float:
    ticks: list[float] = []
    fresh = copy.deepcopy(model)
    given = (fresh, schedule, predictions, EarlyStopping(()), scratch / "work")
    trainer = RecoveryTrainer(*given, lambda *_: ticks.append(time.perf_counter()))
    trainer.train_or_resume(lambda line: None)
    return ticks[-1] - ticks[1]


def keep(what: str, rate: float, **more: object) -> None:
    row = {"student": args.student, "rows": args.rows, "what": what, "tokens_per_second": rate}
    results.write("recover_cost", [row | more])


found = []
for turn in range(args.repeats + 1):
    pair = bare(), ours()
    if turn:
        found.append(pair)
shutil.rmtree(scratch)
tokens = (args.steps - 1) * args.rows * 512
print("| loop | tokens a second, median (range) | beside |\n|---|---|---|")
for name, times in zip(("bare", "billhook recover"), zip(*found, strict=True), strict=True):
    rates = sorted(tokens / one for one in times)
    print(f"| {name} | {statistics.median(rates):.0f} ({rates[0]:.0f}-{rates[-1]:.0f}) | |")
    keep(name, statistics.median(rates), least=rates[0], most=rates[-1])
share = statistics.median(a / b for a, b in found)
print(f"| share of the bare loop's speed, median of pairs | | {share:.3f} |")
keep("billhook recover", statistics.median(rates), least=rates[0], most=rates[-1], beside=share)
print("\n| trained | parameters | tokens a second |\n|---|---|---|")
for name, make in trainables.TRAINERS.items():
    kept = list(range(12)) + list(range(20, 30))  # a seam in the middle, for the set that needs one
    trained = make(copy.deepcopy(opened.model), trainables.Seam(kept, 30), 32)
    rate = throughput.training_pace(trained, 512, args.rows, autocast, args.seconds)
    print(f"| {name} | {trainables.trained(trained):,} | {rate:.0f} |", flush=True)
    keep(f"pace of {name}", rate, parameters=trainables.trained(trained))
    del trained
