"""The command that says what each method is: methods."""

import json as json_module
import textwrap
from dataclasses import asdict
from typing import Annotated, Any

import typer

from billhook import choices
from billhook.cli.commands import app, command
from billhook.cli.options import Json
from billhook.cuts.settings import SOLVER_DAMPING, Chopping, Narrowing, Slicing
from billhook.errors import one_of
from billhook.methods import METHODS, Method

WIDTH = 100
DAMPING = {"layerchop": Chopping.damping, "slicegpt": Slicing.damping}
TABLES = {  # settings with names: what each name means
    "axes": choices.AXES,
    "layout": choices.LAYOUTS,
    "allocation": choices.ALLOCATIONS,
    "score": {**choices.SCORES, **choices.GRADIENT_SCORES},
    "preset": choices.PRESETS,
    "patch": choices.PATCHES,
    "select": choices.SELECT,
    "experts": choices.WAYS,
    "init": choices.STARTS,
    "space": {**choices.SPACES, **choices.GROUPS},
    "sampler": choices.SAMPLERS,
    "objective": choices.SEARCH_OBJECTIVES,
}


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
        typer.echo(json_module.dumps({key: asdict(method) for key, method in named.items()}, indent=2))
    elif name:
        typer.echo(page(name))
    else:
        for key, method in METHODS.items():
            typer.echo(f"{typer.style(key.ljust(12), bold=True)} {prunes(method)}: {method.title} ({method.paper})")
        typer.echo("\nbillhook methods NAME: what it does, settings, needs, an example, and what loads the result")


def prunes(method: Method) -> str:
    """What goes."""
    return "zeros" if method.zeros else ", ".join(method.kinds)


def tables(name: str) -> dict[str, dict[str, str]]:
    """Of settings of a method whose values have names: each name and what it means."""
    method = METHODS[name]
    streams = choices.OPERATOR_STREAMS if method.zeros else choices.AXIS_STREAMS
    if name == "experts":
        streams = choices.EXPERT_STREAMS
    known = {**TABLES, "stream": streams, "axes": {kind: choices.AXES[kind] for kind in method.kinds}}
    return {setting: known[setting] for setting in method.settings if setting in known}


def options(name: str) -> list[Any]:
    """The options of the command line that set what this method reads, in the order of its settings."""
    method = METHODS[name]
    known = {option.name: option for option in command(method.command).params}
    return [known[setting] for setting in method.settings]


def default(name: str, option: Any) -> str:
    """Of one option for one method: its own before the command's, '' where there is none."""
    method = METHODS[name]
    damping = SOLVER_DAMPING if method.zeros else DAMPING.get(name, Narrowing.damping)
    axes = ",".join(method.default_kinds)
    own = {"stream": method.stream, "axes": axes, "damping": f"{damping:g}", **method.own}
    value = own.get(option.name, option.show_default if isinstance(option.show_default, str) else option.default)
    return {None: "", True: "yes", False: "no"}.get(value, str(value)) if not isinstance(value, list) else ""


def page(name: str) -> str:
    """All of one method."""
    method = METHODS[name]
    lines = [f"{name}: {method.title} ({method.paper})", "", *textwrap.wrap(method.does, WIDTH), ""]
    facts = {"prunes": prunes(method), "needs": method.needs, "costs": method.costs, "loads in": method.loads}
    for what, text in {**facts, "example": method.example}.items():
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"{what:9}", subsequent_indent=" " * 9)
    lines += ["", f"Settings, as options of billhook {method.command}:"]
    for option in options(name):
        flags, value = " / ".join((*option.opts, *option.secondary_opts)), default(name, option)
        lines.append(f"  {flags:32} {option.help}{f'  [default: {value}]' if value else ''}")
    for setting, meanings in tables(name).items():
        lines += ["", f"--{setting.replace('_', '-')}:"]
        for value, meaning in meanings.items():
            indent = " " * 20
            lines += textwrap.wrap(meaning, WIDTH, initial_indent=f"  {value:17} ", subsequent_indent=indent)
    return "\n".join(lines)
