"""One recipe says a whole pruning run; `prune` does it.  Command-line flags, YAML files and Python arguments are the same."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from billhook import atomic, checkpoint, clients, data, evaluate, layout, report, saving
from billhook.budget import check_names, uniform_drops
from billhook.checkpoint import DTYPES, Opened
from billhook.cuts import Cut
from billhook.errors import BillhookError, one_of
from billhook.methods import METHODS
from billhook.methods.fasp import Settings
from billhook.observe import STREAMS
from billhook.progress import Clock, Tick, quiet
from billhook.scores import SCORES
from billhook.surgery import cast
from billhook.tensors import Tokens


class Recipe(BaseModel):
    """How to prune: everything that decides the result but the model itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "fasp"
    ratio: float = Field(gt=0, lt=1, allow_inf_nan=False)
    axes: tuple[str, ...] = ()  # empty: the method's own default
    stream: str = "dense_target"
    score: str = Settings.score
    damping: float = Field(default=Settings.damping, gt=0, le=1, allow_inf_nan=False)
    restoration: bool = Settings.restoration
    correction: float = Field(default=Settings.correction, ge=0, le=1, allow_inf_nan=False)
    calibration: str = "demo"
    samples: int = Field(default=64, ge=1)
    seq_len: int = Field(default=512, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**63)
    multiple_of: int = Field(default=32, ge=1)
    device: str = "auto"
    dtype: str = "auto"

    @field_validator("method", "score", "stream", "dtype")
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        valid = {"method": METHODS, "score": SCORES, "stream": STREAMS, "dtype": ("auto", *DTYPES)}
        return one_of(info.field_name, value, valid[info.field_name])

    @property
    def kinds(self) -> tuple[str, ...]:
        """The axes to prune."""
        return self.axes or METHODS[self.method].default_kinds


