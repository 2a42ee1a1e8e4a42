"""Policy-gradient pruning: chances of units to stay learn from the losses of masks (`billhook.search.policy`)."""

from dataclasses import dataclass, replace
from typing import Any

from billhook.choices import BASELINES, SEARCH_OBJECTIVES, UNIT_PRICES, VARIANTS
from billhook.cuts.settings import Narrowing
from billhook.errors import BillhookError, SettingsError
from billhook.methods.narrowed import NarrowingSettings
from billhook.methods.searched import asked
from billhook.planning.method import LAYOUT, Method, Opened, Planned, Run, Text, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option
from billhook.search.settings import SearchSettings

DEFAULTS: dict[str, dict[str, Any]] = {  # of each variant
    "billhook": {"steps": 128, "masks": 4, "rate": 0.2, "group": 96, "baseline": "loo", "price": "parameters"},
    "paper": {"steps": 15_000, "masks": 2, "rate": 0.002, "group": 1, "baseline": "ema", "price": "count"},
}
MARGINS = {"billhook": 0.02, "paper": 0.0}  # how near to 0 and 1 chances may come: there they no longer move


def of_variant(text: str, name: str, **more: Any) -> Any:
    """A setting whose default is the variant's."""
    both = "; ".join(
        f"{defaults[name]}" + f" {variant}" * (variant == "paper") for variant, defaults in DEFAULTS.items()
    )
    return option(more.pop("default", None), text, shown=both, **more)


class PolicySettings(NarrowingSettings):
    """How chances learn, and the cut that it ends with; why these defaults: docs/LOG.md."""

    variant: str = option("billhook", "whose defaults the settings below have: billhook, paper", names=VARIANTS)
    steps: int | None = of_variant("steps of learning", "steps", ge=1)
    masks: int | None = of_variant("masks that a step draws", "masks", ge=1)
    rate: float | None = of_variant("highest rate of learning; falls to 0 as a cosine", "rate", gt=0)
    group: int | None = of_variant("FFN channels that stay or go together", "group", ge=1)
    baseline: str = of_variant("what a loss is compared with: loo, ema", "baseline", names=BASELINES, default="")
    price: str = of_variant(
        "what a unit costs of the budget: parameters, count", "price", names=UNIT_PRICES, default=""
    )
    exact: bool = option(False, "the gradient as it is, not with the root that the paper's code has")
    windows: int = option(8, "windows of a step", ge=1)
    window_len: int = option(128, "tokens in each of them", ge=2)
    objective: str = option(
        "nll", "nll: loss of the cut model; kl: divergence from the unpruned", names=SEARCH_OBJECTIVES
    )
    validation: tuple[str, ...] = option(
        (), "text that candidates are tried on; may be repeated", shown="the last fifth of --calibration"
    )
    shuffled: bool = option(False, "the control: each is told what another is worth")

    @property
    def texts(self) -> tuple[str, ...]:
        return self.validation

    def own(self, name: str) -> Any:
        """A setting, or the variant's default for it."""
        value = getattr(self, name)
        return DEFAULTS[self.variant][name] if value in (None, "") else value

    @property
    def restores(self) -> bool:
        """Whether kept weights are refitted."""
        return self.cut.restoration

    @property
    def cut(self) -> Narrowing:
        """As the cut takes them: the paper repairs nothing."""
        return replace(super().cut, restoration=False) if self.variant == "paper" else super().cut


@dataclass(frozen=True)
class Inputs:
    """What it reads besides the calibration windows."""

    texts: Any  # a SearchTexts: the windows that check and accept
    windows: Any  # of the batches


