"""Prune and train in one run: the cut goes into a folder of the run, and is trained there against the unpruned model.

Distillation of the decoder, as `billhook recover` does it by default.  The folder keeps both stages: after a
kill the same call goes on in the one that it was in.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from billhook.checkpoints import load
from billhook.checkpoints.result import Result
from billhook.errors import SettingsError
from billhook.evaluation.look import compared, look
from billhook.planning.recipe import Recipe
from billhook.pruning.prune import prune
from billhook.recovery.recover import recover
from billhook.recovery.setup import files_of
from billhook.runtime import cache, run_folder
from billhook.runtime.means import Means

RATE = 1e-4  # 3e-4 stirs up more than a few minutes settle (docs/log/auto.md); trials would take minutes of the budget
CUT, PRUNE, TRAINING = "cut", "prune", "recovery"  # folders of the run


def prune_and_recover(model: str, chosen: Recipe, minutes: float | int, work: Path, **given: Any) -> Result:
    """A pruned model, trained for some minutes on the text that it was calibrated on.

    Args:
        minutes: how long the training may take, the unpruned model's answers included; the prune comes before.
        work: the folder of this run.
        given: fields of `Means`, and stream_weights, as of `billhook.pruning.prune.prune`.

    Returns:
        the trained model with the reports of both.

    Raises:
        BillhookError: as `prune` and `recover`; zeros, which training would fill, are not for this.
    """
    if chosen.method.zeros:
        raise SettingsError(
            f"--recover-minutes trains what was cut, and {chosen.method.name} makes zeros: use billhook recover"
        )
    if minutes <= 0:
        raise SettingsError("--recover-minutes: give more than 0")
    run = Means(**{name: value for name, value in given.items() if name in Means.__dataclass_fields__}).run
    with run_folder.locked(work):
        # not the minutes: where they were too few, the cut is kept
        key = {"settings": chosen.flat(), "model's files": files_of(model, run.tick)}
        run_folder.claim(work, {**key, "version of billhook": cache.code_sha256()}, run.fresh)
        given = {**given, "fresh": False}
        if not (work / CUT).exists():
            unseen = replace(chosen, compute=chosen.compute.model_copy(update={"look": False}))
            prune(model, unseen, **{**given, "work": work / PRUNE}).save(work / CUT)
        how = {"teacher": model, "minutes": minutes, "lr": RATE, "seq_len": chosen.calibration.seq_len}
        how |= {"text": (chosen.calibration.source,), "seed": chosen.calibration.seed}
        how["held_out"] = ("reference",)  # another kind of text than most, there without a connection
        result = recover(
            work / CUT, work=work / TRAINING, tick=run.tick, announce=run.announce, device=chosen.compute.device, **how
        )
    result.healing["student"] = f"{model}, pruned"
    result.record["look"] = _looked(model, result, run.announce) if chosen.compute.look else None
    return result


def _looked(model: str, result: Result, announce: Any) -> dict[str, Any] | None:
    """The unpruned model and the trained one, side by side."""
    if result.trimmed or result.record.get("vocabulary"):
        return None  # they read other tokens
    opened = load.open_model(model, device="cpu", dtype=str(result.model.dtype).removeprefix("torch."))  # both alike
    before = look(opened.model, opened.tokenizer)
    del opened
    seen = compared(before, look(result.model, result.tokenizer))
    if seen["warning"]:
        announce(f"warning: the model {seen['warning']}")
    return seen
