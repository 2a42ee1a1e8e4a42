"""The command that searches for calibration samples and metric before it prunes: search."""

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from billhook.cli.commands import app
from billhook.cli.options import (
    CALIBRATION,
    MACHINE,
    METHOD,
    Fresh,
    Jobs,
    Json,
    Model,
    Output,
    Overwrite,
    Ray,
    check_free_of,
    option,
    unfinished,
)
from billhook.cli.settings import with_settings
from billhook.errors import one_of
from billhook.methods import METHODS
from billhook.pruning.recipe import recipe

SEARCHED = tuple(name for name, method in METHODS.items() if method.command == "search")


@app.command(name="search")
@with_settings(SEARCHED)
def search_command(
    model: Model,
    output: Output,
    settings: dict[str, Any],
    method: Annotated[
        str, option(METHOD, "adapruner: a structured cut, to --ratio or --params; optishear: zeros", names=SEARCHED)
    ] = "adapruner",
    calibration: Annotated[
        list[str] | None,
        option(CALIBRATION, "text to choose samples from; may be repeated: two kinds are better", show_default="mixed"),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    jobs: Jobs = 1,
    ray: Ray = "",
    study: Annotated[
        Path | None,
        option(MACHINE, "folder that keeps every trial", show_default="beside OUT, deleted at the end"),
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Search which calibration samples and which importance metric prune MODEL best (AdaPruner), then prune; write OUT.

    With --method optishear, which metric of zeros.

    One backward pass, then a trial costs a forward pass of a few windows.  What comes out is never worse than the best
    fixed metric, as far as text that no trial saw can tell.  A search that was cut off goes on with the same command.

    Examples:

    billhook search demo --ratio 0.2 --calibration wiki.txt --calibration news.txt -o smaller

    billhook search demo --method optishear --sparsity 0.5 --calibration wiki.txt -o sparse
    """
    started = time.perf_counter()
    chosen = recipe(one_of("method", method, SEARCHED), calibration="+".join(calibration or ()) or None, **settings)
    output = check_free_of(model, output, overwrite)
    from billhook.cli.console import loading, out

    with loading():
        from billhook.cli.work import prune_to
        from billhook.reports import records, terminal
        from billhook.reports.search_tables import outcome_words
    folder = Path(os.path.expanduser(study)) if study else unfinished(output)
    record = prune_to(model, chosen, output, overwrite, work=folder, fresh=fresh, jobs=jobs, ray=ray).record
    if json:
        typer.echo(records.to_json(record), nl=False)
        return
    out.print(terminal.summary_table(record, f"{model}, pruned by {method}"))
    out.print(outcome_words(record["search"]), soft_wrap=True)
    out.print(f"{time.perf_counter() - started:.0f} s; written and reload-verified: {output}", soft_wrap=True)