def recipe(**settings: Any) -> Recipe:
    """A recipe from keyword settings.

    Raises:
        BillhookError: an unknown setting or an impossible value, the first one found.
    """
    for name in settings:
        one_of("setting", name, Recipe.model_fields)
    try:
        return Recipe(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        if "ctx" in first and isinstance(inner := first["ctx"].get("error"), BillhookError):
            raise inner from None
        name = ".".join(map(str, first["loc"])).replace("_", "-")
        given = "" if first["type"] == "missing" else f" {first['input']!r}"
        raise BillhookError(f"{name}{given}: {first['msg'].lower().replace('tuple', 'list')}") from None


@dataclass
class Result:
    """A pruned model, its tokenizer, and the report of what it cost."""

    model: Any
    tokenizer: Any
    report: dict[str, Any]
    source: Path | None = None  # the folder the model came from

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write a plain checkpoint with report and model card, reload it with stock transformers and compare.

        Raises:
            BillhookError: `path` is taken, holds the source model, cannot be written, or what was written does not come
                back equal.  In each case nothing is left behind.
        """
        out = Path(path)
        check_out(out, self.source, overwrite)
        with atomic.folder(out, overwrite) as work:
            self.write(work)
        return out

    def write(self, work: Path, tick: Tick = quiet) -> None:
        """Fill the existing folder `work` and verify it."""
        tick("saving", 0, 2)
        saving.save(self.model, self.tokenizer, work, self.source)
        tick("saving", 1, 2)
        self.report["verified"] = clients.verify(work, self.model)
        atomic.write_text(work / atomic.MARK, report.to_json(self.report))
        atomic.write_text(work / "README.md", report.model_card(self.report))
        tick("saving", 2, 2)


def check_out(out: Path, source: Path | None, overwrite: bool) -> None:
    """Refuse an output folder that is taken, or that would put result and source inside each other."""
    if source is not None:
        here, there = out.resolve(), source.resolve()
        if here == there or there in here.parents:
            raise BillhookError(f"{out} lies inside the model's own folder {source}: choose another output")
        if here in there.parents:
            raise BillhookError(f"{out} holds the model's own folder {source}: choose another output")
    atomic.check_free(out, overwrite)


def prune(model: Any, *, tokenizer: Any = None, tick: Tick = quiet, **settings: Any) -> Result:
    """Prune a model by a recipe.

    Args:
        model: a folder, a hub id, a .gguf file, `demo`, or a transformers model in memory (which is cut in place).
        tokenizer: needed with a model in memory.
        tick: called with (stage, done, total) as the work proceeds.
        settings: the fields of `Recipe`: ratio=0.2, method="fasp", axes=("ffn",), calibration="demo", …

    Returns:
        the pruned model in its checkpoint's dtype, with its report.

    Raises:
        BillhookError: anything that cannot work, in one line; a model on disk is never changed.
    """
    chosen = recipe(**settings)
    check_names(chosen.kinds)  # this refusal needs no model
    if isinstance(model, str | os.PathLike):
        opened = checkpoint.open_model(os.fspath(model), device=chosen.device, dtype=chosen.dtype, tick=tick)
    else:
        if tokenizer is None:
            raise BillhookError("a model in memory needs its tokenizer: prune(model, tokenizer=…)")
        opened = Opened(model, tokenizer, model.config._name_or_path or type(model).__name__, None, model.dtype)
        checkpoint.check_config({**model.config.to_dict(), "architectures": [type(model).__name__]}, opened.name)
    return prune_opened(opened, chosen, tick)


def prune_opened(opened: Opened, chosen: Recipe, tick: Tick = quiet) -> Result:
    """Prune a model that is already loaded, in place."""
    model, clock = opened.model, Clock()
    limit = getattr(model.config, "max_position_embeddings", chosen.seq_len)
    if chosen.seq_len > limit:
        raise BillhookError(
            f"seq-len {chosen.seq_len} is beyond the {limit} positions of {opened.name}: lower --seq-len"
        )
    drops = uniform_drops(model, chosen.kinds, chosen.ratio, chosen.multiple_of)
    windows = data.windows(
        data.calibration_text(chosen.calibration, tick), opened.tokenizer, chosen.seq_len, chosen.samples, chosen.seed
    )
    data.check_vocabulary(windows, model, opened.name)
    before, widths = evaluate.sizes(model), {kind: n for kind, n in drops.items() if n}
    with evaluate.peak_growth(model.device) as growth:
        cuts = _run(model, windows.tokens, widths, chosen, clock, tick)
    layout.update_config(model)
    cast(model, opened.dtype)
    written = {
        "recipe": chosen.model_dump(mode="json") | {"axes": list(chosen.kinds)},
        "parent": opened.name,
        "model_type": model.config.model_type,
        "paper": METHODS[chosen.method].paper,
        "sizes": report.sizes(before, evaluate.sizes(model), chosen.ratio),
        "calibration": {
            "source": windows.source,
            "windows": len(windows.tokens),
            "windows_available": windows.available,
            "seq_len": chosen.seq_len,
            "text_sha256": windows.text_sha256,
            "tokens_sha256": windows.sha256,
        },
        "cuts": [asdict(cut) for cut in cuts],
        "seconds": {stage: round(s, 3) for stage, s in clock.seconds.items()},
        "peak_growth_bytes": growth(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("billhook", "torch", "transformers")},
        },
    }
    return Result(model, opened.tokenizer, written, opened.folder)


def _run(model: Any, tokens: Tokens, drops: dict[str, int], chosen: Recipe, clock: Clock, tick: Tick) -> list[Cut]:
    settings = Settings(chosen.score, chosen.damping, chosen.restoration, chosen.correction)
    return METHODS[chosen.method].run(model, tokens, drops, settings, stream=chosen.stream, clock=clock, tick=tick)


@dataclass(frozen=True)
class RecipeFile:
    """A recipe on disk: the model, the settings, and the numbers it is expected to give."""

    model: str
    recipe: Recipe
    expect: dict[str, Any]


def read_recipe(path: Path) -> RecipeFile:
    """Read a YAML recipe: `model`, the settings, and optionally `expect`.

    Raises:
        BillhookError: not a readable YAML mapping, or an unknown or impossible setting.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BillhookError(f"recipe {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or "model" not in content:
        raise BillhookError(f"recipe {path} is not a mapping with a 'model'")
    model, expect = content.pop("model"), content.pop("expect", {})
    if not isinstance(expect, dict):
        raise BillhookError(f"recipe {path}: expect {expect!r} is not a mapping of numbers and tolerance")
    try:
        return RecipeFile(str(model), recipe(**{str(key): value for key, value in content.items()}), expect)
    except BillhookError as error:
        raise BillhookError(f"recipe {path}: {error}") from None


def measure(path: Path, chosen: Recipe, tick: Tick = quiet) -> dict[str, float]:
    """The numbers a recipe file may expect: parameters, and perplexity on the demo's evaluation texts."""
    opened = checkpoint.open_model(str(path), device=chosen.device, dtype=chosen.dtype, tick=tick)
    found: dict[str, float] = {"parameters": evaluate.sizes(opened.model)["parameters"]}
    for text in data.evaluation_texts(["demo"], tick):
        windows = data.windows(text, opened.tokenizer, chosen.seq_len)
        found[f"perplexity on {text.name}"] = evaluate.perplexity(opened.model, windows, tick).perplexity
    return found
