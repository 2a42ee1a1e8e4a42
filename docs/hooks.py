"""Hooks of the site.

* `<!-- method: NAME -->` in a page becomes what the code says of that method, `<!-- settings: NAME -->` its settings,
  `<!-- fields: Recipe -->` the fields of a recipe.
* The rows of the benchmarks are files of the site, too: benchmarks/results/X.csv is results/X.csv there.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from billhook.cli.commands import command
from billhook.cli.methods import default, options, tables
from billhook.methods import METHODS
from billhook.pruning.recipe import Recipe

ROWS = Path(__file__).parents[1] / "benchmarks" / "results"
WIDE = ("log/", "LOG.md", "families.md")  # pages of wide tables: no second column beside them
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
    """Title, paper, what a method does, what it needs and costs, what loads the result, an example."""
    method = METHODS[name]
    paper = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", method.paper)
    says = {"Needs": method.needs, "Costs": method.costs, "Loads in": method.loads}
    told = "\n".join(f"* **{what}** {flags(words)}." for what, words in says.items())
    return f"*{method.title}* ({paper})\n\n{flags(method.does)}\n\n{told}\n\n```\n{method.example}\n```"


def settings(name: str) -> str:
    """A method's settings as the command line has them."""
    rows = [row(option, default(name, option)) for option in options(name)]
    head = f"| `billhook {METHODS[name].command}` | default | what it does |"
    table = ["", head, "|---|---|---|", *rows, "", SHARED]
    return "\n".join(table + [line for setting, named in tables(name).items() for line in values(setting, named)])


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


def row(option: Any, value: str) -> str:
    """One setting: its flags, its default, its help."""
    names = " ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    return f"| {names} | {value} | {cell(option.help)} |"


def cell(words: str) -> str:
    return flags(words).replace("|", "\\|")


def flags(words: str) -> str:
    """Flags in a text as code, or two hyphens would become a dash in some readers."""
    return re.sub(r"(?<![`\w-])(--[a-z][a-z-]*)", r"`\1`", words)
