"""billhook in Python: every command as a function, with progress bars in a terminal or notebook unless `quiet`.

What cannot work raises a BillhookError of one line, which names arguments where the command line names options.
"""

import functools
import os
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from billhook import data
from billhook.checkpoints import export as exporting
from billhook.checkpoints import load as loading
from billhook.checkpoints.clients import check as clients
from billhook.checkpoints.formats import Wanted as Export
from billhook.checkpoints.result import Result
from billhook.choices import MEASURING_SECONDS
from billhook.cli.console import progress
from billhook.errors import BillhookError
from billhook.evaluation import side_by_side
from billhook.methods import METHODS
from billhook.models import layout, limits
from billhook.planning.command import DEFAULT
from billhook.planning.few_bits import Wanted
from billhook.planning.method import Method, MethodSettings
from billhook.planning.recipe import Recipe
from billhook.pruning import compare as comparing
from billhook.pruning import prune as pruning
from billhook.pruning import quantize as quantizing
from billhook.pruning.contenders import contender, settled
from billhook.recovery import forecast as forecasting
from billhook.recovery import recover as recovering
from billhook.results import Anatomy, Checked, Exported, Forecast, Measured, Point, QuantizedModel
from billhook.runtime import atomic
from billhook.runtime.outputs import check_out
from billhook.runtime.progress import Tick
from billhook.runtime.progress import quiet as silent
from billhook.runtime.run import Run
from billhook.runtime.units import BYTES, amount

Given = ParamSpec("Given")
Made = TypeVar("Made")
FLAG = re.compile(r"--([a-z][a-z0-9-]*)")


