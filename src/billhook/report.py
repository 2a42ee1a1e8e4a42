"""Results as people read them: rich tables, a Markdown model card, JSON."""

import json
import math
import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from billhook import depth, history
from billhook.budget import decoder_parameters, saved_by, total_parameters
from billhook.families import axes
from billhook.pages import tables
from billhook.pages.cut_tables import cut_rows
from billhook.pages.recovery_tables import recovered_words
from billhook.pages.words import ranges
from billhook.plan import Plan


def sizes(before: dict[str, int], after: dict[str, int], budget: str) -> dict[str, Any]:
    """Sizes before and after, with the budget asked for and the two ratios that were achieved."""
    return {
        "before": before,
        "after": after,
        "budget": budget,
        "achieved_ratio": 1 - after["decoder_parameters"] / before["decoder_parameters"],
        "achieved_ratio_of_all": 1 - after["parameters"] / before["parameters"],
    }


def plan_line(model: PreTrainedModel, plan: Plan, budget: str, patches: bool = False) -> str:
    """What a plan will cut, before it does, in one line; `patches`: also what will make up for the layers that go."""
    whole, decoder, saved = total_parameters(model), decoder_parameters(model), saved_by(model, plan)
    found = {axis.kind: [] for axis in axes(model, plan.kinds)}
    for axis in axes(model, plan.kinds):
        if axis.layer not in plan.layers:
            found[axis.kind].append(axis.units - plan.drops.get((axis.layer, axis.kind), 0))
    kept = [f"{kind} {min(n):,}" + (f"-{max(n):,}" if max(n) > min(n) else "") for kind, n in found.items()]
    gone = [f"without layers {', '.join(map(str, plan.layers))}"] if plan.layers else []
    return (
        f"for {budget}: {whole:,} → {whole - saved:,} parameters, -{saved / decoder:.2%} of the decoder; "
        f"left in each layer: {', '.join(kept + gone) or 'all'}{_patch_words(plan.layers) if patches else ''}"
    )


def _patch_words(gone: Sequence[int]) -> str:
    found = [
        f"the FFN of layer {cut[0] - 1} makes up for {ranges(cut)}"
        if cut[0]
        else f"nothing stands before {ranges(cut)}"
        for cut in depth.cuts(gone)
    ]
    return f"; {', '.join(found)}"


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {"python": platform.python_version()} | {n: version(n) for n in ("billhook", "torch", "transformers")}


