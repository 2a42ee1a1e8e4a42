"""Results as people read them: rich tables, a Markdown model card, JSON."""

import json
import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from billhook.budget import decoder_parameters, saved_by, total_parameters
from billhook.families import axes
from billhook.plan import Plan

WANTS = {
    "Q4_0, Q8_0": 32,
    "Marlin": 128,
    "K-quants": 256,
}  # what FFN widths must be a multiple of; else llama.cpp and vLLM fall back


def sizes(before: dict[str, int], after: dict[str, int], budget: str) -> dict[str, Any]:
    """Sizes before and after, with the budget asked for and the two ratios that were achieved."""
    return {
        "before": before,
        "after": after,
        "budget": budget,
        "achieved_ratio": 1 - after["decoder_parameters"] / before["decoder_parameters"],
        "achieved_ratio_of_all": 1 - after["parameters"] / before["parameters"],
    }


def plan_line(model: PreTrainedModel, plan: Plan, budget: str) -> str:
    """What a plan will cut, before it does, in one line."""
    whole, decoder, saved = total_parameters(model), decoder_parameters(model), saved_by(model, plan)
    found = {axis.kind: [] for axis in axes(model, plan.kinds)}
    for axis in axes(model, plan.kinds):
        if axis.layer not in plan.layers:
            found[axis.kind].append(axis.units - plan.drops.get((axis.layer, axis.kind), 0))
    kept = [f"{kind} {min(n):,}" + (f"-{max(n):,}" if max(n) > min(n) else "") for kind, n in found.items()]
    gone = [f"without layers {', '.join(map(str, plan.layers))}"] if plan.layers else []
    return (
        f"for {budget}: {whole:,} → {whole - saved:,} parameters, -{saved / decoder:.2%} of the decoder; "
        f"left in each layer: {', '.join(kept + gone) or 'all'}"
    )


def to_json(report: dict[str, Any]) -> str:
    """The report as JSON: what billhook.json holds and --json prints."""
    return json.dumps(_jsonable(report), indent=2, allow_nan=False, default=str) + "\n"


