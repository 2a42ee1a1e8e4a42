"""README.md of a checkpoint: the model card."""

import re
from collections.abc import Sequence
from typing import Any

from billhook.reports import tables
from billhook.reports.commands import commands
from billhook.reports.cut_tables import cut_rows
from billhook.reports.quantized import method_words, quantized_rows
from billhook.reports.recovery_tables import recovered_words


def model_card(report: dict[str, Any]) -> str:
    """README.md of an output folder: of a pruned model, a pruned and trained one, or one that was only trained."""
    recipe, recoveries = report.get("recipe"), report.get("recovery") or []
    quantized = report.get("quantized")
    parent = tables.plain(str(report.get("parent") or recoveries[-1]["student"]))
    told = [*cut_rows(report), *(quantized_rows(quantized) if quantized else [])]
    rows = "\n".join(f"| {tables.plain(name)} | {tables.plain(value)} |" for name, value in told)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    done, story, tags = [], [], ["billhook"]
    if recipe:
        training = "" if recoveries or report.get("refined") else " without training"
        done, tags = ["pruned"], [*tags, "pruned", recipe["method"]]
        story = [f"pruned{training} by {recipe['method']} ({report.get('paper') or 'no paper'})"]
    if recoveries:
        done, tags = [*done, "recovered"], [*tags, "recovered"]
        story += [f"trained by {tables.plain(recovered_words(recovery))}" for recovery in recoveries]
    if quantized:
        done, tags = [*done, "quantised"], [*tags, "quantized", *quantized["containers"]]
        story.append(f"given {quantized['bits_per_weight']:.2f} bits a weight by {method_words(quantized)}")
    file_alone = bool(quantized) and list(quantized["containers"]) == ["gguf"]
    adapter = report.get("adapter")
    kind = "adapter" if adapter else "gguf" if file_alone else report.get("layout") or "unknown"
    layout = CARD_LAYOUT[kind].format(report.get("model_type") or "transformers")
    library = "peft" if adapter else "gguf" if file_alone else "transformers"
    command_lines = "`, then `".join(commands(report))
    return f"""---
library_name: {library}
pipeline_tag: {report.get("pipeline_tag") or "text-generation"}
tags: [{", ".join(tags)}]
{_of_parent(report)}---
# {parent}, {" and ".join(done)} by billhook

{layout}, {", then ".join(story)}.

| | |
|---|---|
{rows}

{_beside(adapter)}Made by `{command_lines}` ({versions}).
`billhook.json` holds {_holds(recipe, recoveries)}.
The licence is that of the parent model.
"""


def _beside(adapter: dict[str, Any] | None) -> str:
    """How llama.cpp loads the adapter, where a GGUF of it lies beside it."""
    file = (adapter or {}).get("gguf")
    return f"For llama.cpp: `-m GGUF_OF_THE_BASE --lora {file}`.\n\n" if file else ""


def _of_parent(report: dict[str, Any]) -> str:
    """What the hub reads of the parent: its repository, where it has one, and its licence, where its card says it."""
    parent, licence = str(report.get("parent") or ""), report.get("license")
    parent = HUB.get(parent, parent)
    lines = [f"base_model: {parent}\n"] if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", parent) else []
    return "".join([*lines, f"license: {licence}\n" if licence else ""])


def _holds(recipe: Any, recoveries: Sequence[Any]) -> str:
    """What a reader finds in billhook.json."""
    if not recoveries:
        return "the whole recipe, hashes of the calibration text, and every layer's numbers"
    recipes = "the whole recipe, every layer's numbers, " if recipe else ""
    return f"{recipes}the settings of the training, hashes of the texts, and every judgement"


HUB = {"demo": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # repositories of models that have another name here
CARD_LAYOUT = {
    "unknown": "A `{}` checkpoint",
    "adapter": "A PEFT adapter of a `{}` checkpoint, which `adapter_config.json` names and peft loads it on",
    "gguf": "A `{}` model in a GGUF file, for llama.cpp",
    "uniform": "A stock `{}` checkpoint",
    "per_layer": "A `{}` checkpoint whose layers differ in size: load it with `billhook.load(path)`, or with "
    "transformers or vLLM and `trust_remote_code=True`",
}
