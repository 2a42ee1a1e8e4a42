"""The command prune."""

from pathlib import Path
from typing import Annotated, Any

import typer

from billhook.choices import (
    ALLOCATIONS,
    AXIS_STREAMS,
    CLIENTS,
    GRADIENT_SCORES,
    OPERATOR_STREAMS,
    PATCHES,
    PRESETS,
    ROLES,
    SCORES,
    SELECT,
    STARTS,
    WAYS,
)
from billhook.cli.commands import app
from billhook.cli.options import (
    BUDGET,
    CALIBRATION,
    LAYOUT,
    MACHINE,
    OUTPUT,
    Axes,
    Calibration,
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
    Samples,
    Seed,
    SeqLen,
    Sparsity,
    Stream,
    check_free_of,
    listed,
    option,
)
from billhook.cuts.settings import SOLVER_DAMPING, Chopping, Narrowing
from billhook.errors import BillhookError
from billhook.methods import METHODS
from billhook.pruning.recipe import Recipe, recipe
from billhook.runtime.units import BYTES, amount

DEFAULT = Recipe.model_construct()  # every field's default, unchecked: help needs no more
METHOD = "Method"
FASP, LAYERCHOP, EXPERTS, SLICEGPT = (f"--method {name}" for name in ("fasp", "layerchop", "experts", "slicegpt"))
OPTISHEAR, SOLVERS = "--method optishear", "--method fistapruner, admm"
ZEROS, SEVERAL = "Methods that make zeros", "Several methods"


