"""Functions that speak of no shapes are checked by beartype alone: jaxtyping binds arguments, and checks them twice, for shapes."""

import typing
from collections.abc import Callable
from typing import Any

import jaxtyping

_with_shapes = jaxtyping.jaxtyped


def _has_shapes(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    parts = hint if isinstance(hint, list) else typing.get_args(hint)  # a list: arguments of a Callable
    return isinstance(hint, str) or any(map(_has_shapes, parts))


def _jaxtyped(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What pytest's --jaxtyping-packages puts over every function and class; half of the time of small tests was its own."""

    def decorated(one: Any) -> Any:
        shaped = isinstance(one, type) or any(map(_has_shapes, one.__annotations__.values()))
        return _with_shapes(typechecker=typechecker)(one) if shaped else typechecker(one)

    return decorated


jaxtyping.jaxtyped = _jaxtyped
