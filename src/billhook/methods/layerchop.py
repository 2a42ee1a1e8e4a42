"""Just CHOP: whole decoder layers go (`billhook.cuts.chopping`)."""

from dataclasses import asdict
from typing import Any

from billhook.choices import DATA_FREE_PRESETS, PATCHES, PRESETS, SELECT
from billhook.cuts.settings import Chopping
from billhook.errors import SettingsError
from billhook.methods.narrowed import correction, damping
from billhook.planning.method import Method, MethodSettings, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option


class LayerChopSettings(MethodSettings):
    """Which layers go, and what makes up for them; why these defaults: docs/LOG.md."""

    preset: str = option("contiguous", "which layers go: by position or measured", names=PRESETS)
    drop: str = option("", "in place of a budget: layers that go, like 10-14,20", budget=True)
    keep: str = option("", "in place of a budget: layers that stay", budget=True)
    layers: int | None = option(None, "in place of a budget: how many layers stay", ge=1, budget=True)
    patch: str = option(Chopping.patch, "what makes up for the layers: none, linear", names=PATCHES)
    select: str = option("preset", "healed: the best of --candidates after a short training of each", names=SELECT)
    candidates: tuple[str, ...] = option(
        ("contiguous", "block-influence", "middle", "max-gap", "input"),
        "presets that --select healed compares, with commas",
        names=PRESETS,
    )
    heal_tokens: int = option(100_000, "tokens of --calibration to train each on", ge=1, unit="count", shown="100k")
    held_out: tuple[str, ...] = option(("demo",), "text that judges the candidates; may be repeated")
    damping: float = damping(Chopping.damping)
    correction: float = correction(Chopping.correction)

    @property
    def cut(self) -> Chopping:
        """As the cut takes them."""
        return Chopping(self.patch, self.damping, self.correction)

    @property
    def presets(self) -> tuple[str, ...]:
        """Those that choose layers: none where layers are named."""
        if self.drop or self.keep:
            return ()
        return self.candidates if self.select == "healed" else (self.preset,)


class LayerChop(Method):
    name = "layerchop"
    title = "Just CHOP: Embarrassingly Simple LLM Compression"
    paper = "arXiv:2305.14864"
    does = (
        "Drops whole decoder layers: by --preset, or --drop 10-14,20, --keep, --layers N. The paper trains on afterwards; "
        "without that, presets by position ruin small models, and contiguous, the default, costs least. --patch linear makes up "
        "for much of it, without training."
    )
    needs = "nothing for a preset by position; a few windows of calibration text for the others, and for --patch linear"
    costs = (
        "nothing by position; otherwise passes over a few windows, at most one for each layer; with --select healed a short training "
        "of each candidate"
    )
    example = "billhook prune demo --method layerchop --ratio 0.2 --patch linear -o smaller"
    Settings = LayerChopSettings
    kinds = ("layers",)
    default_kinds = ("layers",)

    def fits(self, recipe: Recipe) -> None:
        chosen: LayerChopSettings = recipe.settings
        if chosen.patch != "none" and not recipe.given:
            raise SettingsError("--patch makes up for layers that go: name them, or give a budget")
        if chosen.select == "healed" and (chosen.drop or chosen.keep):
            raise SettingsError("--select healed chooses the layers, and --drop or --keep names them: give one")
        if chosen.select == "healed" and len(chosen.candidates) < 2:
            raise SettingsError("--select healed compares: name at least two --candidates")

    def reads(self, recipe: Recipe) -> bool:
        chosen: LayerChopSettings = recipe.settings
        return chosen.patch != "none" or chosen.select == "healed" or self.judges(recipe)

    def judges(self, recipe: Recipe) -> bool:
        return any(preset not in DATA_FREE_PRESETS for preset in recipe.settings.presets)

    def why_whole(self, recipe: Recipe) -> str:
        if recipe.settings.select == "healed":
            return "--select healed trains candidates"
        return "preset taylor needs gradients of the whole model" if recipe.settings.preset == "taylor" else ""

    def why_unforeseen(self, recipe: Recipe) -> str:
        return "--select and presets other than by position try layers" if recipe.reads else ""

    def check(self, opened: Opened, recipe: Recipe) -> None:
        from billhook.cuts.chopping import check_patch

        super().check(opened, recipe)
        if recipe.settings.patch != "none":
            check_patch(opened.model)

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        chosen: LayerChopSettings = recipe.settings
        preset, record = chosen.preset, {}
        if chosen.select == "healed":
            record = self._healed(opened, recipe, texts, run)
            preset = record["selection"]["chosen"]
        with run.clock("layers"):
            return Planned(self._by(opened, recipe, preset, texts, run), chosen.cut, record=record)

    def _by(self, opened: Opened, recipe: Recipe, preset: str, texts: Texts, run: Run) -> Any:
        from billhook.models.families import layers
        from billhook.planning.layer_plan import named_plan, preset_plan

        chosen: LayerChopSettings = recipe.settings
        if chosen.drop or chosen.keep:
            return named_plan(len(layers(opened.model)), chosen.drop, chosen.keep)
        return preset_plan(opened, recipe, preset, texts, run, chosen.layers)

    def _healed(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> dict[str, Any]:
        """The candidates, each cut and trained for a while, and which is best."""
        from billhook.cuts.chopping import chop
        from billhook.models.plan import Plan
        from billhook.recovery.candidates import Length, rank_after_training
        from billhook.runtime.run import Run
        from billhook.training.text_windows import Draw, read

        chosen: LayerChopSettings = recipe.settings
        text, settings = recipe.calibration, chosen.cut
        unseen = Run(hidden=run.hidden)
        learned = read((text.source,), chosen.held_out, opened.tokenizer, Draw(text.seq_len, text.seed), run.tick)
        gone = {name: self._by(opened, recipe, name, texts, run).layers for name in chosen.candidates}
        with run.clock("healing candidates"):
            ranking = rank_after_training(
                opened.model,
                gone,
                lambda model, layers: chop(model, texts.calibration, Plan(layers=tuple(layers)), settings, unseen),
                learned,
                Length(chosen.heal_tokens, text.seed),
                {"method": self.name, **asdict(settings), "calibrated on": texts.windows.sha256},
                run,
            )
        return {"selection": ranking.record()}

    def announcement(self, opened: Opened, recipe: Recipe, planned: Planned, texts: Texts) -> str:
        from billhook.planning.plan_lines import patch_words, plan_line

        patched = patch_words(planned.plan.layers) if recipe.settings.patch != "none" else ""
        return plan_line(opened.model, planned.plan, recipe.words) + patched

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from billhook.cuts.chopping import chop

        return {"cuts": chop(model, texts.calibration, planned.plan, planned.settings, run)}


METHOD = LayerChop()
