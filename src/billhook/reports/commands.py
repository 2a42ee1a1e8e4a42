"""The command line that makes a result again, from its record."""

import shlex
from typing import Any


def commands(report: dict[str, Any]) -> list[str]:
    """The command lines that make the same model: the cut, if billhook made it, and every training after it."""
    recoveries = report.get("recovery") or []
    cuts = [command(report)] if report.get("recipe") else []
    outs = ["OUT", *[f"OUT{n}" for n in range(2, len(recoveries) + 2)]]
    outs = outs if cuts or not recoveries else [str(recoveries[0]["student"]), *outs]
    return [*cuts, *[recover_command(recovery, *outs[n : n + 2]) for n, recovery in enumerate(recoveries)]]


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
    values = {**recipe, "layer_sparsity": ",".join(f"{n}:{share:g}" for n, share in shares.items())}
    settings = [
        f"--{key.replace('_', '-')} {_flag(values[key])}"
        for key in ZEROS_FLAGS
        if values.get(key) not in (None, "", [])
    ]
    published = recipe["method"] == "fistapruner"  # its paper's setting is the default, so that both are said
    switched = {key: bool(recipe.get(key)) for key in ("refit", "normalised")}
    switches = [f"--{'' if on else 'no-'}{key}" for key, on in switched.items() if on or published]
    switches += [] if recipe.get("keep_zeros", True) else ["--no-keep-zeros"]
    return f"billhook prune {parent} {' '.join([*settings, *switches])} -o OUT"


def _search_command(parent: str, recipe: dict[str, Any]) -> str:
    values = {**recipe, "calibration": recipe.get("calibration", "").split("+")}
    values |= {key: ",".join(recipe.get(key, ())) for key in ("axes", "targets")}
    idle = UNIT_SEARCH if recipe["method"] == "optishear" else ()
    settings = " ".join(
        f"--{key.replace('_', '-')} {shlex.quote(str(value))}"
        for key in SEARCH_FLAGS
        if key not in idle
        for value in (values[key] if isinstance(values.get(key), list) else [values.get(key)])
        if value not in (None, "")
    )
    return f"billhook search {parent} {settings}{'' if recipe.get('restoration', True) else ' --no-restoration'} -o OUT"


def recover_command(recovery: dict[str, Any], student: str = "OUT", out: str = "OUT2") -> str:
    """The command line that trains a checkpoint `student` the same way."""
    values = {**recovery, "text": recovery["texts"], "states": "on" if recovery["states"] else "off"}
    distils = recovery["objective"] == "distill"
    settings = [
        f"--{key.replace('_', '-')} {shlex.quote(str(value))}"
        for key in RECOVER_FLAGS
        if distils or key not in TEACHER_FLAGS
        for value in (values[key] if isinstance(values.get(key), list) else [values.get(key)])
        if value is not None
    ]
    if (keep := recovery.get("keep_zeros")) is not None:
        settings.append("--keep-zeros" if keep else "--no-keep-zeros")
    settings += ["--dropout"] if recovery.get("dropout") else []
    processes = recovery.get("processes") or 1
    program = f"accelerate launch --num_processes {processes} -m billhook" if processes > 1 else "billhook"
    return f"{program} recover {shlex.quote(student)} {' '.join(settings)} -o {out}"


HEAL_FLAGS = ("select", "candidates", "heal_tokens", "held_out")
LAYER_FLAGS = ("preset", "drop", "keep", "layers", "patch", *HEAL_FLAGS)
PATCH_FLAGS = ("damping", "correction")
SCORE_FLAGS = ("allocation", "axes", "score", "stream")  # flags without effect where no axis of a layer is cut
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
    *("method", "ratio", "params", "sparsity", "pattern", "targets", "trials", "minutes"),
    *("space", "sampler", "objective", "calibration", "validation", "pool", "pool_len"),
    *("clusters", "axes", "layout", "multiple_of", "samples", "seq_len", "seed"),
)
# flags without effect where a search is for zeros
UNIT_SEARCH = ("pool", "pool_len", "clusters", "axes", "layout", "multiple_of")
RECOVER_FLAGS = (
    *("teacher", "objective", "states", "trainable", "rank", "tokens", "text", "held_out", "seq_len"),
    *("batch_tokens", "lr", "warmup", "top_k", "precision", "seed"),
)
TEACHER_FLAGS = ("teacher", "states", "top_k")  # flags without effect where there is no teacher


def _flag(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