def cut_summary(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What was cut, as (name, value) lines."""
    size, cuts, seconds = report["sizes"], report["cuts"], report["seconds"]
    lines = [
        (
            "parameters",
            f"{size['before']['parameters']:,} → {size['after']['parameters']:,} ({-size['achieved_ratio_of_all']:.1%})",
        ),
        (
            "decoder",
            f"{size['before']['decoder_parameters']:,} → {size['after']['decoder_parameters']:,} "
            f"(-{size['achieved_ratio']:.2%}, asked for {size['budget']})",
        ),
    ]
    if cut := report["vocabulary"]:
        lines.append(
            (
                "vocabulary",
                f"{cut['before']:,} → {cut['kept']:,} tokens; the calibration text takes {cut['calibration_grows']:.1%} more "
                f"of them, {cut['calibration_as_bytes']:.1%} of it as single bytes",
            )
        )
    if gone := report["dropped_layers"]:
        lines.append(("layers", f"{', '.join(map(str, gone))} dropped (numbered from 0)"))
    for kind in dict.fromkeys(cut["kind"] for cut in cuts):
        of_kind = [cut for cut in cuts if cut["kind"] == kind]
        held = [cut["error_held_out"] for cut in of_kind if cut["error_held_out"] is not None]
        lines.append((kind, _widths(of_kind)))
        errors = " → ".join(f"{_mean([cut[key] for cut in of_kind]):.3f}" for key in ("error_without", "error"))
        lines.append(
            (f"{kind} error", f"{errors} by restoration" + (f", {_mean(held):.3f} on held-out windows" if held else ""))
        )
    if widths := [cut["units"] - cut["dropped"] for cut in cuts if cut["kind"] == "ffn"]:
        fit = [
            f"{name} ({step}) in {sum(w % step == 0 for w in widths)} of {len(widths)}" for name, step in WANTS.items()
        ]
        lines.append(("widths fit", ", ".join(fit) + " layers"))
    text = report["calibration"]
    lines.append(("calibration", f"{text['windows']} windows of {text['seq_len']} tokens of {text['source']}"))
    lines.append(("seconds", ", ".join(f"{stage} {s:.1f}" for stage, s in seconds.items())))
    lines.append(("peak memory", f"{report['peak_growth_bytes'] / 2**20:.0f} MiB beyond the loaded model"))
    return lines


def _widths(cuts: list[dict[str, Any]]) -> str:
    """What is left of one kind of axis: once where all layers are equal, else layer by layer."""
    before, after = [{cut[key] for cut in cuts} for key in ("units", "dropped")]
    if len(before) == len(after) == 1:
        units, gone = before.pop(), after.pop()
        return f"{units} → {units - gone} in each of {len(cuts)} layers"
    left = " ".join(str(cut["units"] - cut["dropped"]) for cut in cuts)
    return f"{'/'.join(map(str, sorted(before)))} → by layer: {left}"


def summary_table(report: dict[str, Any], title: str) -> Table:
    """`cut_summary` for a terminal."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in cut_summary(report):
        table.add_row(name, value)
    return table


def measure_rows(models: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of measures, one column a model, the last column the last model against the first.

    Each model is what `cli.evaluate` gathers: name, sizes, bytes, perplexities, speed.
    """
    rows: list[list[str]] = []

    def add(
        name: str, values: Sequence[float], form: str, scale: float = 1.0, note: Sequence[str] | None = None
    ) -> None:
        shown = [form.format(value * scale) + (f" {note[n]}" if note else "") for n, value in enumerate(values)]
        change = [f"×{values[-1] / values[0]:.3f}"] if len(values) > 1 and values[0] else []
        rows.append([name, *shown, *change])

    add("parameters", [m["sizes"]["parameters"] for m in models], "{:.2f} M", 1e-6)
    add("decoder parameters", [m["sizes"]["decoder_parameters"] for m in models], "{:.2f} M", 1e-6)
    if all(m.get("disk_bytes") for m in models):
        add("size on disk", [m["disk_bytes"] for m in models], "{:.1f} MB", 1e-6)
    for n, first in enumerate(models[0]["perplexities"]):
        values = [m["perplexities"][n] for m in models]
        notes = ["" if (error := value["standard_error"]) is None else f"± {error:.2f}" for value in values]
        name = f"perplexity on {first['text']} ({first['tokens']:,} tokens, windows of {first['seq_len']})"
        add(name, [value["perplexity"] for value in values], "{:.2f}", 1.0, notes)
    for key, name in (("prefill", "prefill tokens/s"), ("decode", "decode tokens/s")):
        speeds = [m["speed"] for m in models]
        notes = ["({:.0f}-{:.0f})".format(*speed[f"{key}_range"]) for speed in speeds]
        shown = f"{name} ({speeds[0]['prompt_tokens']}-token prompt)" if key == "prefill" else name
        add(shown, [speed[key] for speed in speeds], "{:.0f}", 1.0, notes)
    add("weights in memory", [m["memory"]["weights_bytes"] for m in models], "{:.0f} MiB", 2**-20)
    add("peak memory of a prefill", [m["memory"]["peak_bytes"] for m in models], "{:.0f} MiB", 2**-20)
    return rows


def measure_table(models: Sequence[dict[str, Any]], title: str) -> Table:
    """`measure_rows` for a terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for model in models:
        table.add_column(model["name"], justify="right")
    if len(models) > 1:
        table.add_column("ratio", justify="right")
    for row in measure_rows(models):
        table.add_row(*row)
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
    """README.md of an output folder."""
    recipe = report["recipe"]
    settings = " ".join(
        f"--{key.replace('_', '-')} {_flag(value)}"
        for key, value in recipe.items()
        if key in CARD_FLAGS and value is not None
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in cut_summary(report))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [billhook, pruned, {recipe["method"]}]
---
# {report["parent"]}, pruned by billhook

{CARD_LAYOUT[report["layout"]].format(report["model_type"])}, pruned without training by {recipe["method"]} ({report["paper"]}).

| | |
|---|---|
{rows}

Made by `billhook prune {report["parent"]} {settings} -o OUT` ({versions}).
`billhook.json` holds the whole recipe, hashes of the calibration text, and every layer's numbers.
The licence is that of the parent model.
"""


CARD_LAYOUT = {
    "uniform": "A stock `{}` checkpoint",
    "per_layer": "A `{}` checkpoint whose layers differ in size: load it with `billhook.load(path)`, or with transformers "
    "and `trust_remote_code=True`",
}
CARD_FLAGS = (
    *("method", "ratio", "params", "memory", "speedup", "layout", "allocation", "axes", "score", "stream", "damping"),
    *("correction", "calibration", "samples", "seq_len", "seed", "multiple_of"),
)


def _jsonable(value: Any) -> Any:
    """The same value with null for what JSON has no number for: a broken model's perplexity may be infinite."""
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flag(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
