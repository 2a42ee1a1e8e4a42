"""Learning that is cut off, as by a kill."""

from typing import Any

import pytest
import torch

from billhook.training import gating


def cut_off(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """From now on the loss of the `at`-th step raises KeyboardInterrupt, once.

    Returns:
        how many steps there were, in a list that goes on counting.
    """
    real, done = gating._loss, [0]

    def counted(*given: Any) -> torch.Tensor:
        done[0] += 1
        if done[0] == at:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(gating, "_loss", counted)
    return done
