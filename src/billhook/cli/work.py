"""What commands share once they work:
this module brings torch, and is imported after everything that can be refused was."""

from functools import partial
from pathlib import Path
from typing import Any

import typer

from billhook.checkpoints.clients import check
from billhook.checkpoints.result import Result
from billhook.cli.console import err, going_on, out, progress, say
from billhook.cli.options import unfinished
from billhook.errors import SettingsError
from billhook.planning.recipe import Recipe
from billhook.pruning.heal import prune_and_recover
from billhook.pruning.prune import prune
from billhook.recovery.setup import on_cpu
from billhook.reports import tables, terminal
from billhook.runtime import atomic, run_folder
from billhook.runtime.peers import launched

WARN_AS_BYTES = 0.05  # share of the calibration text's characters
# share of its tokens: at 1, 3 and 9 % SmolLM2 read other text 2, 8 and 20 % worse per byte (docs/LOG.md)
WARN_GROWTH = 0.02


def prune_to(
    model: str, chosen: Recipe, output: Path, overwrite: bool, *, recover_minutes: float = 0.0, **means: Any
) -> Result:
    """Prune, and train if asked to, into a folder that is reserved before the work starts:
    an unwritable place costs no time."""
    check.check_startable()
    beside = unfinished(output)
    kept = means.pop("work", beside)
    means["peers"] = peers = launched(partial(on_cpu, chosen.compute.device))
    if recover_minutes and peers.count > 1:
        raise SettingsError(f"{peers.count} processes: leave out --recover-minutes, and give OUT to billhook recover")
    if not peers.first:
        prune(model, chosen, work=kept, **means)
        raise typer.Exit
    with atomic.folder(output, overwrite) as work, going_on(kept), progress() as tick:
        means |= {"tick": tick, "announce": say}
        if recover_minutes:
            result = prune_and_recover(model, chosen, recover_minutes, kept, **means)
        else:
            result = prune(model, chosen, work=kept, **means)
        result.write(work, tick)
    if kept == beside:
        run_folder.remove(kept)
    if cut := result.record["vocabulary"]:
        _warn_of_vocabulary(cut)
    return result


def print_measures(measured: list[dict[str, Any]]) -> None:
    """The table of `evaluate`, and what each model writes."""
    names = " and ".join(model["name"] for model in measured)
    out.print(terminal.table(names, tables.comparison_header(measured), tables.comparison_rows(measured)))
    if measured[0].get("prompts"):
        out.print(terminal.text_table(measured))


def _warn_of_vocabulary(cut: dict[str, Any]) -> None:
    if cut["calibration_as_bytes"] > WARN_AS_BYTES:
        share = f"{cut['calibration_as_bytes']:.0%} of the calibration text becomes single bytes"
        err.print(f"billhook: warning: {share}: --vocab-from is of another script", soft_wrap=True)
    elif cut["calibration_grows"] > WARN_GROWTH:
        share = f"the calibration text becomes {cut['calibration_grows']:.0%} more tokens, which the model reads worse"
        err.print(f"billhook: warning: {share}: give --vocab-from more text, or raise --vocab-size", soft_wrap=True)
