"""The pieces of a report page: text that is escaped on its way in, tables, figures, sections.

Names and texts come from strangers: every function escapes what it is given, except parts that are markup already.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

TIGHT = re.compile(r"(?<=\d) (?=(?:[kMBT]|Mi?B|ms|s)\b|%)|(?<=[±→]) |(?<=batch|ntext|an of|ws of) (?=\d)")


def say(text: Any) -> str:
    return escape(str(text))


def name(text: Any) -> str:
    """A name that may break where programmers put no space."""
    return re.sub("([_:=/,])", r"\1<wbr>", say(text))


def tight(text: str) -> str:
    """Signs and units that stay with their number when a line breaks."""
    return say(TIGHT.sub("\u00a0", text))


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{say(title)}</h2>\n{''.join(parts)}</section>\n" if any(parts) else ""


def part(title: str, *parts: str) -> str:
    """A part of a section under a heading of its own."""
    return f"<h3>{say(title)}</h3>\n{''.join(parts)}" if any(parts) else ""


def note(text: str) -> str:
    return f'<p class="soft">{say(text)}</p>\n' if text else ""


def details(summary: str, *parts: str) -> str:
    return f"<details><summary>{say(summary)}</summary>\n{''.join(parts)}</details>\n" if any(parts) else ""


def figure(title: str, words: str, drawing: str) -> str:
    caption = f"<figcaption><b>{say(title)}</b>{tight(words)}</figcaption>"
    return f"<figure>{caption}{drawing}</figure>\n" if drawing else ""


def cell(text: str) -> str:
    """A cell; what stands in brackets goes small below the number."""
    number, bracket, more = text.partition(" (")
    below = f" <small>({tight(more)}</small>" if bracket else ""
    return f"<td>{tight(number)}{below}</td>"


def head(cells: Iterable[str]) -> str:
    names = "".join(f'<th scope="col">{say(text)}</th>' if text else "<td></td>" for text in cells)
    return f"<thead><tr>{names}</tr></thead>\n"


def row(first: str, cells: Iterable[str], best: bool = False) -> str:
    marked = ' class="best"' if best else ""
    return f"<tr{marked}>{first}{''.join(cells)}</tr>\n"


def table(caption: str, header: str, bodies: str, kind: str = "") -> str:
    """A table in a box of its own that scrolls where the page is narrow; the keyboard reaches it too."""
    label, marked = f' aria-label="{say(caption)}"', f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll" role="region" tabindex="0"{label}><table{marked}>\n'
        f"<caption><span>{say(caption)}</span></caption>\n{header}{bodies}</table></div>\n"
    )


def pairs(caption: str, rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(row(f'<th scope="row">{say(a)}</th>', [f"<td>{say(b)}</td>"]) for a, b in rows)
    return table(caption, "", f"<tbody>{body}</tbody>\n", "pairs") if rows else ""
