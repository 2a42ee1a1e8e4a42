"""How help is printed: plain text at once, options under the headings that they name."""

import re
import shutil
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

OTHERS = "Options"  # heading of options that name none
WIDTH = 110  # columns at most
TOLD = re.compile(r"\[default: \(([^][]*)\)")  # a default that is said in words: typer puts it in brackets


class Help:
    """What commands and the group of them share: typer's own help loads rich, and takes a second for sixty options."""

    params: list[Any]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage, text, arguments, and a section for every heading."""
        formatter.width = min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns) - 2
        command: Any = self
        command.format_usage(ctx, formatter)
        command.format_help_text(ctx, formatter)
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in command.get_params(ctx):
            argument = getattr(param, "param_type_name", "") == "argument"
            heading = getattr(param, "rich_help_panel", None) or ("Arguments" if argument else OTHERS)
            if record := param.get_help_record(ctx):
                sections.setdefault(heading, []).append((record[0], TOLD.sub(r"[default: \1", record[1])))
        for heading in sorted(sections, key=lambda name: (name == OTHERS, name != "Arguments")):
            with formatter.section(typer.style(heading, bold=True)):
                formatter.write_dl(sections[heading], col_max=36)
        if isinstance(self, TyperGroup):
            self.format_commands(ctx, formatter)


class Command(Help, TyperCommand):
    """A command whose help comes at once."""


class Group(Help, TyperGroup):
    """A group of commands whose help comes at once."""
