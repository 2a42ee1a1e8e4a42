"""billhook makes large language models smaller.

import billhook
result = billhook.prune("demo", method="fasp", ratio=0.2)
result.model; result.report; result.save("out")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from billhook.checkpoint import load
    from billhook.errors import BillhookError
    from billhook.pruning import Recipe, Result, prune

__all__ = ["BillhookError", "Recipe", "Result", "load", "prune"]


def __getattr__(name: str) -> Any:
    """Load on first use: torch and transformers take seconds, and Ctrl-C must be clean meanwhile (__main__.py)."""
    if name not in __all__:
        raise AttributeError(f"module 'billhook' has no attribute {name!r}")
    from billhook import checkpoint, pruning

    return getattr(checkpoint if name == "load" else pruning, name)
