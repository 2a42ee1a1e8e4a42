"""Hooks of the site.

* `<!-- method: NAME -->` in a page becomes what the code says of that method.
* The rows of the benchmarks are files of the site, too: benchmarks/results/X.csv is results/X.csv there.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from billhook.methods import METHODS

ROWS = Path(__file__).parents[1] / "benchmarks" / "results"
WIDE = ("log/", "LOG.md", "families.md")  # pages of wide tables: no second column beside them
MARK = re.compile(r"^<!-- method: (\w+) -->$", re.M)


def on_files(files: Files, config: Any) -> Files:
    for path in sorted(ROWS.glob("*.csv")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri.startswith(WIDE):
        page.meta["hide"] = ["toc"]
    markdown = markdown.replace("](../../benchmarks/results/", "](../results/")
    return MARK.sub(lambda match: facts(match[1]), markdown)


def facts(name: str) -> str:
    method = METHODS[name]
    paper = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", method.paper)
    return f"*{method.title}* ({paper})\n\n{method.note}\n\n**Needs** {method.needs}."