@app.command(name="prune")
def prune_command(
    model: Model,
    output: Output,
    ratio: Ratio = None,
    params: Params = None,
    memory: Annotated[
        str | None, option(BUDGET, "or: bytes of its weights and KV cache, like 250MB", show_default=False)
    ] = None,
    speedup: Annotated[
        float | None, option(BUDGET, "or: how many times faster a prefill is on this machine", show_default=False)
    ] = None,
    context: Annotated[int, option(BUDGET, "tokens in the KV cache that --memory counts")] = DEFAULT.context,
    batch: Annotated[int, option(BUDGET, "sequences in the KV cache that --memory counts")] = DEFAULT.batch,
    sparsity: Sparsity = None,
    pattern: Pattern = "",
    vocab_from: Annotated[
        list[str] | None,
        option(BUDGET, "keep the tokens of this text, drop the rest; may be repeated", show_default=False),
    ] = None,
    vocab_size: Annotated[
        int, option(BUDGET, "with --vocab-from: keep at least so many tokens", show_default=False)
    ] = DEFAULT.vocab_size,
    method: Annotated[
        str, option(METHOD, "one of 'billhook methods'; 'billhook methods NAME' says all of it", names=METHODS)
    ] = DEFAULT.method,
    stream: Annotated[
        str,
        option(SEVERAL, "what a layer sees; empty: the method's own", names={**OPERATOR_STREAMS, **AXIS_STREAMS}),
    ] = "",
    damping: Annotated[
        float | None,
        option(
            *(SEVERAL, "ridge of least squares, as a share of the Gram's mean diagonal"),
            show_default=f"{Narrowing.damping:g}; layerchop, slicegpt {Chopping.damping:g}; zeros {SOLVER_DAMPING:g}",
        ),
    ] = None,
    restoration: Annotated[bool, option(SEVERAL, "refit the kept weights by least squares")] = DEFAULT.restoration,
    correction: Annotated[
        float, option(SEVERAL, "share of the error of the layers before that a refit makes up")
    ] = DEFAULT.correction,
    score: Annotated[
        str, option(FASP, f"{', '.join(SCORES)}, or one from gradients", names=(*SCORES, *GRADIENT_SCORES))
    ] = DEFAULT.score,
    preset: Annotated[
        str, option(LAYERCHOP, "which layers go: by position or measured", names=PRESETS)
    ] = DEFAULT.preset,
    drop: Annotated[
        str, option(LAYERCHOP, "in place of a budget: layers that go, like 10-14,20", show_default=False)
    ] = "",
    keep: Annotated[str, option(LAYERCHOP, "in place of a budget: layers that stay", show_default=False)] = "",
    layers: Annotated[
        int | None, option(LAYERCHOP, "in place of a budget: how many layers stay", show_default=False)
    ] = None,
    patch: Annotated[
        str, option(LAYERCHOP, "what makes up for the layers: none, linear", names=PATCHES)
    ] = DEFAULT.patch,
    select: Annotated[
        str, option(LAYERCHOP, "healed: the best of --candidates after a short training of each", names=SELECT)
    ] = DEFAULT.select,
    candidates: Annotated[str, option(LAYERCHOP, "presets that --select healed compares, with commas")] = ",".join(
        DEFAULT.candidates
    ),
    heal_tokens: Annotated[
        str, option(LAYERCHOP, "tokens of --calibration to train each on")
    ] = f"{DEFAULT.heal_tokens // 1000}k",
    held_out: Annotated[
        list[str] | None,
        option(LAYERCHOP, "text that judges the candidates; may be repeated", show_default="demo"),
    ] = None,
    experts: Annotated[
        str, option(EXPERTS, f"how experts go: {', '.join(WAYS)}", names=WAYS, show_default="reap")
    ] = "",
    rotate: Annotated[
        bool | None,
        option(SLICEGPT, "turn the stream first, which unties a tied head", "--rotate/--no-rotate", show_default="yes"),
    ] = None,
    targets: Annotated[
        str, option(ZEROS, f"which weights, with commas, of {', '.join(ROLES)}; empty: all", names=ROLES)
    ] = "",
    layer_sparsity: Annotated[
        str, option(ZEROS, "other shares for some layers, like 0:0.3,29:0.7", show_default=False)
    ] = "",
    refit: Annotated[
        bool | None,
        option(
            *(ZEROS, "refit the weights that stay by least squares", "--refit/--no-refit"),
            show_default="fistapruner alone does",
        ),
    ] = None,
    keep_zeros: Annotated[bool, option(ZEROS, "zeros that are there already stay")] = DEFAULT.keep_zeros,
    metric: Annotated[
        str, option(OPTISHEAR, "alpha,F1,beta,F2 of its score, like none,identity,none,sqrt", show_default="searched")
    ] = "",
    init: Annotated[
        str, option(SOLVERS, f"whose weights they start from: {', '.join(STARTS)}", names=STARTS, show_default="own")
    ] = "",
    normalised: Annotated[
        bool | None,
        option(
            *("--method fistapruner", "solve for inputs of unit energy, which its paper does not"),
            "--normalised/--no-normalised",
            show_default="yes",
        ),
    ] = None,
    axes: Axes = "",
    layout: Layout = DEFAULT.layout,
    allocation: Annotated[
        str, option(LAYOUT, "which layers give how much: equal, sensitivity, auto, …, or a file", names=ALLOCATIONS)
    ] = DEFAULT.allocation,
    floor: Annotated[float, option(LAYOUT, "share that every layer keeps, where layers differ")] = DEFAULT.floor,
    clients: Annotated[
        str, option(LAYOUT, f"who will load it, which decides widths: {', '.join(CLIENTS)}", "--for", names=CLIENTS)
    ] = ",".join(DEFAULT.clients),
    multiple_of: Annotated[
        int | None, option(LAYOUT, "round widths to multiples of this", show_default="what --for wants")
    ] = None,
    calibration: Calibration = DEFAULT.calibration,
    samples: Samples = DEFAULT.samples,
    probes: Annotated[
        int, option(CALIBRATION, "further windows, by which sensitivity and auto judge")
    ] = DEFAULT.probes,
    seq_len: SeqLen = DEFAULT.seq_len,
    seed: Seed = DEFAULT.seed,
    statistics: Annotated[
        Path | None, option(CALIBRATION, "folder that keeps what was measured, for other ratios", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    dry_run: Annotated[bool, option(OUTPUT, "say what it would come to and cost; prune nothing", "--dry-run")] = False,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    jobs: Jobs = 1,
    ray: Ray = "",
    stream_weights: Stream = None,
    hidden_budget: Annotated[
        str | None, option(MACHINE, "bytes of hidden states to keep in memory, like 2GB", show_default="all")
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Prune MODEL once, without training; write OUT, reload it and compare.

    Examples:

    billhook prune demo --ratio 0.2 -o smaller

    billhook prune demo --params 100M --layout per_layer --allocation sensitivity -o smaller

    billhook prune demo --method sparsegpt --pattern 2:4 -o sparse
    """
    given = {name: value for name, value in locals().items() if name in Recipe.model_fields}
    listed_options = {name: tuple(listed(given[name])) for name in ("candidates", "targets", "axes", "clients")}
    repeated = {"held_out": tuple(held_out or DEFAULT.held_out), "vocab_from": tuple(vocab_from or ())}
    chosen = recipe(**{**given, **listed_options, **repeated})
    if dry_run and (jobs > 1 or ray):
        raise BillhookError("--dry-run: it tells what one process takes: leave out --jobs and --ray")
    held = amount(hidden_budget, BYTES, "hidden-budget")
    output = check_free_of(model, output, overwrite)
    from billhook.cli.console import loading, out

    if dry_run:
        _estimate(model, chosen, output, {"stream_weights": stream_weights, "hidden_budget": held}, json)
        return
    with loading():
        from billhook.cli.work import prune_to
        from billhook.reports import records, terminal
    means = {"statistics": statistics, "jobs": jobs, "ray": ray, "stream_weights": stream_weights, "fresh": fresh}
    record = prune_to(model, chosen, output, overwrite, hidden_budget=hidden_budget, **means).report
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
    out.print(terminal.estimate_table(record, f"{model}, pruned by {chosen.method}: an estimate"))
