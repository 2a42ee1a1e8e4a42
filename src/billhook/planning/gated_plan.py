"""A plan by gates: where they start, what they must keep, and what the ones that were learned come to."""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from billhook.checkpoints.load import Opened
from billhook.math import gates, selection
from billhook.math.gates import Goal
from billhook.models.plan import Plan
from billhook.planning.axis_plan import unit_scores
from billhook.planning.ordered_plan import learned_plan
from billhook.planning.recipe import Recipe
from billhook.planning.sensitivity import Probe
from billhook.planning.texts import Texts
from billhook.runtime import cache, run_folder
from billhook.runtime.run import Run
from billhook.tensors import Chances, Tokens
from billhook.training import gating
from billhook.training.gating import Course, Learner, Units
from billhook.training.teacher import TeacherCache

LESSONS = "lessons"  # folder, in a run's, of the unpruned model's predictions


@dataclass(frozen=True)
class Start:
    """What gates begin with."""

    units: Units
    z: Chances  # the order that they begin in
    goal: Goal  # what the plan of this order keeps of the parameters
    planned: Callable[[Chances], Plan]  # the plan that meets the recipe's budget by an order of all units

    def mask(self, plan: Plan, z: Chances) -> Chances:
        """1 for the units that a plan leaves, by this order, else 0."""
        by_axis = self.units.split(z)
        stays = []
        for axis in self.units.axes:
            place = axis.layer, axis.kind
            _, keep = selection.lowest(by_axis[place], plan.drops.get(place, 0), axis.blocks)
            stays.append(torch.zeros(axis.units, dtype=torch.float64).index_fill(0, keep, 1.0))
        return torch.cat(stays)


def scored(opened: Opened, recipe: Recipe, units: Units, tokens: Tokens, run: Run) -> Chances:
    """The order of the recipe's score within each axis, alike for all axes."""
    chosen = recipe.settings
    with run.clock("start"):
        scores = unit_scores(opened.model, recipe, chosen.score, chosen.cut, tokens, run)
    return units.joined({place: gates.by_rank(values) for place, values in scores.items()})


def start(opened: Opened, recipe: Recipe, units: Units, z: Chances, run: Run) -> Start:
    """Units in an order, and what a plan by it keeps.

    Raises:
        BillhookError: the budget cannot be met.
    """
    make = learned_plan(opened, recipe, run)

    def planned(order: Chances) -> Plan:
        by_axis = units.split(order)
        return make(by_axis, by_axis, {})

    return Start(units, z, units.goal(planned(z).drops, apart=recipe.shape.layout == "uniform"), planned)


@dataclass(frozen=True)
class Lessons:
    """What learners are trained on, and where their states are kept."""

    opened: Opened
    tokens: Tokens
    teacher: TeacherCache | None
    course: Course  # the recipe's
    key: dict[str, Any]
    run: Run

    def read_in(self, steps: int) -> int:
        """Tokens that so many steps read, counted as often as they come."""
        return steps * self.course.rows * self.tokens.shape[1]

    def learn(self, name: str, units: Units, learner: Learner, course: Course | None = None) -> list[float]:
        """Train a learner in place, by another course than the recipe's if one is given; the loss of each step."""
        read, key = (self.tokens, self.teacher), {**self.key, "learner": name}
        return gating.learn(self.opened.model, units, learner, read, course or self.course, self.run, key)


@contextmanager
def lessons(opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Iterator[Lessons]:
    """The calibration windows with the unpruned model's predictions where the objective is to keep to these.

    Raises:
        BillhookError: the run's folder is another's.
    """
    key = {**cache.model_key(opened.model), **texts.hashes, "settings": recipe.flat()}
    if run.folder and run.peers.first:
        run_folder.claim(run.folder, key, run.fresh)
    run.peers.wait()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (run.folder or Path(scratch)) / LESSONS
        chosen = recipe.settings
        course = Course(chosen.steps, chosen.windows, recipe.calibration.seed, chosen.objective)
        teacher = gating.lessons(opened.model, texts.calibration, folder, run) if course.objective == "kl" else None
        yield Lessons(opened, texts.calibration, teacher, course, key, run)


def better(
    opened: Opened, texts: Texts, begun: Start, learned: Chances, run: Run
) -> tuple[Plan, Chances, dict[str, Any]]:
    """The plan of gates that were learned, or that of their start if it is further from the unpruned model on windows
    that taught nothing; with the order of units in it, and what the record says."""
    with run.clock("probes"):
        probe, found = Probe(opened.model, texts.probe), {}
        for name, z in (("start", begun.z), ("learned", learned)):
            plan = begun.planned(z)
            with gating.gated(opened.model, begun.units, begun.mask(plan, z)):
                lost = statistics.fmean(probe.divergences_of(opened.model))
            found[name] = lost, plan, z
    taken = "learned" if found["learned"][0] < found["start"][0] else "start"
    _, plan, z = found[taken]
    return plan, z, {"unrestored": {name: lost for name, (lost, _, _) in found.items()}, "taken": taken}
