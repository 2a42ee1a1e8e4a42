"""Which cuts of which family stock vLLM serves: python benchmarks/vllm_families.py --python PYTHON --into
docs/vllm.json

PYTHON is an interpreter with vLLM, as for check_vllm.py.  A random model of every family, wide enough for vLLM's
kernels, is cut along every axis that docs/families.md says yes to, all of them on one model, written, loaded there
without billhook, and must continue two prompts by the same 32 greedy tokens, in float32; where it does not, each axis
has a model of its own.  Another has FFNs of two widths.  `make families` reads what came out: "" for the same tokens,
else what vLLM said.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny

from billhook.checkpoints import save
from billhook.checkpoints.clients import check
from billhook.errors import BillhookError
from billhook.models import layout, residual
from billhook.models.axes import Axis, axes, refusal
from billhook.models.experts import unfuse
from billhook.models.families import FAMILIES, layers, mixture, row_of
from billhook.models.surgery import drop_layers, remove

WIDER = {"hidden_size": 128, "head_dim": 32, "query_pre_attn_scalar": 32, "word_embed_proj_dim": 128}
FFN = {"intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "ffn_hidden_size": 512, "moe_intermediate_size": 64}
KINDS = ("ffn", "heads", "groups", "experts", "expert_ffn", "shared", "residual", "layers")


def dense(family: str) -> PreTrainedModel:
    config = tiny.CONFIGS[family]()
    for key, size in {**WIDER, **FFN}.items():
        if getattr(config, key, None) is not None:
            with suppress(AttributeError):  # a head size that the config works out
                setattr(config, key, size)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for param in model.parameters():
        if param.ndim > 1:
            param.data *= 4  # so that greedy tokens differ from one position to the next
    model.generation_config.pad_token_id = 0
    unfuse(model)
    return model


def half(axis: Axis) -> torch.Tensor:
    """Every other unit of each block."""
    each = axis.units // axis.blocks
    return torch.cat([torch.arange(0, each, 2) + block * each for block in range(axis.blocks)])


def narrowed(model: PreTrainedModel, kind: str) -> bool:
    """Cut along an axis, where a stock checkpoint can hold that; whether it could."""
    if kind == "layers":
        mixed = [n for n in range(len(layers(model))) if mixture(model, n) is not None]
        drop_layers(model, [2 if mixed == [1] else 1])  # a mixture without a mixture is none
        return True
    if kind == "residual":
        try:
            residual.cut(model, torch.arange(residual.residual(model).channels * 3 // 4))
        except BillhookError:
            return False
        return True
    found = [axis for axis in axes(model, (kind,)) if axis.units > axis.blocks]
    if not found or refusal(model, kind, "uniform"):
        return False
    for axis in found:
        remove(model, axis, half(axis))
    return True


def uneven(model: PreTrainedModel) -> bool:
    """Narrow the FFN of the second layer alone, where a per_layer checkpoint can hold that; whether it could."""
    if row_of(model).experts or refusal(model, "ffn", "per_layer"):
        return False
    for axis in axes(model, ("ffn",)):
        if axis.layer == 1:
            remove(model, axis, half(axis))
    return True


def served(model: PreTrainedModel, python: str) -> str:
    """Nothing, or what vLLM says."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            save.save(model, tiny.tokenizer(), Path(folder), None)
            check.check(Path(folder), "vllm", python)
        except BillhookError as error:
            return str(error).replace(folder, "it")
    return ""


def row(family: str, python: str) -> dict[str, str]:
    """What was served, by what was cut."""
    whole = dense(family)
    cut = [kind for kind in KINDS if narrowed(whole, kind)]
    layout.update_config(whole)
    found = {", ".join(cut): served(whole, python)}
    if any(found.values()):
        for kind in cut:
            model = dense(family)
            narrowed(model, kind)
            layout.update_config(model)
            found[kind] = served(model, python)
        found["nothing"] = served(dense(family), python)
    model = dense(family)
    if uneven(model):
        found["layers that differ"] = served(model, python)
    return found


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("families", nargs="*", default=list(FAMILIES))
parser.add_argument("--python", required=True)
parser.add_argument("--into", type=Path, required=True)
args = parser.parse_args()
logging.set_verbosity_error()
version = subprocess.run(
    [args.python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True, check=True
).stdout.split()[-1]
for family in args.families:
    found = {"version": version, "served": row(family, args.python)}
    seen = json.loads(args.into.read_text()) if args.into.exists() else {}
    args.into.write_text(json.dumps({**seen, family: found}, indent=1) + "\n")
    for cut, why in found["served"].items():
        print(f"{family}, {cut}: {why or 'the same tokens'}", flush=True)
