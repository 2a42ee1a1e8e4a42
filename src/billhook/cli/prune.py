"""The command prune."""

from pathlib import Path
from typing import Annotated

import typer

from billhook.choices import (
    ALLOCATIONS,
    AXES,
    AXIS_STREAMS,
    CLIENTS,
    DATA_FREE_PRESETS,
    GRADIENT_SCORES,
    INDEPENDENT_STREAMS,
    LAYOUTS,
    MEASURED_PRESETS,
    OPERATOR_STREAMS,
    PATCHES,
    PRESETS,
    ROLES,
    SCORES,
    SELECT,
    WAYS,
)
from billhook.cli.commands import app
from billhook.cli.options import (
    Device,
    Dtype,
    Fresh,
    Json,
    Model,
    Output,
    Overwrite,
    Params,
    Ratio,
    Ray,
    Rotate,
    SeqLen,
    Stream,
    check_free_of,
    choice,
    listed,
    out,
    progress,
    prune_to,
)
from billhook.cuts.chopping import Settings as Patching
from billhook.cuts.narrowing import Settings
from billhook.errors import BillhookError
from billhook.math import metric
from billhook.math.layerwise import Settings as Solving
from billhook.methods import MASKING, METHODS
from billhook.pruning.dry_run import estimate
from billhook.pruning.recipe import INITIALISED, INITS, Recipe, recipe
from billhook.reports import records, terminal
from billhook.runtime.units import BYTES, amount

DEFAULT = Recipe(ratio=0.2)


