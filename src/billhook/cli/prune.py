"""The command prune."""

from pathlib import Path
from typing import Annotated, Any

import typer

from billhook.cli.commands import app
from billhook.cli.options import (
    CALIBRATION,
    MACHINE,
    METHOD,
    OUTPUT,
    TRAINING,
    Fresh,
    Jobs,
    Json,
    Model,
    Output,
    Overwrite,
    Ray,
    Stream,
    check_free_of,
    option,
    started_together,
)
from billhook.cli.settings import with_settings
from billhook.errors import BillhookError
from billhook.methods import METHODS
from billhook.planning.command import DEFAULT
from billhook.planning.recipe import Recipe
from billhook.pruning.recipe import recipe
from billhook.runtime.units import BYTES, amount


@app.command(name="prune")
@with_settings(searching=False)
def prune_command(
    model: Model,
    output: Output,
    settings: dict[str, Any],
    method: Annotated[
        str, option(METHOD, "one of 'billhook methods'; 'billhook methods NAME' says all of it", names=METHODS)
    ] = DEFAULT["prune"],
    recover_minutes: Annotated[
        float,
        option(TRAINING, "then train it for so long against the unpruned model", min=0, show_default="no training"),
    ] = 0.0,
    statistics: Annotated[
        Path | None, option(CALIBRATION, "folder that keeps what was measured, for other ratios", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    dry_run: Annotated[bool, option(OUTPUT, "say what it would come to and cost; prune nothing", "--dry-run")] = False,
    jobs: Jobs = 1,
    ray: Ray = "",
    stream_weights: Stream = None,
    hidden_budget: Annotated[
        str | None, option(MACHINE, "bytes of hidden states to keep in memory, like 2GB", show_default="all")
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Prune MODEL, and train it if asked to; write OUT, reload it and compare.

    `accelerate launch -m billhook prune …` has many processes share the text.

    Examples:

    billhook prune demo --ratio 0.2 -o smaller

    billhook prune demo --ratio 0.2 --recover-minutes 10 -o healed

    billhook prune demo --method fasp --params 100M --layout per_layer --allocation sensitivity -o smaller

    billhook prune demo --method sparsegpt --pattern 2:4 -o sparse
    """
    chosen = recipe(method, **settings)
    if dry_run and (jobs > 1 or ray):
        raise BillhookError("--dry-run: it tells what one process takes: leave out --jobs and --ray")
    if dry_run and recover_minutes:
        raise BillhookError("--dry-run: it tells what the cut takes: leave out --recover-minutes")
    if dry_run and started_together():
        raise BillhookError("dry-run works in one process: start it without accelerate launch")
    held = amount(hidden_budget, BYTES, "hidden-budget")
    output = check_free_of(model, output, overwrite)
    from billhook.cli.console import loading, out

    if dry_run:
        _estimate(model, chosen, output, {"stream_weights": stream_weights, "hidden_budget": held}, json)
        return
    with loading():
        from billhook.cli.work import prune_to
        from billhook.reports import records, terminal
    means: dict[str, Any] = {
        "recover_minutes": recover_minutes,
        "statistics": statistics,
        "jobs": jobs,
        "ray": ray,
        "stream_weights": stream_weights,
        "fresh": fresh,
    }
    record = prune_to(model, chosen, output, overwrite, hidden_budget=held, **means).record
    if json:
        typer.echo(records.to_json(record), nl=False)
    else:
        out.print(terminal.summary_table(record, f"{model}, pruned by {method}"))
        out.print(f"written and reload-verified: {output}", soft_wrap=True)


def _estimate(model: str, chosen: Recipe, output: Path, means: dict[str, Any], json: bool) -> None:
    """Say what a prune would come to."""
    from billhook.cli.console import loading, out, progress

    with loading():
        from billhook.pruning.dry_run import estimate
        from billhook.reports import records, terminal
    with progress() as tick:
        record = estimate(model, chosen, output, **means, tick=tick)
    if json:
        typer.echo(records.to_json(record), nl=False)
        return
    out.print(terminal.estimate_table(record, f"{model}, pruned by {chosen.method.name}: an estimate"))
