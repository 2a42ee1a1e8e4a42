"""When training ends before its last step: held-out text that gets worse, a loss that is not finite."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from billhook.data import Windows
from billhook.evaluation.perplexity import paired, perplexity
from billhook.runtime.precision import computing

WORSE = 0.01  # the least rise of a perplexity that counts as one


@dataclass
class EarlyStopping:
    """Held-out texts, and the rule by which training stops before its time.

    An evaluation is {"step", "losses": {text: [the loss of each window]}, "seconds"}.
    """

    texts: Sequence[Windows]
    guards: Sequence[str] = ()  # names of the texts whose getting worse stops the training
    autocast: torch.dtype | None = None
    seconds: float = field(default=0.0, init=False)  # time that evaluations have taken

    def losses(self, model: Any) -> dict[str, list[float]]:
        """The mean loss of every window, by text."""
        started = time.perf_counter()
        model.eval()
        with computing(model.device, self.autocast):
            losses = {text.source: list(perplexity(model, text).window_losses) for text in self.texts}
        self.seconds += time.perf_counter() - started
        return losses

    def stopped_by(self, evaluations: Sequence[dict[str, Any]]) -> str:
        """The guard that is worse than it was, by more than two paired standard errors; '' if none is."""
        if len(evaluations) < 2:
            return ""
        for text in self.guards:
            best = min((evaluation["losses"][text] for evaluation in evaluations[:-1]), key=sum)
            last = evaluations[-1]["losses"][text]
            if not all(map(math.isfinite, last)):
                return text
            factor, error = paired(best, last)
            if factor > 1 + max(WORSE, 2 * (error or 0.0)):
                return text
        return ""

    def best(self, evaluations: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The evaluation with the least loss over the guards."""
        return min(evaluations, key=lambda evaluation: _total(evaluation["losses"], self.guards))


def _total(losses: dict[str, list[float]], names: Sequence[str]) -> float | int:
    """The sum of the texts' mean losses; infinite where one is not finite."""
    total = sum(sum(losses[name]) / len(losses[name]) for name in names)
    return total if math.isfinite(total) else math.inf
