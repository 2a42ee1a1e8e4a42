"""generation_config.json: a checkpoint's settings of `generate`, which are carried along and never used here."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

NAME = "generation_config.json"


def read(folder: Path) -> GenerationConfig:
    """The settings of a folder, from its file; where transformers cannot read that, from config.json; or else none."""
    with warnings.catch_warnings(action="ignore"):  # for deprecated settings
        for make in (GenerationConfig.from_pretrained, _of_config):
            try:
                return make(folder)
            except Exception:  # OSError, ValueError, TypeError, RecursionError and others, depending on the file
                continue
    return GenerationConfig()


def write(model: Any, to: Path, source: Path | None) -> None:
    """Copy the file of `source` into `to` as it is; write the model's settings where they differ from it."""
    file = source / NAME if source else None
    if file and file.is_file() and read(file.parent) == model.generation_config:
        shutil.copyfile(file, to / NAME)
    else:  # not by save_pretrained, which refuses settings that it warns of
        model.generation_config.to_json_file(to / NAME, keys_to_pop=["compile_config"])


def _of_config(folder: Path) -> GenerationConfig:
    return GenerationConfig.from_model_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
