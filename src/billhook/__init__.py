"""billhook makes large language models smaller.

import billhook
result = billhook.prune("demo", method="fasp", ratio=0.2)
result.model; result.report; result.save("out")
billhook.recover("out", teacher="demo", tokens="500k").save("healed")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from billhook.checkpoints.load import load
    from billhook.errors import BillhookError
    from billhook.pruning.prune import Recipe, Result, prune
    from billhook.recovery.recover import Recovered, recover

__all__ = ["BillhookError", "Recipe", "Recovered", "Result", "load", "prune", "recover"]


def __getattr__(name: str) -> Any:
    """Load on first use: torch and transformers take seconds, and Ctrl-C must be clean meanwhile (__main__.py)."""
    if name not in __all__:
        raise AttributeError(f"module 'billhook' has no attribute {name!r}")
    from billhook.checkpoints import load as loading
    from billhook.pruning import prune as pruning
    from billhook.recovery import recover as recovering

    homes = {"load": loading, "recover": recovering, "Recovered": recovering}
    return getattr(homes.get(name, pruning), name)
