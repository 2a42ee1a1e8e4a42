"""Hooks of the site.

* `<!-- method: NAME -->` in a page becomes what the code says of that method, `<!-- settings: NAME -->` its settings,
  `<!-- fields: Recipe -->` the fields of a recipe.
* The rows of the benchmarks are files of the site, too: benchmarks/results/X.csv is results/X.csv there.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from billhook import choices
from billhook.cli.commands import command
from billhook.methods import METHODS, Method
from billhook.pruning.recipe import Recipe

ROWS = Path(__file__).parents[1] / "benchmarks" / "results"
WIDE = ("log/", "LOG.md", "families.md")  # pages of wide tables: no second column beside them
ZEROS = ("sparsity", "pattern", "targets", "layer_sparsity", "stream", "refit", "keep_zeros")
SEARCHED = ("trials", "minutes", "validation", "pool", "pool_len", "clusters", "space", "sampler", "objective", "study")
HEALED = ("select", "candidates", "heal_tokens", "held_out")
RESTORED = ("stream", "damping", "restoration", "correction")
SETTINGS = {  # of each method: the command that has them, and which they are
    "fasp": ("prune", ("axes", "layout", "allocation", "floor", "score", *RESTORED)),
    "layerchop": (
        "prune",
        ("preset", "drop", "keep", "layers", "patch", "damping", "correction", *HEALED),
    ),
    "slicegpt": ("prune", ("rotate", "damping", "restoration", "correction")),
    "experts": ("prune", ("experts", "stream")),
    "adapruner": ("search", ("axes", "layout", *SEARCHED, "restoration")),
    "magnitude": ("prune", ZEROS),
    "wanda": ("prune", ZEROS),
    "optishear": ("search", ("sparsity", "pattern", "targets", *SEARCHED)),
    "sparsegpt": ("prune", (*ZEROS, "damping")),
    "fistapruner": ("prune", (*ZEROS, "init", "normalised", "damping")),
    "admm": ("prune", (*ZEROS, "init", "damping")),
}
CHOICES = {  # of each setting that has named values: what they mean
    "axes": choices.AXES,
    "layout": choices.LAYOUTS,
    "allocation": choices.ALLOCATIONS,
    "score": {**choices.SCORES, **choices.GRADIENT_SCORES},
    "preset": choices.PRESETS,
    "patch": choices.PATCHES,
    "experts": choices.WAYS,
    "init": choices.STARTS,
    "space": {**choices.SPACES, **choices.GROUPS},
    "sampler": choices.SAMPLERS,
    "objective": choices.SEARCH_OBJECTIVES,
}
SHARED = "Budget, calibration text, output and machine are the same for every method: `billhook prune --help`."
MARK = re.compile(r"^<!-- (method|settings|fields): (\w+) -->$", re.M)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File  # the tests read this file without it

    for path in sorted(ROWS.glob("*.csv")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri.startswith(WIDE):
        page.meta["hide"] = ["toc"]
    markdown = markdown.replace("](../../benchmarks/results/", "](../results/")
    say = {"method": facts, "settings": settings, "fields": fields}
    return MARK.sub(lambda match: say[match[1]](match[2]), markdown)


def facts(name: str) -> str:
    """Title, paper, what a method says of itself, and what it needs."""
    method = METHODS[name]
    paper = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", method.paper)
    return f"*{method.title}* ({paper})\n\n{flags(method.note)}\n\n**Needs** {flags(method.needs)}."


def settings(name: str) -> str:
    """A method's settings as the command line has them."""
    where, names = SETTINGS[name]
    options = {option.name: option for option in command(where).params}
    own = {"stream": METHODS[name].stream, **METHODS[name].own}
    rows = [row(options[setting], own.get(setting)) for setting in names]
    table = ["", f"| `billhook {where}` | default | what it does |", "|---|---|---|", *rows, "", SHARED]
    axes = {kind: words for kind, words in choices.AXES.items() if kind in METHODS[name].kinds}
    named = CHOICES | {"axes": axes, "stream": streams(METHODS[name])}
    return "\n".join(
        table + [line for setting in names if setting in named for line in values(setting, named[setting])]
    )


def streams(method: Method) -> Mapping[str, str]:
    """The streams that a method has."""
    if method.kinds == ("experts",):
        return choices.EXPERT_STREAMS
    return choices.OPERATOR_STREAMS if method.linear else choices.AXIS_STREAMS


def values(setting: str, named: Mapping[str, str]) -> list[str]:
    """A table of a setting's values."""
    flag = "--" + setting.replace("_", "-")
    rows = [f"| `{name}` | {cell(words)} |" for name, words in named.items()]
    return ["", f"### `{flag}`", "", "| value | what it means |", "|---|---|", *rows]


def fields(_: str) -> str:
    """The fields of a recipe, with the help of the options that set them."""
    options = {option.name: option for where in ("search", "prune") for option in command(where).params}
    rows = [
        f"| `{name}` | {shown(field.default)} | {cell(options[name].help)} |"
        for name, field in Recipe.model_fields.items()
    ]
    return "\n".join(["| field | default | what it says |", "|---|---|---|", *rows])


def shown(value: Any) -> str:
    """A default as a page shows it; nothing where there is none."""
    names = {None: "", True: "yes", False: "no"}
    if value is None or isinstance(value, bool):
        return names[value]
    return (
        ", ".join(value) if isinstance(value, tuple) else f"{value:,}" if isinstance(value, int) else str(value or "")
    )


def row(option: Any, own: Any) -> str:
    """One setting: its flags, its default (the method's own before the command's), its help."""
    given = option.show_default if isinstance(option.show_default, str) else option.default
    default = shown(given if own is None else own)
    names = " ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    return f"| {names} | {default} | {cell(brief(option))} |"


def brief(option: Any) -> str:
    """A setting's help, without the values that a table of its own has."""
    starts = [option.help.find(f"{value}: ") for value in CHOICES.get(option.name, ())]
    words = option.help[: min((start for start in starts if start >= 0), default=None)]
    return words.strip() or "see below"


def cell(words: str) -> str:
    return flags(words).replace("|", "\\|")


def flags(words: str) -> str:
    """Flags in a text as code, or two hyphens would become a dash in some readers."""
    return re.sub(r"(?<![`\w-])(--[a-z][a-z-]*)", r"`\1`", words)
