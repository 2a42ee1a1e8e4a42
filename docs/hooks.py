"""Hooks of the site.

* `<!-- method: NAME -->` in a page becomes what the code says of that method, `<!-- settings: NAME -->` its settings,
  `<!-- fields: Recipe -->` the fields of a recipe.
* The rows of the benchmarks are files of the site, too: benchmarks/results/X.csv is results/X.csv there.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from billhook.cli.methods import default, meanings
from billhook.cli.methods import settings as settings_of
from billhook.cli.settings import Setting, shared, shown
from billhook.methods import METHODS

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
    method = METHODS[name]
    rows = [row(setting, default(setting, method)) for setting in settings_of(method)]
    table = ["", f"| `billhook {method.command}` | default | what it does |", "|---|---|---|", *rows, "", SHARED]
    told: list[Mapping[str, str]] = []  # each table once
    for setting in settings_of(method):
        if (named := meanings(setting, method)) and named not in told:
            told.append(named)
            table += values(setting.flags[0], named)
    return "\n".join(table)


def values(flag: str, named: Mapping[str, str]) -> list[str]:
    """A table of a setting's values."""
    rows = [f"| `{name}` | {cell(words)} |" for name, words in named.items()]
    return ["", f"### `{flag}`", "", "| value | what it means |", "|---|---|", *rows]


def fields(_: str) -> str:
    """The settings of every recipe; those of a method are on its page."""
    rows = [f"| `{one.name}` | {shown(one.field)} | {cell(str(one.field.description))} |" for one in shared()]
    return "\n".join(["| setting | default | what it says |", "|---|---|---|", *rows])


def row(setting: Setting, value: str) -> str:
    """One setting: its flags, its default, its help."""
    names = " ".join(f"`{flag}`" for flag in setting.flags)
    return f"| {names} | {value} | {cell(str(setting.field.description))} |"


def cell(words: str) -> str:
    return flags(words).replace("|", "\\|")


def flags(words: str) -> str:
    """Flags in a text as code, or two hyphens would become a dash in some readers."""
    return re.sub(r"(?<![`\w-])(--[a-z][a-z-]*)", r"`\1`", words)
