"""billhook makes large language models smaller.

import billhook
result = billhook.prune("demo", method="fasp", ratio=0.2)
result.model; result.report; result.save("out")
billhook.recover("out", teacher="demo", tokens="500k").save("healed")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from billhook.api import (
        check,
        compare,
        evaluate,
        export,
        forecast,
        inspect,
        load,
        methods,
        prune,
        quantize,
        recover,
        register,
        search,
        sweep,
    )
    from billhook.checkpoints.result import Result
    from billhook.errors import BillhookError, DataError, ModelError, SettingsError
    from billhook.planning.method import Method, MethodSettings
    from billhook.planning.recipe import Recipe

    __version__: str

__all__ = [
    "BillhookError",
    "DataError",
    "Method",
    "MethodSettings",
    "ModelError",
    "Recipe",
    "Result",
    "SettingsError",
    "__version__",
    "check",
    "compare",
    "evaluate",
    "export",
    "forecast",
    "inspect",
    "load",
    "methods",
    "prune",
    "quantize",
    "recover",
    "register",
    "search",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Load on first use: torch and transformers take seconds, and Ctrl-C must be clean meanwhile (__main__.py)."""
    if name not in __all__:
        raise AttributeError(f"module 'billhook' has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version

        return version("billhook")
    if name.endswith("Error"):
        from billhook import errors

        return getattr(errors, name)
    from billhook import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
