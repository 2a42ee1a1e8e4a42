"""What is annotated is checked as it is called, and quickly enough.

Functions that speak of no shapes are checked by beartype alone: jaxtyping binds arguments, and checks them twice, for shapes.
And each is checked the first times that a test calls it: a loop that calls it a thousand times more says nothing new.
"""

import functools
import inspect
import typing
from collections import Counter
from collections.abc import Callable
from typing import Any

import jaxtyping

TIMES = 25
_with_shapes = jaxtyping.jaxtyped
_called: Counter[Any] = Counter()  # how often by this test, by a function's code


def begin() -> None:
    """Another test."""
    _called.clear()


def _has_shapes(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    parts = hint if isinstance(hint, list) else typing.get_args(hint)  # a list: arguments of a Callable
    return isinstance(hint, str) or any(map(_has_shapes, parts))


def _jaxtyped(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What pytest's --jaxtyping-packages puts over every function and class; half of the time of small tests was its own."""

    def decorated(one: Any) -> Any:
        shaped = isinstance(one, type) or any(map(_has_shapes, one.__annotations__.values()))
        checked = _with_shapes(typechecker=typechecker)(one) if shaped else typechecker(one)
        if isinstance(one, type) or inspect.isgeneratorfunction(one):  # which Ray asks
            return checked

        @functools.wraps(one)
        def sometimes(*args: Any, **given: Any) -> Any:
            _called[one.__code__] += 1
            return (checked if _called[one.__code__] <= TIMES else one)(*args, **given)

        return sometimes

    return decorated


jaxtyping.jaxtyped = _jaxtyped
