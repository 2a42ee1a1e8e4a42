"""Which road leads to so few bytes: python benchmarks/roads.py DENSE ROAD... --calibration FILE --texts TEXT...

A road is FOLDER@TYPE: the model in FOLDER (DENSE, or what pruning and recovering made of it) quantised to a type of
`billhook quantize --bits`, or to a budget of its --memory (75MB).  A row each: the bytes of its GGUF, and on the first
--windows windows of 512 tokens of every TEXT its KL from DENSE and the factor of its perplexity, ± one standard error
over windows.  With --llama-python, the Python of an environment with llama-cpp-python, also tokens a second of a
prefill of 512 tokens and of decoding: on an idle machine.  Rows that are there already are printed from the table of
results, unless --again.

DENSE should lie on no grid of few bits: `carry_over.py demo shuffled DENSE`, and the same for every FOLDER.
"""

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import results
import torch

from billhook import data
from billhook.checkpoints import load
from billhook.checkpoints.clients import llamacpp
from billhook.choices import GRID_TYPES
from billhook.evaluation.perplexity import perplexities
from billhook.planning.few_bits import Wanted
from billhook.pruning.quantize import FILE, quantize
from billhook.runtime.run import Run
from billhook.runtime.units import BYTES, amount

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("dense")
parser.add_argument("roads", nargs="+")
parser.add_argument("--calibration", required=True)
parser.add_argument("--texts", nargs="+", required=True)
parser.add_argument("--samples", type=int, default=32)
parser.add_argument("--windows", type=int, default=16)
parser.add_argument("--llama-python")
parser.add_argument("--again", action="store_true", help="rows that are there already, too")
args = parser.parse_args()

dense = load.open_model(args.dense, device="cpu", dtype="float32")
windows = []
for text in data.evaluation_texts(args.texts):
    whole = data.windows(text, dense.tokenizer, 512)
    windows.append(replace(whole, tokens=whole.tokens[: args.windows], bytes=whole.bytes[: args.windows]))
how = {name: getattr(args, name) for name in ("dense", "calibration", "samples", "windows")}
SPEED = ("prefill", "decode")


def known(road: str) -> list[dict[str, str]]:
    """What was measured of a road by the same settings, a text each; nothing where a text is missing."""
    same = {name: results.said(value) for name, value in {**how, "road": road}.items()}
    found = {one["text"]: one for one in results.read("roads") if same.items() <= one.items()}
    return [found[one.source] for one in windows] if all(one.source in found for one in windows) else []


def speeds(file: Path) -> dict[str, float]:
    """Tokens a second in llama.cpp, where there is one."""
    if not args.llama_python:
        return {}
    prompt = torch.randint(len(dense.tokenizer), (512,), generator=torch.Generator().manual_seed(0)).tolist()
    request = {"speed": {"prompt": prompt, "new_tokens": 64, "repeats": 3}}
    return dict(zip(SPEED, map(llamacpp.run(args.llama_python, file, request)["speed"].get, SPEED), strict=True))


def measured(road: str) -> list[dict[str, str]]:
    """The same, measured now and kept."""
    folder, _, kind = road.rpartition("@")
    budget = {"bits": kind} if kind in GRID_TYPES else {"memory": amount(kind, BYTES, "memory")}
    given: dict[str, Any] = {"calibration": args.calibration, "samples": args.samples, **budget}
    found = quantize(folder, Wanted(**given), Run())
    with tempfile.TemporaryDirectory() as scratch:
        found.write(Path(scratch))
        told: dict[str, Any] = {"bytes": (Path(scratch) / FILE).stat().st_size, **speeds(Path(scratch) / FILE)}
    rows = []
    for one in windows:
        _, quality = perplexities([dense.model, found.model], one, reference=True)
        assert quality.against is not None
        judged = {key: value for key, value in asdict(quality.against).items() if key != "agreement"}
        rows.append({**how, "road": road, "text": one.source, **told, **judged})
    results.write("roads", rows)
    return known(road)


print(f"| road | MB | {' | '.join(f'{one.source}: KL | factor' for one in windows)} | prefill | decode |")
print("|---|---|" + "---|---|" * len(windows) + "---|---|", flush=True)
for road in args.roads:
    rows = (not args.again and known(road)) or measured(road)
    judged = [{name: float(value) for name, value in one.items() if name.startswith(("kl", "factor"))} for one in rows]
    cells = " | ".join(
        f"{one['kl']:.4f} ± {one['kl_standard_error']:.4f} | {one['factor']:.3f} ± {one['factor_standard_error']:.3f}"
        for one in judged
    )
    fast = " | ".join(f"{float(rows[0][name]):.0f}" if rows[0].get(name) else "" for name in SPEED)
    print(f"| {road} | {float(rows[0]['bytes']) / 1e6:.1f} | {cells} | {fast} |", flush=True)
