"""The command lines that make a result again, from its record."""

import shlex
from typing import Any


def commands(report: dict[str, Any]) -> list[str]:
    """The command lines that make the same model: the cut, if billhook made it, and every training after it."""
    recoveries = report.get("recovery") or []
    cuts = [str(report["command"])] if report.get("command") else []
    outs = ["OUT", *[f"OUT{n}" for n in range(2, len(recoveries) + 2)]]
    outs = outs if cuts or not recoveries else [str(recoveries[0]["student"]), *outs]
    return [*cuts, *[recover_command(recovery, *outs[n : n + 2]) for n, recovery in enumerate(recoveries)]]


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


RECOVER_FLAGS = (
    *("teacher", "objective", "states", "trainable", "rank", "tokens", "text", "held_out", "seq_len"),
    *("batch_tokens", "lr", "warmup", "top_k", "precision", "seed"),
)
TEACHER_FLAGS = ("teacher", "states", "top_k")  # flags without effect where there is no teacher