def for_python(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """The function with errors that name arguments."""

    @functools.wraps(function)
    def named(*given: Given.args, **more: Given.kwargs) -> Made:
        try:
            return function(*given, **more)
        except BillhookError as error:
            text = FLAG.sub(lambda flag: flag[1].replace("-", "_"), str(error))
            raise type(error)(text) from error.__cause__

    return named


@contextmanager
def bars(quiet: bool) -> Generator[Tick, None, None]:
    """Progress bars, unless there are to be none."""
    if quiet:
        yield silent
        return
    with progress() as tick:
        yield tick


@for_python
def prune(
    model: Any,
    recipe: Recipe | None = None,
    *,
    method: str | Method | MethodSettings = DEFAULT["prune"],
    tokenizer: Any = None,
    quiet: bool = False,
    **settings: Any,
) -> Result:
    """Prune a model by a recipe.

    Args:
        model: a folder, a hub id, a .gguf file, `demo`, or a transformers model in memory, which is cut in place:
            without its dropout, whatever mode it comes in, and given back in that mode.
        recipe: all settings; None: what `method` and `settings` say.
        method: its name, itself, or its settings.
        tokenizer: needed with a model in memory.
        settings: ratio=0.2, axes=("ffn",), calibration="mixed", … (`billhook.pruning.recipe.recipe`); what the run may
            use: tick, announce, statistics, work, fresh, jobs, ray, hidden_budget (`billhook.runtime.means.Means`); and
            stream_weights: leave the weights in their files, one layer at a time in memory (None: where they would not
            fit).

    Returns:
        the pruned model in its checkpoint's dtype, with its report.

    Raises:
        BillhookError: anything that cannot work, in one line; a model on disk is never changed.
    """
    with bars(quiet or "tick" in settings) as tick:
        settings.setdefault("tick", tick)
        return pruning.prune(model, recipe, method=method, tokenizer=tokenizer, **settings)


def search(model: Any, *, method: str = "adapruner", **settings: Any) -> Result:
    """Search for calibration samples and metric, or for a metric of zeros, then prune:
    `prune` by a method that searches."""
    return prune(model, method=method, **settings)


@for_python
def recover(model: str | os.PathLike[str], *, quiet: bool = False, **settings: Any) -> Result:
    """Train a pruned checkpoint back: teacher="demo", tokens="500k", text=("wiki.txt",), …

    Args:
        settings: fields of `billhook.recovery.settings.Recovery`, and work, lessons, fresh, tick, announce of
            `billhook.recovery.recover.recover`.
    """
    with bars(quiet or "tick" in settings) as tick:
        settings.setdefault("tick", tick)
        return recovering.recover(model, **settings)


@for_python
def evaluate(
    models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    against: str | os.PathLike[str] | None = None,
    text: Sequence[str] = ("demo",),
    device: str = "auto",
    dtype: str = "auto",
    family_row: str | os.PathLike[str] = "",
    quiet: bool = False,
    **measures: Any,
) -> list[Measured]:
    """Measure models side by side: size, perplexity, speed, memory, and what they write.

    Args:
        against: the model that the others are compared with: the unpruned one, which comes first in what is returned.
        family_row: a file with the row of the models' type, where billhook has none.
        measures: fields of `billhook.evaluation.side_by_side.Measures`: seq_len, max_windows, parts, ….
    """
    named = [models] if isinstance(models, str | os.PathLike) else list(models)
    with bars(quiet) as tick:
        asked = side_by_side.Measures(texts=data.evaluation_texts(list(text), tick), **measures)
        every = [os.fspath(name) for name in ([against] if against else []) + named]
        loading.use_row(os.fspath(family_row), every, tick)
        opened = [loading.open_model(name, device=device, dtype=dtype, tick=tick, packed=True) for name in every]
        for one in opened:
            loading.check_positions(one, asked.seq_len)
        subjects = [side_by_side.Subject.of(one) for one in opened]
        found = side_by_side.side_by_side(subjects, asked, against is not None, tick)
        return [Measured.of(one) for one in found]


@for_python
def compare(
    model: str | os.PathLike[str],
    methods: Sequence[str],
    ratios: Sequence[float],
    *,
    text: Sequence[str] = ("demo",),
    windows: int | None = None,
    quiet: bool = False,
    **common: Any,
) -> list[Point]:
    """Prune a model by several methods at one size, and judge the results on the same texts.

    Args:
        methods: methods with settings, like `fasp:score=wanda,stream=dense`.
        windows: at most so many of each text.
        common: settings that all share: calibration, samples, …; and jobs.

    Returns:
        a point for the unpruned model, then one for every method at every ratio.
    """
    jobs = common.pop("jobs", 1)
    contenders = [contender(name) for name in methods]
    for one in contenders:  # impossible settings cost no work
        for ratio in ratios:
            settled(one, ratio, common)
    with bars(quiet) as tick:
        opened, by = comparing.open_judged(os.fspath(model), common, text, windows, tick)
        return [
            Point.of(one) for one in comparing.compare(opened, contenders, ratios, by, common, jobs=jobs, tick=tick)
        ]


@for_python
def sweep(
    model: str | os.PathLike[str],
    ratios: Sequence[float],
    *,
    method: str = "fasp",
    text: Sequence[str] = ("demo",),
    windows: int | None = None,
    quiet: bool = False,
    **common: Any,
) -> list[Point]:
    """Prune a model at many ratios: a point for the unpruned model, then one for each ratio.

    In the dense stream, the default here, one pass over the calibration text serves all.
    """
    one = contender(method)
    recipes = [settled(one, ratio, {"stream": "dense", **common}) for ratio in ratios]
    with bars(quiet) as tick:
        opened, by = comparing.open_judged(os.fspath(model), common, text, windows, tick)
        return [Point.of(point) for point in comparing.sweep(opened, one.name, recipes, by, tick)]


@for_python
def export(
    model: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    family_row: str | os.PathLike[str] = "",
    quiet: bool = False,
    **settings: Any,
) -> Exported:
    """Write a model as one GGUF file, for llama.cpp, or as a folder; what was written.

    Args:
        family_row: a file with the row of its model type, where billhook has none.
        settings: fields of `billhook.checkpoints.formats.Wanted`: quantize="Q8_0", format="folder", merge=True.
    """
    with bars(quiet) as tick:
        wanted = Export(**settings, overwrite=overwrite)
        loading.use_row(os.fspath(family_row), [os.fspath(model)], tick)
        opened = loading.open_model(os.fspath(model), device="cpu", dtype="float32", tick=tick)
        return Exported.of(exporting.export(opened, Path(path), wanted, tick))


@for_python
def quantize(
    model: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    imatrix: str | os.PathLike[str] | None = None,
    family_row: str | os.PathLike[str] = "",
    quiet: bool = False,
    **settings: Any,
) -> QuantizedModel:
    """Give a model's weights fewer bits, and write the folder `path`, reloaded and compared; what was written.

    Args:
        family_row: a file with the row of its model type, where billhook has none.
        imatrix: file for an importance matrix, which llama.cpp's llama-quantize reads.
        settings: fields of `billhook.planning.few_bits.Wanted`: bits="4", memory="90MB", format="both", ….
    """
    limit = amount(settings.pop("memory", None), BYTES, "memory")
    wanted = Wanted(memory=limit, imatrix=imatrix is not None, **settings)
    out = Path(path)
    check_out(out, Path(model) if Path(model).exists() else None, overwrite)
    with bars(quiet) as tick, atomic.folder(out, overwrite) as work:
        loading.use_row(os.fspath(family_row), [os.fspath(model)], tick)
        found = quantizing.quantize(os.fspath(model), wanted, Run(tick=tick))
        found.write(work, tick)
        if imatrix is not None:
            found.write_imatrix(Path(imatrix))
    return QuantizedModel.of(found.record["quantized"])


@for_python
def check(
    path: str | os.PathLike[str],
    client: str = "transformers",
    *,
    python: str | None = None,
    trust_remote_code: bool = False,
    family_row: str | os.PathLike[str] = "",
) -> Checked:
    """Load a checkpoint in a process of a stock client, without billhook, and compare tokens and logits.

    Args:
        family_row: a file with the row of its model type, where billhook has none.
    """
    loading.use_row(os.fspath(family_row), [os.fspath(path)])
    loading.check_loadable(Path(path), os.fspath(path))
    return Checked.of(clients.check(Path(path), client, python, trust_remote_code))


@for_python
def inspect(model: str | os.PathLike[str], *, family_row: str | os.PathLike[str] = "") -> Anatomy:
    """What a model is made of and what can be pruned, without loading its weights.

    Args:
        family_row: a file with the row of its model type, where billhook has none.
    """
    name = os.fspath(model)
    skeleton = loading.open_skeleton(name, silent, os.fspath(family_row))
    return Anatomy.of({"model": name, **limits.anatomy(skeleton)})


@for_python
def forecast(
    model: str | os.PathLike[str],
    ratio: float,
    minutes: float | int,
    *,
    seq_len: int = 512,
    seconds: float | int = MEASURING_SECONDS,
    quiet: bool = False,
    **opens: str | os.PathLike[str],
) -> Forecast:
    """How fast this machine trains a model cut by `ratio`, how many tokens the minutes buy, and the commands to run.

    Args:
        opens: device="auto"; and family_row, a file with the row of its model type, where billhook has none.
    """
    with bars(quiet) as tick:
        how: dict[str, Any] = {name: os.fspath(value) for name, value in opens.items()}
        told = forecasting.forecast(
            os.fspath(model), ratio, minutes, seq_len=seq_len, seconds=seconds, **how, tick=tick
        )
        return Forecast.of(told)


@for_python
def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = "auto",
    device: str = "cpu",
    stream: bool = False,
    family_row: str | os.PathLike[str] = "",
) -> Any:
    """The model of a checkpoint folder, of either layout, without running code that came with it.

    Args:
        stream: whether weights stay in their files, with one layer at a time in memory.
        family_row: a file with the row of its model type, where billhook has none.
    """
    loading.use_row(os.fspath(family_row), [os.fspath(path)])
    return loading.load(path, dtype=dtype, device=device, stream=stream)


def register() -> None:
    """Let transformers' Auto classes load checkpoints of the per_layer layout in this process,
    by billhook's own code."""
    layout.register_all()


def methods() -> dict[str, Method]:
    """Every method by name, those of other packages too."""
    return dict(METHODS)
