"""SparseGPT and Wanda here and in llm-compressor: python benchmarks/llm_compressor.py MODEL CALIBRATION TEXT...
--python OTHER > table.md

OTHER is the Python of an environment with `pip install llmcompressor==0.14.0.1` (it wants another transformers than
billhook).  Both prune every linear weight of the decoder layers in float32 by the same calibration windows (--samples
of 512 tokens, seed 0); billhook keeps a tenth of them apart for its errors, as it always does.  Seconds: of the call
that prunes, model loaded.  Judged as benchmarks/masks.py does.  Each row is kept in DIR.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import results
import torch
from safetensors.torch import save_file
from scoring import Scoring, cells, measured
from transformers import AutoModelForCausalLM

import billhook
from billhook import data
from billhook.checkpoints import load
from billhook.runtime import cache

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("text", nargs="+")
parser.add_argument("--python", required=True)
parser.add_argument("--results", type=Path, default=Path("mask-results"))
parser.add_argument("--budgets", default="0.5,2:4")
parser.add_argument("--methods", default="sparsegpt,wanda")
parser.add_argument("--samples", type=int, default=64)
parser.add_argument("--windows", type=int, default=84)
parser.add_argument("--precision", default="auto")
args = parser.parse_args()

CLIENT = Path(__file__).with_name("llm_compressor_client.py")
scoring = Scoring(args.text, args.windows, args.precision)
opened = load.open_model(args.model, device="cpu", dtype="float32")
common = {"weights": cache.model_sha256(opened.model), "texts": [one.sha256 for one in scoring.texts]}
common |= {"windows": [args.windows, args.precision], "calibration": args.calibration, "samples": args.samples}


def theirs(method: str, budget: str) -> dict[str, Any]:
    found = load.open_model(args.model, device="cpu", dtype="float32")
    windows = data.windows(data.calibration_text(args.calibration), found.tokenizer, 512, args.samples, 0)
    with tempfile.TemporaryDirectory() as scratch:
        model, tokens, out = (str(Path(scratch) / name) for name in ("model", "tokens.safetensors", "out"))
        found.model.save_pretrained(model)
        found.tokenizer.save_pretrained(model)
        save_file({"tokens": windows.tokens.contiguous()}, tokens)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        ran = subprocess.run(
            [args.python, str(CLIENT), model, tokens, method, budget, out],
            capture_output=True,
            text=True,
            env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        )
        if ran.returncode:
            raise SystemExit(ran.stderr)
        pruned = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        return {"losses": scoring(pruned, found.tokenizer), "zeros": zeros(pruned), **last(ran.stdout)}


def last(printed: str) -> dict[str, Any]:
    return json.loads(printed.strip().splitlines()[-1])


def zeros(model: torch.nn.Module) -> float:
    weights = [one for name, one in model.named_parameters() if "proj" in name and one.ndim == 2]
    return sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)


def ours(method: str, budget: str) -> dict[str, Any]:
    how = {"pattern": budget} if ":" in budget else {"sparsity": float(budget)}
    found = load.open_model(args.model, device="cpu", dtype="float32")
    began = time.perf_counter()
    result = billhook.prune(
        found.model,
        tokenizer=found.tokenizer,
        method=method,
        calibration=args.calibration,
        samples=args.samples,
        look=False,
        **how,
    )
    seconds = time.perf_counter() - began
    return {"losses": scoring(result.model, result.tokenizer), "zeros": zeros(result.model), "seconds": seconds}


dense = cache.cached(args.results, "dense", {**common, "model": args.model}, lambda: scoring.of(args.model))
print(f"| zeros | method | by | {scoring.heads} | share of zeros | seconds |")
print(f"|---|---|---|{'---|' * len(dense)}---|---|")
for budget in args.budgets.split(","):
    for method in args.methods.split(","):
        for name, make in (("billhook", ours), ("llm-compressor", theirs)):
            key = {**common, "by": name, "method": method, "budget": budget}
            row = cache.cached(args.results, "rival", key, lambda make=make: make(method, budget))  # noqa: B023
            print(
                f"| {budget} | {method} | {name} | {cells(row['losses'], dense)} | {row['zeros']:.6f} | {row['seconds']:.0f} |",
                flush=True,
            )
            how = {key: getattr(args, key) for key in ("model", "calibration", "samples", "windows", "precision")}
            how |= {"zeros": budget, "method": method, "by": name}
            how |= {"share_of_zeros": row["zeros"], "seconds": row["seconds"]}
            results.write("llm_compressor", [{**how, **each} for each in measured(row["losses"], dense)])
