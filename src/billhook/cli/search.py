"""The command that searches for calibration samples and metric before it prunes: search."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from billhook.choices import GROUPS, ROLES, SAMPLERS, SEARCH_OBJECTIVES, SPACES
from billhook.cli.commands import app
from billhook.cli.options import (
    CALIBRATION,
    LAYOUT,
    MACHINE,
    Axes,
    Device,
    Dtype,
    Fresh,
    Jobs,
    Json,
    Layout,
    Model,
    Output,
    Overwrite,
    Params,
    Pattern,
    Ratio,
    Ray,
    Seed,
    SeqLen,
    Sparsity,
    check_free_of,
    listed,
    option,
    unfinished,
)
from billhook.errors import one_of
from billhook.pruning.recipe import Recipe, recipe

DEFAULT = Recipe.model_construct(method="adapruner")
SEARCHED = ("adapruner", "optishear")
SEARCH, ADAPRUNER, OPTISHEAR = "Search", "--method adapruner", "--method optishear"


@app.command(name="search")
def search_command(
    model: Model,
    output: Output,
    ratio: Ratio = None,
    params: Params = None,
    sparsity: Sparsity = None,
    pattern: Pattern = "",
    method: Annotated[
        str, option(SEARCH, "adapruner: a structured cut, to --ratio or --params; optishear: zeros", names=SEARCHED)
    ] = DEFAULT.method,
    trials: Annotated[int, option(SEARCH, "candidates, the known metrics among them")] = DEFAULT.trials,
    minutes: Annotated[
        float | None, option(SEARCH, "end with the round after which no other fits in", show_default=False)
    ] = None,
    space: Annotated[
        str, option(SEARCH, f"full, paper, or some of {', '.join(GROUPS)}, with commas", names=(*SPACES, *GROUPS))
    ] = DEFAULT.space,
    sampler: Annotated[
        str, option(SEARCH, ", ".join(SAMPLERS), names=SAMPLERS, show_default="tpe; of optishear nsga2")
    ] = "",
    objective: Annotated[
        str, option(SEARCH, "nll: loss of the cut model; kl: divergence from the unpruned", names=SEARCH_OBJECTIVES)
    ] = DEFAULT.objective,
    pool: Annotated[int, option(ADAPRUNER, "windows of calibration text to choose from")] = DEFAULT.pool,
    pool_len: Annotated[int, option(ADAPRUNER, "tokens in each of them")] = DEFAULT.pool_len,
    clusters: Annotated[int, option(ADAPRUNER, "groups of such windows, by subject")] = DEFAULT.clusters,
    restoration: Annotated[
        bool, option(ADAPRUNER, "refit the kept weights of finalists (not in the space 'paper')")
    ] = DEFAULT.restoration,
    targets: Annotated[
        str, option(OPTISHEAR, f"which weights get zeros, with commas, of {', '.join(ROLES)}; empty: all", names=ROLES)
    ] = "",
    axes: Axes = "",
    layout: Layout = DEFAULT.layout,
    multiple_of: Annotated[int | None, option(LAYOUT, "round widths to multiples of this", show_default="32")] = None,
    calibration: Annotated[
        list[str] | None,
        option(CALIBRATION, "text to choose samples from; may be repeated: two kinds are better", show_default="demo"),
    ] = None,
    validation: Annotated[
        list[str] | None,
        option(
            *(CALIBRATION, "text that candidates are tried on; may be repeated"),
            show_default="the last fifth of --calibration",
        ),
    ] = None,
    samples: Annotated[int, option(CALIBRATION, "windows that the refit is fitted on")] = DEFAULT.samples,
    seq_len: SeqLen = DEFAULT.seq_len,
    seed: Seed = DEFAULT.seed,
    overwrite: Overwrite = False,
    json: Json = False,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
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

    One backward pass, then a trial costs a forward pass of a few windows.  What comes out is never worse than the best fixed
    metric, as far as text that no trial saw can tell.  A search that was cut off goes on with the same command.

    Examples:

    billhook search demo --ratio 0.2 --calibration wiki.txt --calibration news.txt -o smaller

    billhook search demo --method optishear --sparsity 0.5 --calibration wiki.txt -o sparse
    """
    given = {name: value for name, value in locals().items() if name in Recipe.model_fields}
    started = time.perf_counter()
    texts = {"calibration": "+".join(calibration or [DEFAULT.calibration]), "validation": tuple(validation or ())}
    listed_options = {"targets": tuple(listed(targets)), "axes": tuple(listed(axes))}
    chosen = recipe(**{**given, **texts, **listed_options, "method": one_of("method", method, SEARCHED)})
    output = check_free_of(model, output, overwrite)
    from billhook.cli.console import loading, out

    with loading():
        from billhook.cli.work import prune_to
        from billhook.reports import records, terminal
        from billhook.reports.search_tables import outcome_words
    folder = Path(os.path.expanduser(study)) if study else unfinished(output)
    record = prune_to(model, chosen, output, overwrite, study=folder, fresh=fresh, jobs=jobs, ray=ray).report
    if json:
        typer.echo(records.to_json(record), nl=False)
        return
    out.print(terminal.summary_table(record, f"{model}, pruned by {method}"))
    out.print(outcome_words(record["search"]), soft_wrap=True)
    out.print(f"{time.perf_counter() - started:.0f} s; written and reload-verified: {output}", soft_wrap=True)
