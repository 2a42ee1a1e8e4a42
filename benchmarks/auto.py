"""What the default method is worth, ingredient by ingredient: python benchmarks/auto.py MODEL CALIBRATION TEXT...

Every row is one prune of a copy at --ratio; what it costs on the first --windows windows of 512 tokens of every TEXT
(`demo` stands for two), with the standard error of its factor, and its seconds.  `prose` as a text is scipy's
documentation as far as it is installed: technical prose that nothing here calibrates on.

With --python OTHER, the Python of an environment with `pip install optipfair==0.4.2`, the rows `optipfair, …` are made
there, at FASP's width and as many layers as the ratio says.
"""

import argparse
import copy
import dataclasses
import inspect
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import results
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import billhook
from billhook import data
from billhook.checkpoints import load
from billhook.data import Text
from billhook.evaluation.perplexity import paired, perplexity
from billhook.methods import rivals
from billhook.models import sizes
from billhook.models.families import layers
from billhook.planning.recipe import SAMPLES
from billhook.reports.formatting import number

ROWS: dict[str, dict[str, Any]] = {
    "fasp": {"method": "fasp"},
    "fasp, wanda, not restored": {"method": "fasp", "score": "wanda", "restoration": False},
    "layerchop": {"method": "layerchop"},
    "layerchop, patched": {"method": "layerchop", "patch": "linear"},
    "slicegpt": {"method": "slicegpt"},
    "adapruner": {"method": "adapruner"},
    "sensitivity": {"method": "fasp", "layout": "per_layer", "allocation": "sensitivity", "axes": ("ffn", "groups")},
    "auto": {"method": "auto"},
    "auto, quick": {"method": "auto", "effort": "quick"},
    "auto, thorough": {"method": "auto", "effort": "thorough"},
    "auto, not refined": {"method": "auto", "refine": False},
    "auto, per layer": {"method": "auto", "layout": "per_layer"},
    "auto, widths alone": {"method": "auto", "axes": ("ffn",)},
    "auto, layers alone": {"method": "auto", "axes": ("layers",)},
    "auto, layers and widths": {"method": "auto", "rival": "whole layers and equal widths"},
    "auto, 64 windows": {"method": "auto", "samples": 64},
    "auto, judged by its own text": {"method": "auto", "judge": "own"},
    "auto, mixed text": {"method": "auto", "calibration": "mixed"},
}
EVERY = rivals.RIVALS
THEIRS = {"optipfair, widths": "widths", "optipfair, widths by data": "widths-data", "optipfair, last layers": "layers"}
CLIENT = Path(__file__).with_name("optipfair_client.py")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("texts", nargs="+")
parser.add_argument("--ratio", type=float, default=0.2)
parser.add_argument(
    "--rows", default="fasp;layerchop, patched;auto", help=f"separated by ;: {'; '.join((*ROWS, *THEIRS))}"
)
parser.add_argument("--samples", type=int, help="windows to calibrate on; default: as many as each method takes")
parser.add_argument("--windows", type=int, default=24, help="score at most this many windows of each text")
parser.add_argument("--python", help="of an environment with optipfair")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()


def prose() -> Text:
    """Docstrings of scipy, without their examples."""
    import scipy.linalg
    import scipy.optimize
    import scipy.signal

    pages = [
        (inspect.getdoc(getattr(module, name)) or "").split("Examples\n---")[0]
        for module in (scipy.signal, scipy.optimize, scipy.linalg)
        for name in sorted(dir(module))
    ]
    return Text("prose", "\n\n".join(page for page in pages if len(page) > 800))


def judged(model: Any) -> list[Any]:
    return [perplexity(model, one) for one in windows]


