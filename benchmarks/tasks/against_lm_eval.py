"""Zero-shot through billhook beside lm-eval's own command line: python benchmarks/tasks/against_lm_eval.py DENSE PRUNED
--tasks FOLDER/*.yaml > table.md

DENSE is a model folder or `demo`, PRUNED a folder.  Each is scored by billhook and, in a process without it, by
`lm_eval --model hf` in float32 on the CPU; the last column says whether accuracy, acc_norm and both standard errors are
the same to the last bit.  --kept FOLDER resumes billhook's part.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import results

from billhook.checkpoints import load
from billhook.evaluation import zeroshot
from billhook.runtime.run import Run

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("models", nargs="+")
parser.add_argument("--tasks", nargs="+", required=True)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--limit", type=int)
parser.add_argument("--kept", type=Path)
args = parser.parse_args()


def directly(folder: Path) -> dict[str, dict[str, Any]]:
    """lm-eval's own results, by task."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-I", "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--output_path", out]
        command += ["--model_args", f"pretrained={folder},dtype=float32", "--batch_size", str(args.batch_size)]
        command += ["--limit", str(args.limit)] if args.limit else []
        subprocess.run([*command, "--tasks", ",".join(args.tasks)], check=True, stdout=subprocess.DEVNULL)
        return json.loads(next(Path(out).rglob("results_*.json")).read_text())["results"]


def both(score: float, error: float | None) -> str:
    return f"{score:.3f} ± {error:.3f}" if error is not None else f"{score:.3f}"


def same(row: dict[str, Any], own: dict[str, Any]) -> bool:
    found = (row["accuracy"], row["standard_error"], row["acc_norm"], row["acc_norm_standard_error"])
    return found == tuple(own[key] for key in ("acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"))


tasks = zeroshot.load_tasks(args.tasks)
found = []
for name in args.models:
    opened = load.open_model(name, device="cpu", dtype="float32")
    settings = {"limit": args.limit, "batch_size": args.batch_size, "run": Run(statistics=args.kept)}
    rows = zeroshot.evaluate(opened.model, opened.tokenizer, tasks, **settings)
    found.append(rows)
    assert opened.folder
    own = directly(opened.folder)
    print(
        f"{name}\n\n| task | documents | chance | acc | acc_norm | lm-eval called directly |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        scores = (
            f"{both(row['accuracy'], row['standard_error'])} | {both(row['acc_norm'], row['acc_norm_standard_error'])}"
        )
        equal = "equal" if same(row, own[row["task"]]) else f"{own[row['task']]}"
        print(f"| {row['task']} | {row['samples']} | {row['chance']:.3f} | {scores} | {equal} |", flush=True)
        numbers = {"documents": row["samples"], "chance": row["chance"], "same_as_lm_eval": equal == "equal"}
        numbers |= {"acc": row["accuracy"], "acc_error": row["standard_error"]}
        numbers |= {"acc_norm": row["acc_norm"], "acc_norm_error": row["acc_norm_standard_error"]}
        results.write("zeroshot", [{"model": name, "task": row["task"], "limit": args.limit, **numbers}])
    print()
for name, rows in zip(args.models[1:], found[1:], strict=True):
    print(f"{name} beside {args.models[0]}: {zeroshot.retention(found[0], rows)}")
