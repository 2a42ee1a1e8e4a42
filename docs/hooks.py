"""Hooks of the site: `<!-- method: NAME -->` in a page becomes what the code says of that method."""

import re
from typing import Any

from billhook.methods import METHODS

WIDE = ("log/", "LOG.md", "families.md")  # pages of wide tables: no second column beside them
MARK = re.compile(r"^<!-- method: (\w+) -->$", re.M)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri.startswith(WIDE):
        page.meta["hide"] = ["toc"]
    return MARK.sub(lambda match: facts(match[1]), markdown)


def facts(name: str) -> str:
    method = METHODS[name]
    paper = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", method.paper)
    return f"*{method.title}* ({paper})\n\n{method.note}\n\n**Needs** {method.needs}."
