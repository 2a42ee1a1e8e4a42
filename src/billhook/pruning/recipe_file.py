"""A recipe on disk: the model, the settings, and the numbers it is expected to give."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError
from billhook.pruning.recipe import Recipe, recipe
from billhook.runtime.yaml_files import read_yaml


@dataclass(frozen=True)
class RecipeFile:
    """What a YAML recipe says."""

    model: str
    recipe: Recipe
    expect: dict[str, Any]


def read_recipe(path: Path) -> RecipeFile:
    """Read a YAML recipe: `model`, the settings, and optionally `expect`.

    Raises:
        BillhookError: not a readable YAML mapping, or an unknown or impossible setting.
    """
    content = read_yaml(path, f"recipe {path}")
    if not isinstance(content, dict) or "model" not in content:
        raise BillhookError(f"recipe {path} is not a mapping with a 'model'")
    model, expect = content.pop("model"), content.pop("expect", {})
    if not isinstance(expect, dict):
        raise BillhookError(f"recipe {path}: expect {expect!r} is not a mapping of numbers and tolerance")
    try:
        return RecipeFile(str(model), recipe(**{str(key): value for key, value in content.items()}), expect)
    except BillhookError as error:
        raise BillhookError(f"recipe {path}: {error}") from None