def conditions(model: PreTrainedModel, command: str, seconds: float | int) -> dict[str, Any]:
    """Where and how numbers were measured."""
    return {
        "command": command,
        "versions": versions(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(seconds, 1),
    }


def assemble(
    kind: str,
    title: str,
    conditions: dict[str, Any],
    *,
    cut: dict[str, Any] | None = None,
    models: Sequence[dict[str, Any]] = (),
    reference: str | None = None,
    points: Sequence[dict[str, Any]] = (),
    knee: dict[str, Any] | None = None,
    healing: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What report.json holds and `page.render` shows; `kind` is prune, evaluate, compare, sweep or recover.

    Args:
        cut: the content of a pruned checkpoint's billhook.json.
        models: of `evaluate.side_by_side`; `reference` names the one that the others are compared with.
        points: of a leaderboard or a sweep, with its `knee`.
        healing: the last record of `recovery` in a trained checkpoint's billhook.json.
    """
    return {
        "title": title,
        "kind": kind,
        "cut": cut,
        "models": list(models),
        "reference": reference,
        "points": list(points),
        "knee": knee,
        "healing": healing,
        "conditions": conditions,
    }


def stored_cut(folder: Path | None) -> dict[str, Any] | None:
    """What billhook.json in a checkpoint says was cut; None where there is none, or nothing was.

    Raises:
        BillhookError: it cannot be read, or a key is missing or of another type; names it.
    """
    return history.read(folder) if folder else None


def to_json(report: dict[str, Any]) -> str:
    """The report as JSON: what billhook.json holds and --json prints."""
    return json.dumps(_jsonable(report), indent=2, allow_nan=False, default=str) + "\n"


def summary_table(report: dict[str, Any], title: str) -> Table:
    """What was cut, for a terminal."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in cut_rows(report):
        table.add_row(Text(name), Text(value))  # of strangers: brackets in them are no markup
    return table


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows of `tables` for a terminal."""
    found = Table(title=title, title_justify="left")
    for n, name in enumerate(header):
        found.add_column(name, justify="right" if n else "left", overflow="fold")  # no name is cut short
    for row in rows:
        found.add_row(*row)
    return found


def estimate_table(found: dict[str, Any], title: str) -> Table:
    """What a prune would come to, of `billhook.estimate`."""
    table = Table(title=title, title_justify="left", show_header=False)

    def per(part: str) -> str:
        before, after = (found[part][when] for when in ("before", "after"))
        return f"{before:,} → {after:,} ({after / before - 1:+.1%})"

    table.add_row("parameters", per("parameters"))
    table.add_row("of the decoder", per("decoder_parameters"))
    where = "weights stay in their files" if found["streamed"] else "weights in memory"
    table.add_row("peak memory", f"{found['peak_bytes'] / 1e9:.2f} GB of {found['free_bytes'] / 1e9:.2f} free; {where}")
    table.add_row("disk", f"{found['disk_bytes'] / 1e9:.2f} GB of {found['disk_free_bytes'] / 1e9:.2f} free")
    for stage, cost in found["stages"].items():
        done = f", {cost['flops'] / 1e12:.2f} TFLOP" if cost["flops"] else ""
        table.add_row(stage, f"{cost['seconds']:.1f} s{done}")
    table.add_row("in all", f"{found['seconds']:.0f} s, {found['flops'] / 1e12:.2f} TFLOP", style="bold")
    return table


def text_table(models: Sequence[dict[str, Any]]) -> Table:
    """What each model writes, side by side."""
    table = Table(title="greedy continuations", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=1)
    for model in models:
        table.add_column(model["name"], ratio=2)
    for n, prompt in enumerate(models[0]["prompts"]):
        table.add_row(prompt, *[model["continuations"][n].strip() for model in models])
    return table


def model_card(report: dict[str, Any]) -> str:
    """README.md of an output folder: of a pruned model, a pruned and trained one, or one that was only trained."""
    recipe, recoveries = report.get("recipe"), report.get("recovery") or []
    parent = tables.plain(str(report.get("parent") or recoveries[-1]["student"]))
    rows = "\n".join(f"| {tables.plain(name)} | {tables.plain(value)} |" for name, value in cut_rows(report))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    done, story, tags = [], [], ["billhook"]
    if recipe:
        training = "" if recoveries else " without training"
        done, tags = ["pruned"], [*tags, "pruned", recipe["method"]]
        story = [f"pruned{training} by {recipe['method']} ({report.get('paper') or 'no paper'})"]
    if recoveries:
        done, tags = [*done, "recovered"], [*tags, "recovered"]
        story += [f"trained by {tables.plain(recovered_words(one))}" for one in recoveries]
    layout = CARD_LAYOUT[report.get("layout") or "unknown"].format(report.get("model_type") or "transformers")
    made = "`, then `".join(commands(report))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{", ".join(tags)}]
---
# {parent}, {" and ".join(done)} by billhook

{layout}, {", then ".join(story)}.

| | |
|---|---|
{rows}

Made by `{made}` ({versions}).
`billhook.json` holds {_holds(recipe, recoveries)}.
The licence is that of the parent model.
"""


def _holds(recipe: Any, recoveries: Sequence[Any]) -> str:
    """What a reader finds in billhook.json."""
    if not recoveries:
        return "the whole recipe, hashes of the calibration text, and every layer's numbers"
    recipes = "the whole recipe, every layer's numbers, " if recipe else ""
    return f"{recipes}the settings of the training, hashes of the texts, and every judgement"


def commands(report: dict[str, Any]) -> list[str]:
    """The command lines that make the same model: the cut, if billhook made it, and every training after it."""
    recoveries = report.get("recovery") or []
    cuts = [command(report)] if report.get("recipe") else []
    outs = ["OUT", *[f"OUT{n}" for n in range(2, len(recoveries) + 2)]]
    outs = outs if cuts or not recoveries else [str(recoveries[0]["student"]), *outs]
    return [*cuts, *[recover_command(one, *outs[n : n + 2]) for n, one in enumerate(recoveries)]]


def command(report: dict[str, Any]) -> str:
    """The command line that makes the same cut."""
    recipe = report["recipe"]
    if report.get("search"):
        return _search_command(report["parent"], recipe)
    if report.get("zeros"):
        return _zeros_command(report["parent"], recipe)
    idle = UNIT_FLAGS if recipe["method"] == "layerchop" else LAYER_FLAGS
    sliced = bool(report.get("residual"))
    idle = (*idle, *SCORE_FLAGS) if sliced else idle
    healed = recipe.get("select") == "healed"
    idle = (*idle, "preset") if recipe.get("drop") or recipe.get("keep") or healed else idle
    idle = idle if healed else (*idle, *HEAL_FLAGS)
    idle = idle if report["calibration"].get("probes") else (*idle, "probes")
    patched = recipe.get("patch", "none") != "none"
    idle = tuple(key for key in idle if key not in PATCH_FLAGS) if patched else (*idle, "patch")
    settings = " ".join(
        f"--{key.replace('_', '-')} {_flag(value)}"
        for key, value in recipe.items()
        if key in CARD_FLAGS and key not in idle and value not in (None, "")
    )
    turned = " --no-rotate" if sliced and not recipe.get("rotate") else ""
    turned += "" if recipe.get("restoration", True) else " --no-restoration"
    return f"billhook prune {report['parent']} {settings}{turned} -o OUT"


def _zeros_command(parent: str, recipe: dict[str, Any]) -> str:
    shares = recipe.get("layer_sparsity") or {}
    given = {**recipe, "layer_sparsity": ",".join(f"{n}:{share:g}" for n, share in shares.items())}
    said = {key: given.get(key) for key in ZEROS_FLAGS}
    settings = [
        f"--{key.replace('_', '-')} {_flag(value)}" for key, value in said.items() if value not in (None, "", [])
    ]
    published = recipe["method"] == "fistapruner"
    on = {key: bool(recipe.get(key)) for key in ("refit", "normalised")}
    switches = [f"--{'' if given else 'no-'}{key}" for key, given in on.items() if given or published]
    switches += [] if recipe.get("keep_zeros", True) else ["--no-keep-zeros"]
    return f"billhook prune {parent} {' '.join([*settings, *switches])} -o OUT"


def _search_command(parent: str, recipe: dict[str, Any]) -> str:
    given = {**recipe, "calibration": recipe.get("calibration", "").split("+")}
    given |= {key: ",".join(recipe.get(key, ())) for key in ("axes", "targets")}
    idle = UNIT_SEARCH if recipe["method"] == "optishear" else ()
    settings = " ".join(
        f"--{key.replace('_', '-')} {shlex.quote(str(value))}"
        for key in SEARCH_FLAGS
        if key not in idle
        for value in (given[key] if isinstance(given.get(key), list) else [given.get(key)])
        if value not in (None, "")
    )
    return f"billhook search {parent} {settings}{'' if recipe.get('restoration', True) else ' --no-restoration'} -o OUT"


def recover_command(recovery: dict[str, Any], student: str = "OUT", out: str = "OUT2") -> str:
    """The command line that trains a checkpoint `student` the same way."""
    given = {**recovery, "text": recovery["texts"], "states": "on" if recovery["states"] else "off"}
    distils = recovery["objective"] == "distill"
    settings = [
        f"--{key.replace('_', '-')} {shlex.quote(str(value))}"
        for key in RECOVER_FLAGS
        if distils or key not in TEACHER_FLAGS
        for value in (given[key] if isinstance(given.get(key), list) else [given.get(key)])
        if value is not None
    ]
    if (keep := recovery.get("keep_zeros")) is not None:
        settings.append("--keep-zeros" if keep else "--no-keep-zeros")
    settings += ["--dropout"] if recovery.get("dropout") else []
    several = recovery.get("processes") or 1
    start = f"accelerate launch --num_processes {several} -m billhook" if several > 1 else "billhook"
    return f"{start} recover {shlex.quote(student)} {' '.join(settings)} -o {out}"


CARD_LAYOUT = {
    "unknown": "A `{}` checkpoint",
    "uniform": "A stock `{}` checkpoint",
    "per_layer": "A `{}` checkpoint whose layers differ in size: load it with `billhook.load(path)`, or with "
    "transformers or vLLM and `trust_remote_code=True`",
}
HEAL_FLAGS = ("select", "candidates", "heal_tokens", "held_out")
LAYER_FLAGS = ("preset", "drop", "keep", "layers", "patch", *HEAL_FLAGS)
PATCH_FLAGS = ("damping", "correction")
SCORE_FLAGS = ("allocation", "axes", "score", "stream")  # idle where no axis of a layer is cut
UNIT_FLAGS = ("allocation", "axes", "score", "stream", "damping", "correction", "multiple_of")
CARD_FLAGS = (
    *("method", "ratio", "params", "memory", "speedup", *LAYER_FLAGS, "layout", *UNIT_FLAGS),
    *("calibration", "samples", "probes", "seq_len", "seed"),
)
ZEROS_FLAGS = (
    *("method", "sparsity", "pattern", "targets", "layer_sparsity", "init", "metric", "stream", "damping"),
    *("calibration", "samples", "seq_len", "seed"),
)
SEARCH_FLAGS = (
    *(
        "method",
        "ratio",
        "params",
        "sparsity",
        "pattern",
        "targets",
        "trials",
        "minutes",
        "space",
        "sampler",
        "objective",
        "calibration",
        "validation",
        "pool",
        "pool_len",
    ),
    *("clusters", "axes", "layout", "multiple_of", "samples", "seq_len", "seed"),
)
UNIT_SEARCH = ("pool", "pool_len", "clusters", "axes", "layout", "multiple_of")  # idle where zeros are searched
RECOVER_FLAGS = (
    *("teacher", "objective", "states", "trainable", "rank", "tokens", "text", "held_out", "seq_len"),
    *("batch_tokens", "lr"),
    *("warmup", "top_k", "precision", "seed"),
)
TEACHER_FLAGS = ("teacher", "states", "top_k")  # idle without one


def _jsonable(value: Any) -> Any:
    """The same value with null for what JSON has no number for: a broken model's perplexity may be infinite."""
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flag(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