def ours(row: str) -> tuple[Any, float, str, int]:
    """The cut model, its seconds, what was chosen, and the windows that it was fitted on."""
    given = {"calibration": args.calibration, "samples": args.samples, "seed": args.seed, "ratio": args.ratio}
    given |= ROWS[row]
    only = given.pop("rival", "")  # which no option asks for
    rivals.RIVALS = tuple(one for one in EVERY if only in ("", one.name))
    copied, started = copy.deepcopy(opened.model), time.perf_counter()
    found = billhook.prune(copied, tokenizer=opened.tokenizer, look=False, quiet=True, **given)
    took = time.perf_counter() - started
    chosen = (found.record.get("auto") or {}).get("chosen", "")
    return found.model.float(), took, chosen, found.record["calibration"]["windows"]


def theirs(way: str) -> tuple[Any, float, str, int]:
    """The same by OptiPFair, in its own environment."""
    if not args.python:
        raise SystemExit("optipfair: give --python, of an environment that has it")
    samples = args.samples or SAMPLES
    drawn = data.windows(data.calibration_text(args.calibration), opened.tokenizer, 512, samples, args.seed)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as scratch:
        model, tokens, out = (str(Path(scratch) / name) for name in ("model", "tokens.safetensors", "out"))
        opened.model.save_pretrained(model)
        save_file({"tokens": drawn.tokens.contiguous()}, tokens)
        command = [args.python, str(CLIENT), model, tokens, way, str(amount(way)), out]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ran.returncode:
            raise SystemExit(ran.stderr)
        said = json.loads(ran.stdout.strip().splitlines()[-1])
        pruned = AutoModelForCausalLM.from_pretrained(out, dtype=opened.model.dtype).eval()
    return pruned, said["seconds"], f"optipfair {said['versions']['optipfair']}", samples


def amount(way: str) -> int:
    """The FFN's new width as the ratio wants it, a multiple of 32; or how many layers go."""
    total, width = len(layers(opened.model)), opened.model.config.intermediate_size
    saved = args.ratio * sizes.decoder_parameters(opened.model)
    if way == "layers":
        return round(saved / sizes.layer_parameters(opened.model, total // 2))
    return width - round(saved / (3 * opened.model.config.hidden_size * total) / 32) * 32


opened = load.open_model(args.model, dtype="float32")
texts = [one for name in args.texts for one in ([prose()] if name == "prose" else data.evaluation_texts([name]))]
windows = []
for text in texts:
    whole = data.windows(text, opened.tokenizer, 512)
    every = max(1, len(whole.tokens) // args.windows)
    windows.append(dataclasses.replace(whole, tokens=whole.tokens[::every][: args.windows]))
dense = judged(opened.model)
how = {name: getattr(args, name) for name in ("model", "calibration", "windows", "ratio", "seed")}
print("| | parameters | " + " | ".join(one.text for one in dense) + " | seconds | |")
print("|---|---|" + "---|" * len(dense) + "---|---|")
print("| unpruned | | " + " | ".join(f"{one.perplexity:.2f}" for one in dense) + " | | |", flush=True)
for name in map(str.strip, args.rows.split(";")):
    model, took, what, fitted = theirs(THEIRS[name]) if name in THEIRS else ours(name)
    size = sizes.total_parameters(model)
    factors = [
        (one.perplexity, *paired(before.window_losses, one.window_losses))
        for before, one in zip(dense, judged(model), strict=True)
    ]
    cells = " | ".join(f"{p:.2f} (×{factor:.3f} ± {number(error, '{:.3f}')})" for p, factor, error in factors)
    print(f"| {name} | {size:,} | {cells} | {took:.0f} | {what} |", flush=True)
    rows = [
        {"text": one.text, "perplexity": p, "factor": factor, "standard_error": error}
        for one, (p, factor, error) in zip(dense, factors, strict=True)
    ]
    own = {key: value for key, value in ROWS.get(name, {}).items() if key in how}
    results.write(
        "auto",
        [
            {**how, **own, "samples": fitted, "row": name, "parameters": size, "chosen": what, "seconds": took, **row}
            for row in rows
        ],
    )
