"""The record of a result, as plain data: what report.json and billhook.json hold."""

import json
import math
import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from billhook.reports import history


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {"python": platform.python_version()} | {
        name: _version(name) for name in ("billhook", "torch", "transformers")
    }


_version = cache(version)  # it reads files of the installation


def conditions(model: Any, command: str, seconds: float | int) -> dict[str, Any]:
    """Where and how the numbers of a model, with or without adapters, were measured."""
    return {
        "command": command,
        "versions": versions(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(seconds, 1),
    }


def assemble(kind: str, title: str, conditions: dict[str, Any], **content: Any) -> dict[str, Any]:
    """What report.json holds and `page.render` shows; `kind` is prune, evaluate, compare, sweep, recover or
    quantize.

    Args:
        content: `cut`, what a pruned checkpoint's billhook.json holds; `models`, of `evaluate.side_by_side`, with
            `reference`, the name of the one that the others are compared with; `points` of a leaderboard or a sweep,
            with its `knee`; `healing`, the last record of `recovery` in a trained checkpoint's billhook.json;
            `quantized`, what billhook.json says under that name.
    """
    empty = {"cut": None, "models": [], "reference": None, "points": [], "knee": None, "healing": None}
    return {"title": title, "kind": kind, **empty, **content, "conditions": conditions}


def stored_cut(folder: Path | None) -> dict[str, Any] | None:
    """What billhook.json in a checkpoint says was cut; None where there is none, or nothing was.

    Raises:
        BillhookError: it cannot be read, or a key is missing or of another type; names it.
    """
    return history.read(folder) if folder else None


def to_json(report: dict[str, Any]) -> str:
    """The report as JSON: what billhook.json holds and --json prints."""
    return json.dumps(_jsonable(report), indent=2, allow_nan=False, default=str) + "\n"


def _jsonable(value: Any) -> Any:
    """The same value with null for what JSON has no number for: a broken model's perplexity may be infinite."""
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
