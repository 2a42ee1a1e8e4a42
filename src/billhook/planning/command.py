"""The command line that makes a result again, from its recipe.  Loads no torch."""

import shlex
from typing import Any

from billhook.planning.recipe import Recipe
from billhook.runtime.options import extra


def command(recipe: Recipe, parent: str, out: str = "OUT") -> str:
    """The command: all that differs from its default."""
    program = recipe.method.command if recipe.method.searches(recipe) else "prune"
    words = ["billhook", program, parent]
    words += [] if recipe.method.name == DEFAULT[program] else ["--method", recipe.method.name]
    for part in recipe.parts().values():
        for name in part.model_dump(exclude_defaults=True):
            flag = extra(type(part).model_fields[name], "flag") or name.replace("_", "-")
            words += option_words(f"--{flag}", getattr(part, name), bool(extra(type(part).model_fields[name], "names")))
    return shlex.join([*words, "-o", out])


DEFAULT = {"prune": "auto", "search": "adapruner"}  # methods that need not be named


def option_words(flag: str, value: Any, together: bool) -> list[str]:
    """An option with its value; several values stand `together`, with commas, or one option has each."""
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, dict):
        return [flag, ",".join(f"{key}:{each}" for key, each in value.items())]
    if isinstance(value, tuple) and not together:
        return [word for each in value for word in (flag, str(each))]
    return [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
