"""The command lines that make a result again, from its record."""

import shlex
from functools import partial
from typing import Any


def commands(report: dict[str, Any]) -> list[str]:
    """The command lines that make the same model: the cut, if billhook made it, every training after it, fewer bits."""
    recoveries, few = report.get("recovery") or [], report.get("quantized")
    cuts = [str(report["command"])] if report.get("command") else []
    steps = []
    for recovery in recoveries:
        before = recovery.get("quantized")
        steps += [*([partial(quantize_command, before)] if before else []), partial(recover_command, recovery)]
    steps += [partial(quantize_command, few)] if few else []
    outs = ["OUT", *[f"OUT{n}" for n in range(2, len(steps) + 2)]]
    if not cuts:
        outs = [str(recoveries[0]["student"] if recoveries else (few or {}).get("parent")), *outs]
    return [*cuts, *[step(*outs[n : n + 2]) for n, step in enumerate(steps)]]


def quantize_command(few: dict[str, Any], source: str = "OUT", out: str = "OUT2") -> str:
    """The command line that gives a checkpoint `source` as few bits."""
    reads = few["method"] == "gptq" or few.get("memory")
    settings = [
        f"--{key.replace('_', '-')} {shlex.quote(str(few[key]))}"
        for key in QUANTIZE_FLAGS
        if few.get(key) not in (None, "") and (reads or key not in TEXT_FLAGS)
    ]
    return f"billhook quantize {shlex.quote(source)} {' '.join(settings)} -o {out}"


def recover_command(recovery: dict[str, Any], student: str = "OUT", out: str = "OUT2") -> str:
    """The command line that trains a checkpoint `student` the same way."""
    values = {**recovery, "text": recovery["texts"], "states": "on" if recovery["states"] else "off"}
    values["tokens"] += (recovery.get("choosing") or {}).get("tokens", 0)
    distils = recovery["objective"] != "ce"
    settings = [
        f"--{key.replace('_', '-')} {shlex.quote(str(value))}"
        for key in RECOVER_FLAGS
        if distils or key not in TEACHER_FLAGS
        for value in (values[key] if isinstance(values.get(key), list) else [values.get(key)])
        if value is not None
    ]
    if (keep := recovery.get("keep_zeros")) is not None:
        settings.append("--keep-zeros" if keep else "--no-keep-zeros")
    settings += ["--no-merge"] if recovery.get("merge") is False else []
    settings += ["--dropout"] if recovery.get("dropout") else []
    processes = recovery.get("processes") or 1
    program = f"accelerate launch --num_processes {processes} -m billhook" if processes > 1 else "billhook"
    return f"{program} recover {shlex.quote(student)} {' '.join(settings)} -o {out}"


RECOVER_FLAGS = (
    *("teacher", "objective", "states", "trainable", "rank", "tokens", "text", "mixture", "keep_data", "held_out"),
    *("seq_len", "batch_tokens", "lr", "warmup", "top_k", "pattern", "masks", "mask_score", "mask_decay", "bits"),
    *("scales", "contrast", "loftq", "precision", "family_row", "seed"),
)
TEACHER_FLAGS = ("teacher", "states", "top_k", "contrast")  # flags without effect where there is no teacher
TEXT_FLAGS = ("stream", "calibration", "samples", "probes", "seq_len", "seed")  # without effect where no text is read
QUANTIZE_FLAGS = ("bits", "memory", "allocation", "format", "method", "embedding", *TEXT_FLAGS)
