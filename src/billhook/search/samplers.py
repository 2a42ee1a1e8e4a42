"""Optuna's samplers: a study in memory that proposes trials and is told their losses.

What a sampler proposes depends on its seed and on the losses that it was told.  So only losses are kept on disk
(billhook.search.evaluator), and a search that was cut off replays them to get back to where it was.  Optuna's own
journal would hold pickles for some samplers.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from billhook.errors import BillhookError
from billhook.search.space import Dimension

STARTUP = 10  # random trials before a sampler learns
TREES = 64  # trees of the forest that shares out the losses' variance


class Study:
    """Asks for values of the dimensions, batch by batch, and is told the loss of each."""

    def __init__(self, dimensions: Mapping[str, Dimension], sampler: str, seed: int) -> None:
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        kinds = optuna.samplers
        samplers = {
            "tpe": lambda: kinds.TPESampler(multivariate=True, n_startup_trials=STARTUP, seed=seed),
            "gp": lambda: kinds.GPSampler(n_startup_trials=STARTUP, seed=seed, deterministic_objective=False),
            "cmaes": lambda: kinds.CmaEsSampler(n_startup_trials=STARTUP, seed=seed),
            "nsga2": lambda: kinds.NSGAIISampler(population_size=STARTUP, seed=seed),
            "random": lambda: kinds.RandomSampler(seed=seed),
        }
        self._optuna, self._trials = optuna, {}
        self._distributions = {name: _distribution(optuna, dimension) for name, dimension in dimensions.items()}
        with warnings.catch_warnings():  # Optuna warns that `multivariate` and GP are experimental
            warnings.simplefilter("ignore")
            self._study = optuna.create_study(sampler=samplers[sampler]())

    def ask(self, count: int, first: Sequence[Mapping[str, Any]] = ()) -> list[tuple[int, dict[str, Any]]]:
        """`count` numbered trials and their values: those of `first`, then what the sampler proposes."""
        for values in first:
            self._study.enqueue_trial(dict(values))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trials = [self._study.ask(self._distributions) for _ in range(count)]
        self._trials |= {trial.number: trial for trial in trials}
        return [(trial.number, dict(trial.params)) for trial in trials]

    def tell(self, number: int, loss: float | None) -> None:
        """Report the loss of a trial; None: the trial failed."""
        failed = self._optuna.trial.TrialState.FAIL
        self._study.tell(number, loss) if loss is not None else self._study.tell(number, state=failed)

    def drop(self, number: int, proxy: float) -> None:
        """Report a trial that was dropped untried; tpe learns from the order of the proxies."""
        trial = self._trials[number]
        trial.report(proxy, step=0)
        self._study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)

    def importance(self) -> dict[str, float]:
        """Share of the losses' variance that each dimension explains (fANOVA); empty where all losses are equal."""
        try:
            shares = self._optuna.importance.get_param_importances(
                self._study, evaluator=self._optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=0)
            )
        except (ValueError, RuntimeError):  # fewer than two different trials, or no variance
            return {}
        return {name: float(share) for name, share in shares.items()}


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    kinds = optuna.distributions
    if dimension.choices:
        return kinds.CategoricalDistribution(dimension.choices)
    if isinstance(dimension.step, int):
        return kinds.IntDistribution(int(dimension.low), int(dimension.high), step=dimension.step)
    return kinds.FloatDistribution(dimension.low, dimension.high, step=dimension.step)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise BillhookError("a search needs the extra: pip install 'billhook[search]'") from error
    return optuna
