"""Prune a model by a recipe, and prove what was written."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from billhook import data
from billhook.checkpoints import load, shards
from billhook.checkpoints.load import Opened
from billhook.checkpoints.resume import FinishedLayers
from billhook.cuts import masking, parallel
from billhook.errors import BillhookError
from billhook.evaluation import perplexity
from billhook.methods import METHODS
from billhook.models import layout, sizes, vocabulary
from billhook.models.experts import fuse, fused, unfuse
from billhook.models.families import check_known, layers
from billhook.models.modes import evaluation_mode
from billhook.models.plan import Plan
from billhook.models.surgery import cast
from billhook.pruning import method_settings, plan_lines, planning, preflight, residual_budget
from billhook.pruning.carry_out import CUTS
from billhook.pruning.recipe import Recipe, recipe
from billhook.pruning.result import Result
from billhook.pruning.texts import Texts, draw, needs_text
from billhook.recovery.candidates import rank_after_training
from billhook.reports import records
from billhook.runtime import cache, offload, run_folder, units
from billhook.runtime.activations import Room
from billhook.runtime.cache import Grams
from billhook.runtime.memory import peak_growth
from billhook.runtime.progress import Clock, Tick, quiet, unheard
from billhook.runtime.run import Finished, Run
from billhook.runtime.workers import Workers
from billhook.search import adapruner, optishear
from billhook.search.inputs import read_inputs, read_texts
from billhook.tensors import Tokens
from billhook.training.text_windows import read

SAMPLE = 2**20  # characters of the calibration text by which a cut vocabulary is judged
VOCABULARY_STEP = 64  # rows of an embedding: what kernels and tensor parallelism like


def prune(  # noqa: PLR0913
    model: Any,
    *,
    tokenizer: Any = None,
    statistics: str | os.PathLike[str] | None = None,
    tick: Tick = quiet,
    announce: Callable[[str], object] = unheard,
    study: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    jobs: int = 1,
    ray: str = "",
    stream_weights: bool | None = False,
    hidden_budget: int | str | None = None,
    work: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Result:
    """Prune a model by a recipe.

    Args:
        model: a folder, a hub id, a .gguf file, `demo`, or a transformers model in memory, which is cut in place: without
            its dropout, whatever mode it comes in, and given back in that mode.
        tokenizer: needed with a model in memory.
        statistics: a folder that keeps what an allocation measured, and in the dense stream what a method did (billhook.runtime.cache),
            for another ratio, allocation or method.
        tick: called with (stage, done, total) as the work proceeds.
        announce: called with one line, what will be cut, before anything is.
        study: a folder of this search alone, where the method searches: after a kill the same call goes on.
        fresh: start over in that folder, or in `work`.
        jobs: processes that try candidates, where the method searches, or that share the layers, where none of them sees
            another; each opens the model for itself.
        ray: in their place the address of a Ray cluster (auto: of this machine), whose machines all can open the model.
        stream_weights: leave the weights in their files, one layer at a time in memory; None: where they would not fit.
        hidden_budget: bytes (or `2GB`) of hidden states of the calibration text to keep in memory, the rest in files; None: all.
        work: a folder of this prune alone, where it is done layer by layer: after a kill the same call goes on.
        settings: the fields of `Recipe`: ratio=0.2, method="fasp", axes=("ffn",), calibration="demo", …

    Returns:
        the pruned model in its checkpoint's dtype, with its report.

    Raises:
        BillhookError: anything that cannot work, in one line; a model on disk is never changed.
    """
    chosen = recipe(**settings)
    workers = Workers(jobs, ray, dtype=chosen.dtype)
    if workers.many:
        preflight.check_shared(chosen, workers)
    cache.check_folder(Path(statistics) if statistics else None, "--statistics")
    if isinstance(model, str | os.PathLike):
        if stream_weights and (why := preflight.why_whole(chosen)):
            raise BillhookError(f"--stream-weights: {why}")
        stream = None if stream_weights is None and not preflight.why_whole(chosen) else bool(stream_weights)
        how = {"device": chosen.device, "dtype": chosen.dtype, "stream": stream}
        opened = load.open_model(os.fspath(model), **how, tick=tick)
    else:
        if workers.many:
            raise BillhookError(
                f"{workers.flag}: other processes cannot see a model in memory: prune from a folder, or use one"
            )
        if tokenizer is None:
            raise BillhookError("a model in memory needs its tokenizer: prune(model, tokenizer=…)")
        opened = Opened(model, tokenizer, model.config._name_or_path or type(model).__name__, None, model.dtype)
        load.check_config({**model.config.to_dict(), "architectures": [type(model).__name__]}, opened.name)
        unfuse(model)
        check_known(model)
    name = os.path.abspath(opened.name) if Path(opened.name).exists() else opened.name
    means = Run(folder=Path(study) if study else None, fresh=fresh, workers=replace(workers, name=name))
    journals = work is not None and opened.folder is not None and not (chosen.searches or chosen.shears)
    kept = Path(work) if journals and work is not None else None
    if kept:
        preflight.check_room(opened, chosen, kept)
    hidden = Room(units.amount(hidden_budget, units.BYTES, "hidden-budget"))
    with evaluation_mode(opened.model), run_folder.locked(kept), run_folder.locked(means.folder):
        return prune_opened(opened, chosen, tick, statistics, announce, means, kept, hidden)


def prune_opened(
    opened: Opened,
    chosen: Recipe,
    tick: Tick = quiet,
    statistics: str | os.PathLike[str] | None = None,
    announce: Callable[[str], object] = unheard,
    means: Run | None = None,
    work: Path | None = None,
    hidden: Room | None = None,
) -> Result:
    """Prune a model that is already loaded, in place."""
    model, clock, means = opened.model, Clock(), means or Run()
    folder = Path(statistics) if statistics else None
    run = replace(means, tick=tick, announce=announce, clock=clock, statistics=folder, hidden=hidden or Room())
    before, total = sizes.parameters(model), len(layers(model))
    calibration = data.Text("", "")
    if needs_text(chosen):
        load.check_positions(opened, chosen.seq_len)
        calibration = data.calibration_text(chosen.calibration, tick)
    vocabulary_cut = _trim(opened, chosen, calibration, tick)
    inputs = (
        read_inputs(opened, chosen, tick) if chosen.searches else None
    )  # read by the tokenizer that a cut vocabulary leaves
    search_texts = inputs.texts if inputs else read_texts(opened, chosen, tick) if chosen.shears else None
    calibration = data.joined(search_texts.calibration) if search_texts else calibration
    windows, texts = draw(opened, chosen, calibration)
    with peak_growth(model.device) as growth:
        scores = planning.unit_scores(model, chosen, texts.calibration, clock, tick)
        found = _selected(opened, chosen, windows, texts, folder, run) if chosen.select == "healed" else None
        wanted = chosen.model_copy(update={"preset": found["chosen"]}) if found else chosen
        hunt, zeros, cuts = None, None, []
        if chosen.masks:
            plan, how = Plan(), method_settings.masking_of(chosen)
            masking.check(model, how)
            if search_texts:
                hunt = optishear.search(model, chosen, how, search_texts, texts.calibration, run)
                how = hunt.masking
            finished = _journal(opened, chosen, windows, texts.calibration, plan, work, means.fresh, folder)
            zeros = _masked(model, how, texts.calibration, replace(run, finished=finished))
        else:
            plan = planning.make_plan(model, wanted, texts, opened.dtype, scores, folder, clock, tick)
        if inputs:
            fit = method_settings.settings_of(chosen)
            hunt = adapruner.search(model, chosen, plan, inputs, texts.calibration, fit, run)
            scores, plan = hunt.scores, hunt.plan
        narrowed = residual_budget.record(model, plan)
        if narrowed:
            announce(plan_lines.residual_line(model, plan, chosen.budget))
        elif not chosen.masks:
            announce(plan_lines.plan_line(model, plan, chosen.budget, chosen.patches))
        if plan.kinds or plan.layers or narrowed:
            given = (model, texts.calibration, plan, method_settings.method_settings(chosen))
            finished = _journal(opened, chosen, windows, texts.calibration, plan, work, means.fresh, folder)
            in_workers = means.workers.many and not chosen.searches
            carry_out: Any = parallel.shared if in_workers else CUTS[chosen.method]
            cuts = carry_out(*given, replace(run, finished=finished), scores)
    finish(model, chosen, opened.dtype)
    written = {
        "recipe": chosen.model_dump(mode="json")
        | {"axes": list(chosen.kinds), "multiple_of": chosen.width_step, "damping": chosen.ridge},
        "parent": opened.name,
        "model_type": model.config.model_type,
        "layout": layout.layout_of(model),
        "paper": METHODS[chosen.method].paper,
        "sizes": sizes.sizes(before, sizes.parameters(model), chosen.budget),
        "calibration": {
            "source": windows.source,
            "windows": len(texts.calibration),
            "probes": len(texts.probe),
            "windows_available": windows.available,
            "seq_len": chosen.seq_len,
            "begins_with": list(windows.begins_with),
            "text_sha256": windows.text_sha256,
            "tokens_sha256": windows.sha256,
        },
        "vocabulary": vocabulary_cut,
        "selection": found,
        "search": hunt and hunt.record,
        "zeros": zeros,
        "residual": narrowed,
        "dropped_layers": list(plan.layers),
        "kept_layers": [n for n in range(total) if n not in plan.layers],
        "cuts": [asdict(cut) for cut in cuts],
        "seconds": {stage: round(s, 3) for stage, s in clock.seconds.items()},
        "peak_growth_bytes": growth(),
        "versions": records.versions(),
    }
    kept = work if work is not None and (work / run_folder.NAME).exists() else None
    return Result(model, opened.tokenizer, written, opened.folder, trimmed=vocabulary_cut is not None, kept=kept)


def _journal(
    opened: Opened,
    chosen: Recipe,
    windows: data.Windows,
    tokens: Tokens,
    plan: Plan,
    work: Path | None,
    fresh: bool,
    statistics: Path | None,
) -> Finished:
    """What was finished of this very prune: the same settings, model, text, plan (which may come of timings) and code.

    With it the Grams in `statistics` of this model and text, which the dense stream takes and leaves there.
    """
    if work is not None:
        assert opened.folder is not None
        run_folder.claim(
            work,
            {
                "settings": chosen.model_dump(mode="json"),
                "model": shards.digest(opened.folder),
                "calibration text": windows.sha256,
                "plan": repr(plan),
                "version of billhook": cache.code_sha256(),
            },
            fresh,
        )
        offload.set_swap_folder(opened.model, work / run_folder.SWAP_FOLDER)
    grams = None
    if statistics and chosen.stream == "dense":
        model, seen = opened.model, hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        key = cache.model_key(model) | {"tokens": seen, "windows": len(tokens)}
        grams = Grams(statistics.absolute(), key | {"computed in": str(model.dtype), "on": model.device.type})
    return FinishedLayers(work, opened.model, grams) if work else Finished(grams)


def _masked(model: Any, how: masking.Masking, tokens: Tokens, run: Run) -> dict[str, Any]:
    """Make zeros in place; what was asked for and what came of it."""
    zeros, weights = masking.zeros_in(model, how.targets)
    run.announce(masking.words(how, zeros, weights, tokens.numel(), model))
    done = masking.mask(model, tokens, how, run)
    return masking.record(how, done, zeros / weights)


def _selected(
    opened: Opened,
    chosen: Recipe,
    windows: data.Windows,
    texts: Texts,
    folder: Path | None,
    run: Run,
) -> dict[str, Any]:
    """The candidates, each cut and trained for a while, and which is best."""
    learned = read((chosen.calibration,), chosen.held_out, opened.tokenizer, chosen.seq_len, chosen.seed, run.tick)
    plans = {}
    for name in chosen.candidates:
        one = chosen.model_copy(update={"preset": name})
        plans[name] = planning.make_plan(opened.model, one, texts, opened.dtype, statistics=folder, tick=run.tick)

    settings, unseen = method_settings.method_settings(chosen), Run(hidden=run.hidden)

    def cut(model: Any, gone: Sequence[int]) -> None:
        CUTS[chosen.method](model, texts.calibration, Plan(layers=tuple(gone)), settings, unseen)

    with run.clock("healing candidates"):
        return rank_after_training(
            opened.model,
            {name: plan.layers for name, plan in plans.items()},
            cut,
            learned,
            chosen.heal_tokens,
            key={"method": chosen.method, **asdict(settings), "calibrated on": windows.sha256},
            folder=folder,
            seed=chosen.seed,
            tick=run.tick,
        ).record()


def finish(model: Any, chosen: Recipe, dtype: torch.dtype) -> None:
    """Make a cut model what will be stored: its experts together, its config says its sizes, its numbers are of `dtype`."""
    fuse(model)
    if chosen.layout == "uniform":
        layout.update_config(model)
    cast(model, dtype)


def _trim(opened: Opened, chosen: Recipe, calibration: data.Text, tick: Tick) -> dict[str, Any] | None:
    """Cut the vocabulary down to the texts that the recipe names, if it names any; what it did."""
    if not chosen.vocab_from:
        return None
    documents, original = [data.calibration_text(source, tick).text for source in chosen.vocab_from], opened.tokenizer
    opened.tokenizer, cut = vocabulary.trim(
        opened.model, original, documents, tick, at_least=chosen.vocab_size, multiple_of=VOCABULARY_STEP
    )
    sample = [calibration.text[:SAMPLE]]
    return {
        **cut,
        "sources": list(chosen.vocab_from),
        "calibration_grows": vocabulary.growth(original, opened.tokenizer, sample),
        "calibration_as_bytes": vocabulary.share_as_bytes(original, opened.tokenizer, sample),
    }


def measure(path: Path, chosen: Recipe, tick: Tick = quiet) -> dict[str, float]:
    """The numbers a recipe file may expect: parameters, and perplexity on the demo's evaluation texts."""
    opened = load.open_model(str(path), device=chosen.device, dtype=chosen.dtype, tick=tick)
    found: dict[str, float] = {"parameters": sizes.total_parameters(opened.model)}
    with fused(opened.model):
        for text in data.evaluation_texts(["demo"], tick):
            windows = data.windows(text, opened.tokenizer, chosen.seq_len)
            found[f"perplexity on {text.name}"] = perplexity.perplexity(opened.model, windows, tick).perplexity
    return found
