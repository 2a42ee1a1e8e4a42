"""The command that searches for calibration samples and metric before it prunes: search."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from billhook.choices import AXES, GROUPS, LAYOUTS, ROLES, SAMPLERS, SEARCH_OBJECTIVES, SPACES
from billhook.cli.commands import app
from billhook.cli.options import (
    Device,
    Dtype,
    Json,
    Model,
    Output,
    Overwrite,
    Params,
    Ratio,
    Ray,
    SeqLen,
    choice,
    listed,
    out,
    prune_to,
    unfinished,
)
from billhook.errors import one_of
from billhook.pruning.recipe import Recipe, recipe
from billhook.reports import records, terminal
from billhook.reports.search_tables import outcome_words

DEFAULT = Recipe(method="adapruner", ratio=0.2)
SEARCHED = ("adapruner", "optishear")


@app.command(name="search")
def search_command(
    model: Model,
    output: Output,
    ratio: Ratio = None,
    params: Params = None,
    method: Annotated[
        str,
        choice(
            SEARCHED,
            "adapruner: samples, metric and budgets of a structured cut, to a --ratio or --params; optishear: metric and "
            "sparsities of zeros, to a --sparsity or --pattern",
        ),
    ] = DEFAULT.method,
    sparsity: Annotated[
        float | None, typer.Option(help="optishear: share of zeros in the targeted weights", show_default=False)
    ] = None,
    pattern: Annotated[
        str, typer.Option(help="optishear: or N zeros in every M weights of a row, like 2:4", show_default=False)
    ] = "",
    targets: Annotated[
        str, choice(ROLES, f"optishear: which weights get zeros, comma-separated, of {', '.join(ROLES)}; empty: all")
    ] = "",
    trials: Annotated[int, typer.Option(help="candidates, the known metrics among them")] = DEFAULT.trials,
    minutes: Annotated[
        float | None, typer.Option(help="end with the round after which no other fits in", show_default=False)
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="text that samples are chosen from: file, .jsonl, folder, hub data set or demo; may be repeated: two kinds or more are best",
            show_default="demo",
        ),
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option(
            help="text that candidates are tried on; may be repeated",
            show_default="the last fifth of the calibration text, which then never calibrates",
        ),
    ] = None,
    pool: Annotated[int, typer.Option(help="windows of calibration text to choose from")] = DEFAULT.pool,
    pool_len: Annotated[int, typer.Option(help="tokens in each of them")] = DEFAULT.pool_len,
    clusters: Annotated[int, typer.Option(help="groups of such windows, by subject")] = DEFAULT.clusters,
    space: Annotated[
        str,
        choice(
            (*SPACES, *GROUPS),
            "what is searched. "
            + "; ".join(f"{k}: {v}" for k, v in SPACES.items())
            + ". Or some of these, with commas. "
            + "; ".join(f"{k}: {v}" for k, v in GROUPS.items()),
        ),
    ] = DEFAULT.space,
    sampler: Annotated[
        str,
        choice(SAMPLERS, "; ".join(f"{k}: {v}" for k, v in SAMPLERS.items()) + "; empty: tpe, of optishear nsga2"),
    ] = "",
    objective: Annotated[
        str, choice(SEARCH_OBJECTIVES, "; ".join(f"{k}: {v}" for k, v in SEARCH_OBJECTIVES.items()))
    ] = DEFAULT.objective,
    axes: Annotated[str, choice(AXES, "what to prune, comma-separated, of ffn, heads, groups; empty: ffn")] = "",
    layout: Annotated[str, choice(LAYOUTS, "; ".join(f"{k}: {v}" for k, v in LAYOUTS.items()))] = DEFAULT.layout,
    multiple_of: Annotated[
        int | None, typer.Option(help="round FFN widths to multiples of this", show_default="32")
    ] = None,
    restoration: Annotated[
        bool, typer.Option(help="repair the kept weights of finalists by least squares (not in the space 'paper')")
    ] = DEFAULT.restoration,
    samples: Annotated[int, typer.Option(help="windows that the restoration is fitted on")] = DEFAULT.samples,
    seq_len: SeqLen = DEFAULT.seq_len,
    seed: Annotated[int, typer.Option(help="of the pool, the sampler and all draws")] = DEFAULT.seed,
    jobs: Annotated[int, typer.Option(min=1, help="processes that try candidates, each with a model of its own")] = 1,
    ray: Ray = "",
    study: Annotated[
        Path | None,
        typer.Option(
            help="folder that keeps the evidence and every trial", show_default="beside OUT, deleted at the end"
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over where a search was cut off")] = False,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Search which calibration samples and which importance metric prune MODEL best (AdaPruner), then prune; write OUT.
    With --method optishear, which metric of zeros.

    One backward pass, then a trial costs a forward pass of a few windows.  What comes out is never worse than the best fixed
    metric, as far as text that no trial saw can tell.  A search that was cut off goes on with the same command.

    Examples:

    billhook search demo --ratio 0.2 --calibration wiki.txt --calibration news.txt -o smaller

    billhook search demo --method optishear --sparsity 0.5 --calibration wiki.txt -o sparse
    """
    started = time.perf_counter()
    chosen = recipe(
        method=one_of("method", method, SEARCHED),
        ratio=ratio,
        params=params,
        sparsity=sparsity,
        pattern=pattern,
        targets=tuple(listed(targets)),
        trials=trials,
        minutes=minutes,
        calibration="+".join(calibration or [DEFAULT.calibration]),
        validation=tuple(validation or ()),
        pool=pool,
        pool_len=pool_len,
        clusters=clusters,
        space=space,
        sampler=sampler,
        objective=objective,
        axes=tuple(listed(axes)),
        layout=layout,
        multiple_of=multiple_of,
        restoration=restoration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    folder = Path(os.path.expanduser(study)) if study else unfinished(output)
    found = prune_to(model, chosen, output, overwrite, study=folder, fresh=fresh, jobs=jobs, ray=ray).report
    if json:
        typer.echo(records.to_json(found), nl=False)
        return
    out.print(terminal.summary_table(found, f"{model}, pruned by {method}"))
    out.print(outcome_words(found["search"]), soft_wrap=True)
    out.print(f"{time.perf_counter() - started:.0f} s; written and reload-verified: {output}", soft_wrap=True)
