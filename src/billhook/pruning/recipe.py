"""A recipe from what people write: flat settings, as on the command line; or parts, as in a file.  Loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError, SettingsError, one_of
from billhook.methods import METHODS
from billhook.planning.command import DEFAULT
from billhook.planning.method import Method, MethodSettings
from billhook.planning.recipe import FLAT, PARTS, Recipe
from billhook.runtime.validation import checked

OF_PARTS = {  # part and name in it, of every setting that all methods share
    next((flat for flat, inner in FLAT.items() if inner == name), name): (part, name)
    for part, fields in PARTS.items()
    for name in fields.model_fields
}


def recipe(method: str | Method | MethodSettings = DEFAULT["prune"], **settings: Any) -> Recipe:
    """A recipe from keyword settings: ratio=0.2, score="wanda", calibration="mixed", ….

    Args:
        method: its name, itself, or its settings.
        settings: fields of `Budget`, `Shape`, `Calibration`, `Compute`, and of the method's own settings; None is the
            default, and so is an empty text where a setting has names.

    Raises:
        BillhookError: an unknown setting, one of another method, or an impossible value, the first one found.
    """
    chosen, parts = method_of(method), {part: dict[str, Any]() for part in PARTS}
    own = method.model_dump(exclude_unset=True) if isinstance(method, MethodSettings) else {}
    for name, value in settings.items():
        if value is None or (value == "" and name not in OF_PARTS and name not in chosen.Settings.model_fields):
            continue
        if name in OF_PARTS:
            part, inner = OF_PARTS[name]
            parts[part][inner] = value
        else:
            own[own_setting(chosen, name)] = value
    return Recipe(
        chosen, checked(chosen.Settings, own), **{name: checked(part, parts[name]) for name, part in PARTS.items()}
    )


def method_of(method: str | Method | MethodSettings) -> Method:
    """The method that is meant by its name, itself, or its settings."""
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        return METHODS[one_of("method", method, METHODS)]
    found = [one for one in METHODS.values() if one.Settings is type(method)]
    if len(found) != 1:
        raise SettingsError(
            f"{type(method).__name__} belongs to no method: give the method itself, and its settings by name"
        )
    return found[0]


def own_setting(method: Method, name: str) -> str:
    """The name, if it is a setting of the method.  Raises BillhookError: says whose it is otherwise."""
    if name in method.Settings.model_fields:
        return name
    if owners := [other.name for other in METHODS.values() if name in other.Settings.model_fields]:
        raise SettingsError(f"--{name.replace('_', '-')} belongs to --method {' or '.join(owners)}")
    return one_of("setting", name, ("method", *OF_PARTS, *method.Settings.model_fields))


def changed(known: Recipe, **settings: Any) -> Recipe:
    """The same recipe but for some settings, which may be None."""
    kept = {name: value for name, value in known.flat().items() if name != "method"}
    return recipe(known.method, **{**kept, **settings})


@dataclass(frozen=True)
class RecipeFile:
    """What a YAML recipe says."""

    model: str
    recipe: Recipe
    expect: dict[str, Any]
    note: str = ""  # what is to be said of how it is written


def read_recipe(path: Path) -> RecipeFile:
    """Read a recipe, YAML or JSON: `model`, the settings by part, and optionally `expect`.

    Raises:
        BillhookError: not a readable mapping, or an unknown or impossible setting.
    """
    from billhook.runtime.yaml_files import read_yaml

    content = read_yaml(path, f"recipe {path}")
    if not isinstance(content, dict) or "model" not in content:
        raise SettingsError(f"recipe {path} is not a mapping with a 'model'")
    model, expect = content.pop("model"), content.pop("expect", {})
    if not isinstance(expect, dict):
        raise SettingsError(f"recipe {path}: expect {expect!r} is not a mapping of numbers and tolerance")
    try:
        settings, loose = flat({str(key): value for key, value in content.items()})
        note = f"{path}: {loose} stands outside of a part: write budget: {{ratio: 0.2}} and so on" if loose else ""
        return RecipeFile(str(model), recipe(**settings), expect, note)
    except BillhookError as error:
        raise SettingsError(f"recipe {path}: {error}") from None


def flat(content: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Settings by part, all together; and the first that stood outside of a part, as all did in former files."""
    nested = {name: content[name] for name in ("method", *PARTS) if isinstance(content.get(name), dict)}
    loose = next((name for name in content if name not in nested and name != "method"), "")
    settings = {name: value for name, value in content.items() if name not in nested}
    for part, inside in nested.items():
        for name, value in inside.items():
            if part == "method":
                settings["method" if name == "name" else str(name)] = value
            else:
                one_of(f"setting of {part}", str(name), PARTS[part].model_fields)
                settings[next(flat for flat, place in OF_PARTS.items() if place == (part, name))] = value
    return settings, loose
