"""Bolaco: thin weights, and Bayesian optimisation says which kind keeps how much (`billhook.cuts.low_rank`).

A trial gives each of five kinds of weights a share of its entries, scales all five until the budget is met, and sees
what the model then predicts: no weight is computed anew, the factors serve every rank.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from billhook.cuts.settings import Factoring
from billhook.errors import SettingsError
from billhook.methods.factored import Factored, moment
from billhook.planning.method import MethodSettings, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option

# kind of each role that is factored: values stay whole
KIND = {"q": "qk", "k": "qk", "qkv": "qk", "o": "o", "gate": "gate", "gate_up": "gate", "up": "up", "down": "down"}
LEAST, STEP = 0.2, 0.05  # the smallest share, and between those that are tried


class BolacoSettings(MethodSettings):
    """What may be chosen; why these defaults: docs/methods/bolaco.md."""

    moment: str = moment("pooled")
    rounds: int = option(50, "trials, equal shares the first of them", ge=1)


class Bolaco(Factored):
    name = "bolaco"
    title = "Feature-based Low-Rank Compression of Large Language Models via Bayesian Optimization"
    paper = "arXiv:2405.10616"
    does = (
        "Replaces weights of all layers by two thin ones, by the pooled covariance of what they put out, with the mean output kept "
        "in a bias; values stay whole. Bayesian optimisation finds what share of its entries each of five kinds keeps (queries and "
        "keys, o, gate, up, down). It is taken if it beats equal shares on windows that no trial saw."
    )
    costs = "two forward passes, an eigendecomposition for each weight, and a short forward pass for each trial"
    example = "billhook prune demo --method bolaco --ratio 0.2 --layout per_layer -o smaller"
    Settings = BolacoSettings

    def fits(self, recipe: Recipe) -> None:
        if recipe.calibration.probes < 2:
            raise SettingsError("bolaco tries shares on half of the probes and judges by the others: raise --probes")

    def judges(self, recipe: Recipe) -> bool:
        return True

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.cuts.low_rank import factored, factors_of
        from billhook.models.sizes import saved_by
        from billhook.planning.budget import Planner, solved
        from billhook.planning.rank_plan import fitting, rank_plan, weights
        from billhook.planning.sensitivity import Probe

        chosen, model = recipe.settings, opened.model
        kinds = {path: KIND[role] for path, (_, role) in weights(model).items() if role in KIND}
        equal, how = dict.fromkeys(kinds.values(), 1.0), Factoring(chosen.moment, "dense")

        def scaled(of_kind: Mapping[str, float], scale: float) -> Any:
            return rank_plan(model, shares(kinds, of_kind, scale))

        make = partial(fitting, model, partial(scaled, equal))
        start = solved(opened, recipe, Planner(make, saved_by(model, scaled(equal, 0.0)), 1), run.tick)
        goal, known = saved_by(model, start), factors_of(model, texts.calibration, list(kinds), how, run)
        tried, judged = (Probe(model, half) for half in (texts.probe[::2], texts.probe[1::2]))

        def plan_of(of_kind: Mapping[str, float]) -> Any:
            return start if of_kind == equal else fitting(model, partial(scaled, of_kind), goal)

        def loss(probe: Probe, of_kind: Mapping[str, float]) -> float:
            with run.clock("trials"), factored(model, known, plan_of(of_kind).ranks):
                return probe.divergence(0)

        trials = _trials(partial(loss, tried), equal, chosen.rounds, recipe.calibration.seed, run.tick)
        best = min(trials, key=lambda one: one[0])[1]
        losses = {"equal": loss(judged, equal), "searched": loss(judged, best)}
        taken = losses["searched"] < losses["equal"]
        record = {"shares": best, "taken": taken, "trials": [one for one, _ in trials], **losses}
        return Planned(plan_of(best) if taken else start, how, record={"bolaco": record})


def shares(kinds: Mapping[str, str], of_kind: Mapping[str, float], scale: float) -> dict[str, float]:
    """The share of each weight, by path: its kind's, scaled, the largest to `scale`; none is below `LEAST`."""
    largest = max(of_kind.values())
    return {path: max(LEAST, scale * of_kind[kind] / largest) for path, kind in kinds.items()}


def _trials(
    loss: Callable[[Mapping[str, float]], float], start: Mapping[str, float], rounds: int, seed: int, tick: Any
) -> list[tuple[float, Mapping[str, float]]]:
    """What each trial lost, and the shares of its kinds, those of `start` first."""
    from billhook.search.samplers import Study
    from billhook.search.space import Dimension

    study, found = Study(dict.fromkeys(start, Dimension(LEAST, 1.0, STEP)), "gp", seed), []
    for n in range(rounds):
        tick("trials", n, rounds)
        ((number, of_kind),) = study.ask(1, first=() if n else [start])
        found.append((loss(of_kind), of_kind))
        study.tell(number, found[-1][0])
    tick("trials", rounds, rounds)
    return found


METHOD = Bolaco()
