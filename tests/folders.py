"""Tiny models in folders, pruned ones beside them, and what the command says when it refuses."""

from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import billhook
from billhook.cli import app
from billhook.errors import BillhookError

FASP = {"ratio": 0.2, "multiple_of": 2}


def written(family: str, to: Path, shards: str = "5GB") -> Path:
    tiny.model(family).save_pretrained(to, max_shard_size=shards)
    tiny.tokenizer().save_pretrained(to)
    return to


def pruned(model: Path, text: Path, out: Path, **settings: Any) -> Path:
    return billhook.prune(model, calibration=str(text), samples=10, seq_len=32, **{"method": "fasp", **settings}).save(
        out, overwrite=True
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: one for file in folder.glob("*.safetensors") for key, one in load_file(file).items()}


def same(a: Path, b: Path) -> bool:
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) and x[key].dtype == y[key].dtype for key in x)


class CutOffError(Exception):
    """Stands for the end of the process."""


def run(*arguments: object) -> str:
    """What the command says when it refuses."""
    found = CliRunner().invoke(app, [str(one) for one in arguments])
    if found.exception is None:
        return ""
    assert isinstance(found.exception, BillhookError | CutOffError), found.exception
    assert "\n" not in str(found.exception)
    return str(found.exception) or "cut off"