class Policy(Method):
    name = "policy"
    title = "Bypass Back-propagation: Optimization-based Structural Pruning for LLMs via Policy Gradient"
    paper = "arXiv:2406.10576"
    does = (
        "Gives every unit, a chunk of FFN channels, a KV group, a whole layer, a chance to stay, draws masks by these chances, and "
        "moves them by the masks' losses alone, always within the budget. What they come to is taken if it beats its own start, and "
        "equal widths, on text that nothing has seen; then what stays is restored as fasp does. --variant paper is the paper's."
    )
    needs = "calibration text, and validation text or an end of it; no gradients"
    costs = "a forward pass of a short batch for each mask, 512 by default, and 5 % more for the checks; then as fasp"
    loads = LAYOUT
    example = "billhook prune demo --method policy --ratio 0.2 --layout per_layer -o smaller"
    Settings = PolicySettings
    kinds = ("ffn", "groups", "layers")
    default_kinds = ("ffn",)
    trims = False

    def fits(self, recipe: Recipe) -> None:
        chosen: PolicySettings = recipe.settings
        if chosen.own("baseline") == "loo" and chosen.own("masks") < 2:
            raise SettingsError("--baseline loo compares the masks of a step: raise --masks, or use --baseline ema")
        if chosen.own("price") == "count" and "layers" in recipe.kinds and len(recipe.kinds) > 1:
            raise SettingsError(
                "--price count gives every axis its own budget, and a whole layer is of all: use --price parameters, or leave "
                "layers out of --axes"
            )

    def searches(self, recipe: Recipe) -> bool:
        return True

    def why_whole(self, recipe: Recipe) -> str:
        return "policy runs masks of the whole model"

    def why_alone(self, recipe: Recipe) -> str:
        return ""

    def why_unforeseen(self, recipe: Recipe) -> str:
        return "policy decides by what masks lose"

    def draw(self, opened: Opened, recipe: Recipe, text: Text, run: Run) -> Texts:
        import torch

        from billhook import data
        from billhook.planning.texts import draw
        from billhook.search.inputs import read_texts

        chosen: PolicySettings = recipe.settings
        texts = read_texts(opened, _asked(recipe), run.tick)
        parts = [data.windows(one, opened.tokenizer, chosen.window_len).tokens for one in texts.calibration]
        windows = torch.cat(parts)
        if len(windows) < chosen.windows:
            raise BillhookError(
                f"the calibration text has {len(windows)} windows of {chosen.window_len} tokens, fewer than the {chosen.windows} of "
                "a step: use more text, or fewer --windows"
            )
        return draw(opened, recipe, data.joined(texts.calibration), Inputs(texts, windows))

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.search import harness
        from billhook.search.evaluator import with_workers

        chosen: PolicySettings = recipe.settings
        evaluator = harness.evaluator_for(opened.model, _asked(recipe), run)
        with with_workers(evaluator, run.workers) as shared:
            found = _search(opened, recipe, texts, shared, run)
        record = {"policy": {"variant": chosen.variant, "objective": chosen.objective, **found.record}}
        return Planned(found.plan, chosen.cut, found.scores, record)

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from billhook.cuts.narrowing import narrow

        return {"cuts": narrow(model, texts.calibration, planned.plan, planned.settings, run, planned.scores)}


def _asked(recipe: Recipe) -> SearchSettings:
    """What a search reads of a recipe."""
    chosen: PolicySettings = recipe.settings
    lacking: dict[str, Any] = {"trials": 0, "minutes": None, "space": "", "sampler": ""}
    return asked(recipe, **lacking, pool_len=chosen.window_len)


def _search(opened: Opened, recipe: Recipe, texts: Texts, evaluator: Any, run: Run) -> Any:
    """Units, their start, and what is learned of them."""
    from billhook.calibration.layer_importance import block_influence
    from billhook.math.policy import Learning
    from billhook.planning.axis_plan import unit_scores
    from billhook.planning.ordered_plan import equal_widths, learned_plan
    from billhook.search import policy

    chosen, model = recipe.settings, opened.model
    with run.clock("start"):
        scores = unit_scores(model, recipe, chosen.score, chosen.cut, texts.calibration, run)
        influence = block_influence(model, texts.calibration, run.tick) if "layers" in recipe.kinds else []
    units = policy.pool(model, scores, influence, chosen.own("group"), chosen.own("price") == "count")
    learning = {name: chosen.own(name) for name in ("steps", "masks", "rate", "baseline")}
    how = Learning(**learning, exact=chosen.exact, margin=MARGINS[chosen.variant], shuffled=chosen.shuffled)
    batches = policy.Batches(texts.search.windows, chosen.windows, recipe.calibration.seed)
    planned = learned_plan(opened, recipe, run)
    judged = texts.search.texts.validation
    problem = policy.Policy(evaluator, units, how, batches, judged, planned, chosen.cut, run)
    return problem.search(equal_widths(opened, recipe, run), texts.calibration)


METHOD = Policy()
