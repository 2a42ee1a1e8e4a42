"""What a method is: its settings, what it takes and needs,
and the phases that a prune goes through.  Loads no torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from billhook.choices import LAYOUTS
from billhook.errors import BillhookError, ModelError
from billhook.planning.recipe import EXAMPLES, FLAT, PARTS, SAMPLES, SIZES, ZEROS, Recipe
from billhook.runtime.options import Part

if TYPE_CHECKING:  # what phases are given; it brings torch, which what defines a method must not
    from billhook.checkpoints.load import Opened
    from billhook.data import Text
    from billhook.models.plan import Plan
    from billhook.planning.texts import Texts
    from billhook.runtime.run import Run
else:
    Opened = Texts = Text = Run = Plan = Any

LOOKED = 40  # windows' worth of a whole model that the looks before and after take: most is text, token by token
STOCK = "whatever loads the family: transformers, vLLM, llama.cpp (`billhook export`)"
LAYOUT = "the uniform layout: " + STOCK + "; per_layer: transformers and vLLM with trust_remote_code, llama.cpp as GGUF"


class MethodSettings(Part):
    """What may be chosen of a method alone."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the texts that it reads besides the calibration's, as that is named."""
        return ()


@dataclass(frozen=True)
class Planned:
    """What a prune will do: the plan, and all that was decided on the way to it."""

    plan: Plan
    settings: Any  # of the cut, as `carry_out` takes them
    scores: Mapping[tuple[int, str], Any] = field(default_factory=dict)  # of units, by (layer, kind), if known already
    record: Mapping[str, Any] = field(default_factory=dict)  # what the report shows of the planning


@dataclass(frozen=True)
class Passes:
    """Work, in windows that pass one layer, the head, and a layer that is trained on them; what else is done counts as
    what takes as long."""

    layers: float | int = 0
    heads: float | int = 0
    steps: float | int = 0

    def seconds(self, layer: float | int, head: float | int, step: float | int) -> float:
        """By the seconds of one window through each."""
        return float(self.layers * layer + self.heads * head + self.steps * step)


Price = Callable[[], tuple[float, float, float]]  # times a window: seconds in a layer, in the head, in training a layer


@dataclass(frozen=True)
class Foreseen:
    """What a prune costs that no rehearsal of a layer shows, but for its look."""

    stages: Mapping[str, Passes] = field(default_factory=dict)
    memory: int = 0  # bytes, besides the model and its hidden states
    windows: int | None = None  # that the cut is fitted on, where not all
    rehearsed: "tuple[Method, Planned] | None" = None  # what a rehearsal plays
    words: str = ""  # what will be done, in a line