@app.command(name="prune")
def prune_command(
    model: Model,
    output: Output,
    ratio: Ratio = None,
    params: Params = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="instead of a ratio: bytes its weights and KV cache may take, like 250MB", show_default=False
        ),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            help="instead of a ratio: how many times faster a prefill shall be on this machine", show_default=False
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="tokens in the KV cache that --memory counts")] = DEFAULT.context,
    batch: Annotated[int, typer.Option(help="sequences in the KV cache that --memory counts")] = DEFAULT.batch,
    method: Annotated[
        str, typer.Option(help=f"one of: {', '.join(METHODS)} (see 'billhook methods')")
    ] = DEFAULT.method,
    preset: Annotated[
        str,
        choice(
            PRESETS,
            f"layerchop: which layers go. By position: {', '.join(DATA_FREE_PRESETS)}. "
            + "; ".join(f"{k}: {v}" for k, v in MEASURED_PRESETS.items()),
        ),
    ] = DEFAULT.preset,
    drop: Annotated[
        str, typer.Option(help="layerchop, instead of a ratio: the layers that go, like 10-14,20", show_default=False)
    ] = "",
    keep: Annotated[
        str, typer.Option(help="layerchop, instead of a ratio: the layers that stay", show_default=False)
    ] = "",
    layers: Annotated[
        int | None, typer.Option(help="layerchop, instead of a ratio: how many layers stay", show_default=False)
    ] = None,
    select: Annotated[
        str,
        choice(SELECT, "layerchop: how the layers are chosen. " + "; ".join(f"{k}: {v}" for k, v in SELECT.items())),
    ] = DEFAULT.select,
    candidates: Annotated[str, typer.Option(help="presets that --select healed compares, with commas")] = ",".join(
        DEFAULT.candidates
    ),
    heal_tokens: Annotated[
        str, typer.Option(help="tokens of --calibration that each candidate is trained on")
    ] = f"{DEFAULT.heal_tokens // 1000}k",
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="text that judges the candidates; may be repeated", show_default="demo"),
    ] = None,
    patch: Annotated[
        str,
        choice(
            PATCHES,
            "layerchop: what makes up for the layers that go. "
            + "; ".join(f"{k}: {v}" for k, v in PATCHES.items())
            + ". "
            "The idea of LinearPatch (arXiv:2505.24680), whose matrix would be new parameters: this one is folded into weights "
            "that are there",
        ),
    ] = DEFAULT.patch,
    experts: Annotated[
        str,
        choice(WAYS, "experts: which go, or are merged. " + "; ".join(f"{k}: {v}" for k, v in WAYS.items())),
    ] = "",
    sparsity: Annotated[
        float | None,
        typer.Option(
            help=f"{', '.join(MASKING)}, instead of a ratio: share of zeros in the targeted weights, which makes nothing smaller or "
            "faster by itself",
            show_default=False,
        ),
    ] = None,
    pattern: Annotated[
        str,
        typer.Option(help="or N zeros in every M weights of a row, like 2:4", show_default=False),
    ] = "",
    targets: Annotated[
        str,
        choice(ROLES, f"which weights get zeros, comma-separated, of {', '.join(ROLES)}; empty: all of them"),
    ] = "",
    layer_sparsity: Annotated[
        str, typer.Option(help="other shares of zeros for some layers, like 0:0.3,29:0.7", show_default=False)
    ] = "",
    init: Annotated[
        str,
        choice(
            INITS,
            f"{', '.join(INITIALISED)}: whose weights they start from, of {', '.join(INITS)}; empty: their own choice",
        ),
    ] = "",
    metric: Annotated[
        str,
        typer.Option(
            help=f"optishear: alpha,F1,beta,F2 of its score, like {metric.Metric()}, which is Wanda's (alpha and beta of "
            f"{', '.join(metric.SCALES)}; F1 and F2 of {', '.join(metric.FUNCTIONS)})",
            show_default="searched",
        ),
    ] = "",
    refit: Annotated[
        bool | None,
        typer.Option(
            "--refit/--no-refit",
            help="methods that make zeros: refit the weights that stay by least squares",
            show_default="fistapruner alone does",
        ),
    ] = None,
    normalised: Annotated[
        bool | None,
        typer.Option(
            "--normalised/--no-normalised",
            help="fistapruner: solve for inputs of unit energy, which its paper does not",
            show_default="yes",
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=1,
            help=f"processes that share the layers: methods that make zeros, in the streams {' and '.join(INDEPENDENT_STREAMS)}; fasp, in dense",
        ),
    ] = 1,
    ray: Ray = "",
    keep_zeros: Annotated[
        bool, typer.Option(help="methods that make zeros: those that are there already stay")
    ] = DEFAULT.keep_zeros,
    rotate: Rotate = None,
    axes: Annotated[
        str, choice(AXES, f"what to prune, comma-separated, of {', '.join(AXES)}; empty: the method's own")
    ] = "",
    layout: Annotated[str, choice(LAYOUTS, "; ".join(f"{k}: {v}" for k, v in LAYOUTS.items()))] = DEFAULT.layout,
    allocation: Annotated[
        str,
        choice(ALLOCATIONS, "which layers give how much. " + "; ".join(f"{k}: {v}" for k, v in ALLOCATIONS.items())),
    ] = DEFAULT.allocation,
    floor: Annotated[
        float, typer.Option(help="share of each axis that every layer keeps at least, where layers differ")
    ] = DEFAULT.floor,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="folder that keeps what an allocation measured, and the Grams of the dense stream, for other ratios and methods",
            show_default=False,
        ),
    ] = None,
    vocab_from: Annotated[
        list[str] | None,
        typer.Option(
            help="keep the tokens that occur in this text, specials and bytes, and drop the rest of the vocabulary; may be repeated",
            show_default=False,
        ),
    ] = None,
    vocab_size: Annotated[
        int,
        typer.Option(
            help="with --vocab-from: keep at least so many tokens, the most frequent first", show_default=False
        ),
    ] = DEFAULT.vocab_size,
    score: Annotated[
        str,
        choice(
            (*SCORES, *GRADIENT_SCORES), f"one of: {', '.join(SCORES)}; from gradients: {', '.join(GRADIENT_SCORES)}"
        ),
    ] = DEFAULT.score,
    stream: Annotated[
        str,
        choice(
            {**OPERATOR_STREAMS, **AXIS_STREAMS},
            f"whose activations a layer sees: {', '.join(AXIS_STREAMS)}; for zeros also {', '.join(s for s in OPERATOR_STREAMS if s not in AXIS_STREAMS)}; "
            "empty: the method's own",
        ),
    ] = "",
    damping: Annotated[
        float | None,
        typer.Option(
            help="ridge of a restoration, a patch or a solver, as a share of the Gram's mean diagonal",
            show_default=f"{Settings.damping:g}; of a patch {Patching.damping:g}; for zeros {Solving.damping:g}",
        ),
    ] = None,
    restoration: Annotated[bool, typer.Option(help="repair the kept weights by least squares")] = DEFAULT.restoration,
    correction: Annotated[
        float,
        typer.Option(
            help="share of the error of the layers before that a restoration (dense_target) or a patch makes up"
        ),
    ] = DEFAULT.correction,
    calibration: Annotated[
        str,
        typer.Option(
            help="text file, records with a 'text' field (.jsonl, .json, .csv, .parquet), any of them .gz, a folder of them, hub data set name[:config[:split]], or demo"
        ),
    ] = DEFAULT.calibration,
    samples: Annotated[int, typer.Option(help="windows of calibration text")] = DEFAULT.samples,
    probes: Annotated[
        int, typer.Option(help="further windows, by which the allocations sensitivity and auto judge")
    ] = DEFAULT.probes,
    seq_len: SeqLen = DEFAULT.seq_len,
    seed: Annotated[int, typer.Option(help="which windows are drawn")] = DEFAULT.seed,
    clients: Annotated[
        str,
        typer.Option(
            "--for",
            autocompletion=lambda: list(CLIENTS),
            help="who will load it, comma-separated, which decides --multiple-of: "
            + "; ".join(f"{name}: {step} ({why})" for name, (step, why) in CLIENTS.items()),
        ),
    ] = ",".join(DEFAULT.clients),
    multiple_of: Annotated[
        int | None, typer.Option(help="round widths to multiples of this", show_default="what --for wants")
    ] = None,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    stream_weights: Stream = None,
    hidden_budget: Annotated[
        str | None,
        typer.Option(
            help="bytes of the calibration text's hidden states to keep in memory, like 2GB; the rest waits in files",
            show_default="all",
        ),
    ] = None,
    fresh: Fresh = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="say what it would come to, parameters, memory, disk and time, and prune nothing"
        ),
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Prune MODEL once, without training; write OUT, reload it and compare.

    Examples:

    billhook prune demo --ratio 0.2 -o smaller

    billhook prune demo --params 100M --layout per_layer --allocation sensitivity -o smaller

    billhook prune demo --method sparsegpt --pattern 2:4 -o sparse
    """
    chosen = recipe(
        method=method,
        ratio=ratio,
        params=params,
        memory=memory,
        speedup=speedup,
        context=context,
        batch=batch,
        preset=preset,
        drop=drop,
        keep=keep,
        layers=layers,
        select=select,
        candidates=tuple(listed(candidates)),
        heal_tokens=heal_tokens,
        held_out=tuple(held_out or DEFAULT.held_out),
        patch=patch,
        experts=experts,
        sparsity=sparsity,
        pattern=pattern,
        targets=tuple(listed(targets)),
        layer_sparsity=layer_sparsity,
        init=init,
        metric=metric,
        refit=refit,
        normalised=normalised,
        keep_zeros=keep_zeros,
        rotate=rotate,
        layout=layout,
        allocation=allocation,
        floor=floor,
        axes=tuple(axes.replace(",", " ").split()),
        vocab_from=tuple(vocab_from or ()),
        vocab_size=vocab_size,
        score=score,
        stream=stream,
        damping=damping,
        restoration=restoration,
        correction=correction,
        calibration=calibration,
        samples=samples,
        probes=probes,
        seq_len=seq_len,
        seed=seed,
        clients=tuple(clients.replace(",", " ").split()),
        multiple_of=multiple_of,
        device=device,
        dtype=dtype,
    )
    if dry_run:
        if jobs > 1 or ray:
            raise BillhookError("--dry-run: it tells what one process takes: leave out --jobs and --ray")
        check_free_of(model, output, overwrite)
        _rehearse(model, chosen, output, stream_weights, hidden_budget, json)
        return
    means = {"statistics": statistics, "jobs": jobs, "ray": ray, "stream_weights": stream_weights, "fresh": fresh}
    found = prune_to(model, chosen, output, overwrite, hidden_budget=hidden_budget, **means).report
    if json:
        typer.echo(records.to_json(found), nl=False)
    else:
        out.print(terminal.summary_table(found, f"{model}, pruned by {method}"))
        out.print(f"written and reload-verified: {output}", soft_wrap=True)


def _rehearse(
    model: str, chosen: Recipe, output: Path, stream_weights: bool | None, hidden_budget: str | None, json: bool
) -> None:
    """Say what a prune would come to."""
    held = amount(hidden_budget, BYTES, "hidden-budget")
    with progress() as tick:
        found = estimate(model, chosen, output, stream_weights=stream_weights, hidden_budget=held, tick=tick)
    if json:
        typer.echo(records.to_json(found), nl=False)
        return
    out.print(terminal.estimate_table(found, f"{model}, pruned by {chosen.method}: an estimate"))
