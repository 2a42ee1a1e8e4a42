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
class Judge:
    """Held-out texts, and the rule by which training stops before its time."""

    texts: Sequence[Windows]
    guards: Sequence[str] = ()  # texts whose getting worse stops the training
    autocast: torch.dtype | None = None
    seconds: float = field(default=0.0, init=False)

    def __call__(self, model: Any) -> dict[str, list[float]]:
        """Mean losses of every text's windows."""
        started = time.perf_counter()
        model.eval()
        with computing(model.device, self.autocast):
            found = {text.source: list(perplexity(model, text).window_losses) for text in self.texts}
        self.seconds += time.perf_counter() - started
        return found

    def verdict(self, judged: Sequence[dict[str, Any]]) -> str:
        """Why training should stop: a text is worse than it was, by more than two paired standard errors; '' if none is."""
        if len(judged) < 2:
            return ""
        for text in self.guards:
            best = min(judged[:-1], key=lambda one: sum(one["losses"][text]))["losses"][text]
            now = judged[-1]["losses"][text]
            if not all(map(math.isfinite, now)):
                return text
            factor, error = paired(best, now)
            if factor > 1 + max(WORSE, 2 * (error or 0.0)):
                return text
        return ""

    def best(self, judged: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The one with the least loss over the guards."""
        return min(judged, key=lambda one: _finite_sum(one["losses"], self.guards))


def _finite_sum(losses: dict[str, list[float]], names: Sequence[str]) -> float | int:
    found = sum(sum(losses[name]) / len(losses[name]) for name in names)
    return found if math.isfinite(found) else math.inf