class Method:
    """One method: plain facts, and three phases.  A method of one's own overrides what differs.

    Every hook is given the recipe, whose `settings` are this method's own; none is called before the recipe is valid.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    does: ClassVar[str]  # what it does, in about three sentences
    needs: ClassVar[str]
    costs: ClassVar[str]  # passes over the calibration text, and work besides
    loads: ClassVar[str] = STOCK  # what opens the result
    example: ClassVar[str]  # a command
    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    budgets: ClassVar[tuple[str, ...]] = SIZES  # fields of Budget that it takes
    kinds: ClassVar[tuple[str, ...]] = ()  # axes that it can prune; none: it makes zeros, and cuts nothing
    default_kinds: ClassVar[tuple[str, ...]] = ()
    layouts: ClassVar[tuple[str, ...]] = tuple(LAYOUTS)
    own_shapes: ClassVar[bool] = False  # whether it says itself which layout holds what its axes become
    allocates: ClassVar[bool] = False  # whether --allocation says which layers give how much
    trims: ClassVar[bool] = True  # whether a smaller vocabulary may be all that is asked for
    command: ClassVar[str] = "prune"  # the command that has all of its settings

    @property
    def zeros(self) -> bool:
        """Whether it makes zeros, and cuts nothing."""
        return self.budgets == ZEROS

    def fits(self, recipe: Recipe) -> None:
        """Refuse settings that cannot go together, before a model is opened.  Raises BillhookError."""

    def reads(self, recipe: Recipe) -> bool:
        """Whether anything is measured on text."""
        return True

    def samples(self, recipe: Recipe) -> int:
        """Windows to calibrate on, where the user says no number; fewer, down to `SAMPLES`, where the text ends."""
        return SAMPLES

    def judges(self, recipe: Recipe) -> bool:
        """Whether the plan is judged by further windows, which the calibration does not see."""
        return False

    def searches(self, recipe: Recipe) -> bool:
        """Whether it tries candidates, which the folder of its run keeps in place of layers that are done."""
        return False

    def why_whole(self, recipe: Recipe) -> str:
        """Why all weights have to be in memory at once, or ''."""
        return ""

    def why_not(self, model: Any, kind: str) -> str:
        """Why it cannot cut a kind of axis of this model, which other methods may, or ''."""
        return ""

    def why_alone(self, recipe: Recipe) -> str:
        """Why processes cannot share the work, and what to do, or ''."""
        return f"{self.name} works in one process: leave it out"

    def why_apart(self, recipe: Recipe, count: int) -> str:
        """Why so many processes of `accelerate launch` cannot share text or training, and what to do, or ''."""
        return f"{self.name} works in one: start it without accelerate launch"

    def why_unforeseen(self, recipe: Recipe) -> str:
        """Why what it costs cannot be told from a few layers, or ''."""
        return ""

    def foreseen(self, opened: Opened, recipe: Recipe, planned: Planned, price: Price, streamed: bool) -> Foreseen:
        """What a dry run tells; `planned` was made without text, of a model without weights."""
        return Foreseen(rehearsed=(self, planned))

    def draw(self, opened: Opened, recipe: Recipe, text: Text, run: Run) -> Texts:
        """The windows to calibrate on and to judge by."""
        from billhook.planning.texts import draw

        return draw(opened, recipe, text)

    def check(self, opened: Opened, recipe: Recipe) -> None:
        """Refuse what cannot work with this model, before anything is computed.  Raises BillhookError."""
        from billhook.planning.axis_plan import check

        check(opened.model, recipe)
        for kind in recipe.kinds:
            if why := self.why_not(opened.model, kind):
                raise ModelError(why)

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        """From the budget to a plan, with whatever is measured or searched on the way."""
        raise NotImplementedError

    def plan_each(
        self, opened: Opened, recipes: Sequence[Recipe], texts: Texts, run: Run
    ) -> list[Planned | BillhookError]:
        """The plans of recipes that differ in their budget alone; what cannot be planned is an error in its place."""
        return [_or_error(self.plan, opened, recipe, texts, run) for recipe in recipes]

    def announcement(self, opened: Opened, recipe: Recipe, planned: Planned, texts: Texts) -> str:
        """One line that says what will go, before it does."""
        from billhook.planning.plan_lines import plan_line

        return plan_line(opened.model, planned.plan, recipe.words)

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        """The cut, in place; what the report shows of it: `cuts` (a list of Cut), or other keys of its own."""
        raise NotImplementedError

    def at_once(self, recipe: Recipe) -> bool:
        """Whether one pass over the text serves recipes that differ in their budget alone."""
        return False

    def carry_out_each(
        self, model: Any, texts: Texts, planned: Sequence[Planned], run: Run
    ) -> Iterator[tuple[Any, list[Any]]]:
        """A cut copy of the model for every plan, and what became of it, from one pass."""
        raise NotImplementedError

    def part(self, planned: Planned) -> Planned:
        """The same for a few layers alone: without what names layers of the whole model."""
        return planned

    def solved(self, model: Any, planned: Planned) -> list[tuple[int, str]]:
        """Layer and path of every linear weight that is solved for, by which the cost grows."""
        from billhook.models.axes import axes

        return [(axis.layer, axis.reader_module) for axis in axes(model, planned.plan.kinds)]


def _or_error(plan: Any, *given: Any) -> Planned | BillhookError:
    try:
        return plan(*given)
    except BillhookError as error:
        return error


FACTS = ("name", "title", "paper", "does", "needs", "costs", "example")  # that every method says


def flaw(name: str, method: Any) -> str:
    """What is wrong with a method of another package, or ''."""
    if not isinstance(method, Method):
        return "is no Method"
    if missing := [fact for fact in FACTS if not hasattr(method, fact)]:
        return f"does not say its {missing[0]}"
    if method.name != name:
        return f"calls itself {method.name}"
    if unknown := [budget for budget in method.budgets if budget not in EXAMPLES]:
        return f"names a budget that there is not, {unknown[0]}"
    called: dict[str, str] = {inner: flat for flat, inner in FLAT.items()}
    shared = {called.get(field) or field for part in PARTS.values() for field in part.model_fields}
    if taken := sorted(shared & set(method.Settings.model_fields)):
        return f"has a setting that every recipe has, {taken[0]}"
    return ""
