"""The command that says what each method is: methods."""

import json as json_module
import textwrap
from typing import Annotated, Any

import typer

from billhook import choices
from billhook.cli.commands import app
from billhook.cli.options import Json
from billhook.cli.settings import Setting, of_methods, shared, shown
from billhook.errors import one_of
from billhook.methods import METHODS
from billhook.planning.method import Method

WIDTH = 100
FACTS = ("title", "paper", "does", "needs", "costs", "loads", "example", "command", "budgets", "kinds", "default_kinds")


@app.command(name="methods")
def methods_command(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="one method, of which all is said", show_default=False)
    ] = "",
    json: Json = False,
) -> None:
    """List every method, or say all of one: what it does, its paper, settings, needs and clients.

    Example: billhook methods layerchop
    """
    named = {one_of("method", name, METHODS): METHODS[name]} if name else METHODS
    if json:
        typer.echo(json_module.dumps({key: facts(method) for key, method in named.items()}, indent=2))
    elif name:
        typer.echo(page(name))
    else:
        for key, method in METHODS.items():
            typer.echo(f"{typer.style(key.ljust(12), bold=True)} {prunes(method)}: {method.title} ({method.paper})")
        typer.echo("\nbillhook methods NAME: what it does, settings, needs, an example, and what loads the result")


def facts(method: Method) -> dict[str, Any]:
    """All of one method, as plain data."""
    said = {name: getattr(method, name) for name in FACTS}
    return said | {"settings": {setting.name: default(setting, method) for setting in settings(method)}}


def prunes(method: Method) -> str:
    """What goes."""
    return "zeros" if method.zeros else ", ".join(method.kinds)


def settings(method: Method) -> list[Setting]:
    """What may be chosen: its budgets and its place among the axes, then its own."""
    place = ("axes", "layout", "allocation", "floor") if method.allocates else ("axes", "layout")
    common = (*(method.budgets if method.zeros else ()), *(place if len(method.kinds) > 1 else ()))
    return [*(setting for setting in shared() if setting.name in common), *of_methods([method])]


def default(setting: Setting, method: Method) -> str:
    """Of one setting for one method, '' where there is none."""
    return ",".join(method.default_kinds) if setting.name == "axes" else shown(setting.field)


def meanings(setting: Setting, method: Method) -> dict[str, str]:
    """What each value of a setting means, where values have names that mean something."""
    if setting.name == "axes":
        return {kind: choices.AXES[kind] for kind in method.kinds}
    return dict(setting.names) if isinstance(setting.names, dict) else {}


def page(name: str) -> str:
    """All of one method."""
    method = METHODS[name]
    lines = [f"{name}: {method.title} ({method.paper})", "", *textwrap.wrap(method.does, WIDTH), ""]
    said = {"prunes": prunes(method), "needs": method.needs, "costs": method.costs, "loads in": method.loads}
    for what, text in {**said, "example": method.example}.items():
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"{what:9}", subsequent_indent=" " * 9)
    lines += ["", f"Settings, as options of billhook {method.command}:"]
    for setting in settings(method):
        flags, value = " / ".join(setting.flags), default(setting, method)
        lines.append(f"  {flags:32} {setting.field.description}{f'  [default: {value}]' if value else ''}")
    told: list[dict[str, str]] = []  # each table once
    for setting in settings(method):
        named = meanings(setting, method)
        if not named or named in told:
            continue
        told.append(named)
        lines += ["", f"{setting.flags[0]}:"]
        for value, meaning in named.items():
            indent = " " * 20
            lines += textwrap.wrap(meaning, WIDTH, initial_indent=f"  {value:17} ", subsequent_indent=indent)
    return "\n".join(lines)
