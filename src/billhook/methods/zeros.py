"""What methods that make zeros have in common (`billhook.cuts.masking`)."""

from dataclasses import replace
from typing import Any

from pydantic import field_validator

from billhook.choices import INDEPENDENT_STREAMS, OPERATOR_STREAMS, ROLES
from billhook.cuts.settings import SOLVER_DAMPING
from billhook.errors import SettingsError
from billhook.math.pattern import Pattern, block_side, parse, parse_layer_sparsity
from billhook.methods.narrowed import damping, stream
from billhook.planning.method import Method, MethodSettings, Opened, Planned, Run, Texts
from billhook.planning.recipe import ZEROS, Recipe
from billhook.runtime.options import option


class ZerosSettings(MethodSettings):
    """Which weights get zeros, and what becomes of the others."""

    targets: tuple[str, ...] = option((), f"which weights, with commas, of {', '.join(ROLES)}; empty: all", names=ROLES)
    layer_sparsity: dict[int, float] = option({}, "other shares for some layers, like 0:0.3,29:0.7")
    stream: str = stream("sequential", OPERATOR_STREAMS)
    refit: bool = option(False, "refit the weights that stay by least squares")
    keep_zeros: bool = option(True, "zeros that are there already stay")
    damping: float = damping(SOLVER_DAMPING)

    @property
    def solver(self) -> dict[str, Any]:
        """Further settings of the method's solver."""
        return {}

    @field_validator("layer_sparsity", mode="before")
    @classmethod
    def _by_layer(cls, value: Any) -> Any:
        return parse_layer_sparsity(value) if isinstance(value, str) else value


class ZerosMethod(Method):
    """A method that makes zeros, by the solver of its name in `billhook.math.solvers`."""

    Settings = ZerosSettings
    budgets = ZEROS
    layouts = ("uniform",)
    trims = False
    needs = "calibration text"
    costs = "two forward passes"

    def fits(self, recipe: Recipe) -> None:
        chosen: ZerosSettings = recipe.settings
        pattern(recipe)
        if chosen.layer_sparsity and recipe.budget.sparsity is None:
            raise SettingsError("--layer-sparsity cannot be combined with --pattern; use --sparsity")
        for n, share in chosen.layer_sparsity.items():
            if not 0 <= share < 1:
                raise SettingsError(f"--layer-sparsity: {share:g} of layer {n} is no share from 0 to below 1")

    def why_alone(self, recipe: Recipe) -> str:
        if recipe.settings.stream in INDEPENDENT_STREAMS:
            return ""
        fitting = " or ".join(INDEPENDENT_STREAMS)
        return (
            f"in the stream {recipe.settings.stream} a layer sees what became of those before: "
            f"use --stream {fitting}, or leave it out"
        )

    def why_apart(self, recipe: Recipe, count: int) -> str:
        return ""

    def check(self, opened: Opened, recipe: Recipe) -> None:
        from billhook.cuts.masking import check

        check(opened.model, self.masking(recipe))

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.models.plan import Plan

        return Planned(Plan(), self.masking(recipe))

    def announcement(self, opened: Opened, recipe: Recipe, planned: Planned, texts: Texts) -> str:
        from billhook.cuts.masking import words, zeros_in

        zeros, weights = zeros_in(opened.model, planned.settings.targets)
        return words(planned.settings, zeros, weights, texts.calibration.numel(), opened.model)

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from billhook.cuts.masking import mask, record, zeros_in

        zeros, weights = zeros_in(model, planned.settings.targets)
        done = mask(model, texts.calibration, planned.settings, run)
        return {"zeros": record(planned.settings, done, zeros / weights)}

    def part(self, planned: Planned) -> Planned:
        return replace(planned, settings=replace(planned.settings, by_layer={}))

    def solved(self, model: Any, planned: Planned) -> list[tuple[int, str]]:
        from billhook.cuts.masking import every

        return [(n, name) for n, _, name in every(model, planned.settings.targets)]

    def masking(self, recipe: Recipe) -> Any:
        """As the cut takes it."""
        from billhook.cuts.masking import Masking
        from billhook.math import layerwise

        chosen: ZerosSettings = recipe.settings
        solver = layerwise.Settings(damping=chosen.damping, refit=chosen.refit, **chosen.solver)
        targets = chosen.targets or ROLES
        return Masking(
            self.name, pattern(recipe), targets, chosen.stream, solver, chosen.layer_sparsity, chosen.keep_zeros
        )


def pattern(recipe: Recipe) -> Pattern:
    """The zeros that a recipe asks for."""
    said = recipe.budget.pattern
    if side := block_side(said):
        if recipe.budget.sparsity is None:
            raise SettingsError(f"--pattern {said} says where zeros lie: give --sparsity too, which says how many")
        return Pattern(recipe.budget.sparsity, side=side)
    return parse(said) if said else Pattern(recipe.budget.sparsity)
