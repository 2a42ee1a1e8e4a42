"""The settings of each method, taken from a recipe."""

from billhook.choices import GRADIENT_SCORES, ROLES
from billhook.cuts.chopping import Settings as Patching
from billhook.cuts.experts import Settings as Ways
from billhook.cuts.masking import Masking
from billhook.cuts.narrowing import Settings
from billhook.cuts.slicing import Settings as Slicing
from billhook.math import layerwise
from billhook.math.pattern import Pattern, parse
from billhook.pruning.recipe import Recipe


def settings_of(chosen: Recipe) -> Settings:
    """What a method that scores units may choose, from the recipe."""
    score = chosen.score if chosen.score not in GRADIENT_SCORES else Settings.score
    return Settings(score, chosen.ridge, chosen.restores, chosen.correction, chosen.stream)


def method_settings(chosen: Recipe) -> Settings | Patching | Slicing | Ways:
    """What the recipe's method may choose, whichever it is."""
    if chosen.routes:
        return Ways(chosen.experts, chosen.seed, chosen.stream)
    if chosen.slices:
        return Slicing(chosen.restoration, chosen.ridge, chosen.correction)
    return Patching(chosen.patch, chosen.ridge, chosen.correction) if chosen.chops else settings_of(chosen)


def masking_of(chosen: Recipe) -> Masking:
    """What a method that makes zeros is asked for."""
    pattern = parse(chosen.pattern) if chosen.pattern else Pattern(chosen.sparsity)
    settings = layerwise.Settings(
        damping=chosen.ridge,
        refit=chosen.refit,
        init=chosen.init or None,
        normalised=chosen.normalised,
        metric=chosen.metric,
    )
    targets = chosen.targets or ROLES
    return Masking(chosen.method, pattern, targets, chosen.stream, settings, chosen.layer_sparsity, chosen.keep_zeros)
