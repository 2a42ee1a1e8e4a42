"""generation_config.json: what a checkpoint asks of `generate`.  It is carried along, and decides nothing that billhook does."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

NAME = "generation_config.json"


def read(folder: Path) -> GenerationConfig:
    """The settings of a folder: of its file, or where transformers cannot read that, of config.json; or none."""
    with warnings.catch_warnings(action="ignore"):  # of settings on their way out
        for make in (GenerationConfig.from_pretrained, _of_config):
            try:
                return make(folder)
            except Exception:  # OSError, ValueError, TypeError, RecursionError… by what is wrong in the file
                continue
    return GenerationConfig()


def write(model: Any, to: Path, source: Path | None) -> None:
    """Put the file of `source` into `to` as it is, or what the model has where that is something else."""
    there = source / NAME if source else None
    if there and there.is_file() and read(there.parent) == model.generation_config:
        shutil.copyfile(there, to / NAME)
    else:  # save_pretrained refuses what it reads with a warning
        model.generation_config.to_json_file(to / NAME, keys_to_pop=["compile_config"])


def _of_config(folder: Path) -> GenerationConfig:
    return GenerationConfig.from_model_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
