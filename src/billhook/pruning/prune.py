"""Prune a model by a recipe: open, draw, plan, carry out, prove."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from billhook import data
from billhook.checkpoints import load, shards
from billhook.checkpoints.load import Opened
from billhook.checkpoints.result import Result
from billhook.checkpoints.resume import FinishedLayers, FinishedTogether
from billhook.errors import BillhookError, SettingsError
from billhook.evaluation.look import Look, compared, look
from billhook.models import given, layout, sizes, vocabulary
from billhook.models.experts import fuse, unfuse
from billhook.models.families import check_known, layers, row_of
from billhook.models.modes import evaluation_mode
from billhook.models.multimodal import type_of
from billhook.models.surgery import cast
from billhook.planning.command import DEFAULT, command
from billhook.planning.method import Method, MethodSettings, Planned
from billhook.planning.recipe import Recipe
from billhook.planning.texts import Texts
from billhook.pruning import preflight
from billhook.pruning.recipe import recipe
from billhook.reports import records
from billhook.runtime import cache, offload, run_folder
from billhook.runtime.cache import Grams
from billhook.runtime.means import MEANS, Means
from billhook.runtime.memory import peak_growth
from billhook.runtime.run import Finished, Run

SAMPLE = 2**20  # characters of the calibration text by which a cut vocabulary is judged
VOCABULARY_STEP = 64  # rows of an embedding: what kernels and tensor parallelism like


def prune(
    model: Any,
    chosen: Recipe | None = None,
    *,
    method: str | Method | MethodSettings = DEFAULT["prune"],
    tokenizer: Any = None,
    stream_weights: bool | None = False,
    **settings: Any,
) -> Result:
    """Prune a model by a recipe: `billhook.prune`, without its progress bars, and with errors that name options."""
    run = Means(**{name: settings.pop(name) for name in MEANS if name in settings}).run
    if chosen is None:
        chosen = recipe(method, **settings)
    elif settings or method != DEFAULT["prune"]:
        raise SettingsError("a recipe says all settings: give none besides it")
    if run.workers.many:
        preflight.check_shared(chosen, run.workers)
    if run.peers.count > 1:
        preflight.check_together(chosen, run)
    cache.check_folder(run.statistics, "--statistics")
    opened = _opened(model, tokenizer, chosen, stream_weights, run)
    run = _placed(opened, chosen, run)
    with evaluation_mode(opened.model), run_folder.locked(run.folder if run.peers.first else None):
        return prune_opened(opened, chosen, run)


def prune_opened(opened: Opened, chosen: Recipe, run: Run) -> Result:
    """Prune a model that is already loaded, in place."""
    model, method = opened.model, chosen.method
    counted, total = sizes.parameters(model), len(layers(model))
    method.check(opened, chosen)
    text = _text(opened, chosen, run)
    trimmed = _trim(opened, chosen, text, run)
    texts = method.draw(opened, chosen, text, run)  # by the tokenizer that a cut vocabulary leaves
    before = _look(opened, chosen, run)
    with peak_growth(model.device) as growth:
        planned = method.plan(opened, chosen, texts, run)
        run.announce(method.announcement(opened, chosen, planned, texts))
        carried = method.carry_out(model, texts, planned, _keeping(opened, chosen, texts, planned, run))
    seen = _compared(before, _look(opened, chosen, run), run)
    finish(model, chosen, opened.dtype)
    gone = planned.plan.layers
    report = {
        "recipe": chosen.flat() | {"axes": list(chosen.kinds), "multiple_of": chosen.shape.width_step},
        "command": command(chosen, opened.name),
        "parent": opened.name,
        "model_type": type_of(model),
        "layout": layout.layout_of(model),
        "paper": method.paper,
        "sizes": sizes.sizes(counted, sizes.parameters(model), chosen.words),
        "calibration": texts.record(chosen.calibration.seq_len),
        "vocabulary": trimmed,
        "selection": None,
        "search": None,
        "zeros": None,
        "residual": None,
        "dropped_layers": list(gone),
        "kept_layers": [n for n in range(total) if n not in gone],
        **planned.record,
        **carried,
        "cuts": [asdict(cut) for cut in carried.get("cuts", ())],
        "look": seen,
        "seconds": {stage: round(s, 3) for stage, s in run.clock.seconds.items()},
        "peak_growth_bytes": growth(),
        "versions": records.versions(),
    }
    kept = run.folder if run.folder is not None and (run.folder / run_folder.NAME).exists() else None
    return Result(model, opened.tokenizer, report, opened.folder, trimmed=trimmed is not None, kept=kept)


def _opened(model: Any, tokenizer: Any, chosen: Recipe, stream_weights: bool | None, run: Run) -> Opened:
    """The model, loaded; or as it is in memory, if that is one that can be pruned."""
    if isinstance(model, str | os.PathLike):
        why = preflight.why_whole(chosen)
        if stream_weights and why:
            raise BillhookError(f"--stream-weights: {why}")
        stream = None if stream_weights is None and not why else bool(stream_weights)
        on: dict[str, Any] = chosen.compute.model_dump(include={"device", "dtype", "family_row"})
        on |= {"device": run.peers.device} if run.peers.count > 1 else {}  # of several accelerators its own
        return load.open_model(os.fspath(model), **on, stream=stream, tick=run.tick)
    if run.workers.many:
        raise BillhookError(
            f"{run.workers.flag}: other processes cannot see a model in memory: prune from a folder, or use one"
        )
    if tokenizer is None:
        raise BillhookError("a model in memory needs its tokenizer: prune(model, tokenizer=…)")
    opened = Opened(model, tokenizer, model.config._name_or_path or type(model).__name__, None, model.dtype)
    if chosen.compute.family_row:
        given.use(chosen.compute.family_row)
    content = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    if load.check_config(content, opened.name) is not content:
        raise BillhookError(f"{opened.name} is multimodal: give its folder, whose other parts go along")
    unfuse(model)
    check_known(model)
    return opened


def _placed(opened: Opened, chosen: Recipe, run: Run) -> Run:
    """The run with what it needs to know of the model:
    workers open it by name, layers of one in memory are not kept."""
    name = _absolute(opened.name) if Path(opened.name).exists() else opened.name
    opens = {"name": name, "dtype": chosen.compute.dtype, "family_row": _absolute(chosen.compute.family_row)}
    run = replace(run, workers=replace(run.workers, **opens))
    if run.folder is None or chosen.method.searches(chosen):
        return run
    if opened.folder is None:
        return replace(run, folder=None)
    preflight.check_room(opened, chosen, run.folder)
    return run


def _absolute(file: str) -> str:
    return os.path.abspath(file) if file else ""


def _keeping(opened: Opened, chosen: Recipe, texts: Texts, planned: Planned, run: Run) -> Run:
    """The run with what was finished of this very prune:
    the same settings, model, text, plan (which may come of timings) and code.

    With it the Grams in `statistics` of this model and text, which the dense stream takes and leaves there.
    """
    model, folder = opened.model, None if chosen.method.searches(chosen) else run.folder
    if folder is not None:
        assert opened.folder is not None
        key = {
            "settings": chosen.flat(),
            "model": shards.digest(opened.folder),
            "calibration text": texts.windows.sha256,
            "plan": repr(planned.plan),
            "row": repr(row_of(model)),
            "version of billhook": cache.code_sha256(),
        }
        if run.peers.first:
            run_folder.claim(folder, key, run.fresh)
            offload.set_swap_folder(model, folder / run_folder.SWAP_FOLDER)
        run.peers.wait()
    grams = None
    if run.statistics and getattr(planned.settings, "stream", "") == "dense":
        seen = hashlib.sha256(texts.calibration.numpy().tobytes()).hexdigest()
        decides = cache.model_key(model) | {"tokens": seen, "windows": len(texts.calibration)}
        decides |= {"computed in": str(model.dtype), "on": model.device.type}
        grams = Grams(run.statistics.absolute(), decides)
    if folder is None:
        return replace(run, finished=Finished(grams))
    finished = (FinishedLayers if run.peers.first else FinishedTogether)(folder, model, grams)
    run.peers.wait()  # the first one soon adds to the folder
    return replace(run, finished=finished)


def _look(opened: Opened, chosen: Recipe, run: Run) -> Look | None:
    """A look at the model as it is; none where its weights are streamed: to write texts takes many passes."""
    if not chosen.compute.look or offload.is_offloaded(opened.model) or not run.peers.first:
        return None
    run.tick("looking at what it writes", 0, 1)
    with run.clock("look"):
        seen = look(opened.model, opened.tokenizer)
    run.tick("looking at what it writes", 1, 1)
    return seen


def _compared(before: Look | None, after: Look | None, run: Run) -> Mapping[str, Any] | None:
    """Both looks side by side; says so where the model degenerates."""
    if before is None or after is None:
        return None
    seen = compared(before, after)
    if seen["warning"]:
        run.announce(f"warning: the pruned model {seen['warning']}")
    return seen


def finish(model: Any, chosen: Recipe, dtype: torch.dtype) -> None:
    """Make a cut model what will be stored:
    its experts together, its config says its sizes, its numbers are of `dtype`."""
    fuse(model)
    if chosen.shape.layout == "uniform":
        layout.update_config(model)
    cast(model, dtype)


def _text(opened: Opened, chosen: Recipe, run: Run) -> data.Text:
    if not chosen.reads:
        return data.Text("", "")
    load.check_positions(opened, chosen.calibration.seq_len)
    return data.calibration_text(chosen.calibration.source, run.tick)


def _trim(opened: Opened, chosen: Recipe, text: data.Text, run: Run) -> Mapping[str, Any] | None:
    """Cut the vocabulary down to the texts that the recipe names, if it names any; what it did."""
    sources = chosen.budget.vocab_from
    if not sources:
        return None
    documents, original = [data.calibration_text(source, run.tick).text for source in sources], opened.tokenizer
    least = chosen.budget.vocab_size
    opened.tokenizer, cut = vocabulary.trim(
        opened.model, original, documents, run.tick, at_least=least, multiple_of=VOCABULARY_STEP
    )
    sample = [text.text[:SAMPLE]]
    return {
        **cut,
        "sources": list(sources),
        "calibration_grows": vocabulary.growth(original, opened.tokenizer, sample),
        "calibration_as_bytes": vocabulary.share_as_bytes(original, opened.tokenizer, sample),
    }
