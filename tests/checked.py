"""What is annotated is checked as it is called, and quickly enough.

Functions that speak of no shapes are checked by beartype alone: jaxtyping binds arguments, and checks them twice, for
shapes. And each is checked the first times that a test calls it: a loop that calls it a thousand times more says
nothing new. What checks it is made when it is first called, and once for all functions that a line of code makes.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping

TIMES = 6
BEARTYPED = "__beartype_func"  # the argument by which beartype's function knows the one that it checks
_with_shapes = jaxtyping.jaxtyped
_called: dict[int, int] = {}  # how often by this test, by the id of a function's code, whose hash takes long
_making: list[Any] = []  # whose checks are being made: beartype holds a lock then, that a signal's handler must not ask
_checks: dict[types.CodeType, Any] = {}  # what beartype made of a function with this code


def begin() -> None:
    """Another test."""
    _called.clear()


def _has_shapes(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    parts = hint if isinstance(hint, list) else typing.get_args(hint)  # a list: arguments of a Callable
    return isinstance(hint, str) or any(map(_has_shapes, parts))


def _beartyped(one: Any, typechecker: Callable[[Any], Any]) -> Any:
    """A function checked without shapes; one inside another function is made anew with each call of that."""
    if (check := _checks.get(one.__code__)) is None:
        check = _checks[one.__code__] = typechecker(one)
    if BEARTYPED not in (given := getattr(check, "__kwdefaults__", None) or {}):
        return typechecker(one)
    mine = types.FunctionType(check.__code__, check.__globals__, one.__name__, check.__defaults__, check.__closure__)
    mine.__kwdefaults__ = given | {BEARTYPED: one}
    return mine


def _jaxtyped(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What pytest's --jaxtyping-packages puts over every function and class; half of the time of small tests was its
    own."""

    def check(one: Any) -> Any:
        _making.append(one)
        try:
            if isinstance(one, type) or any(map(_has_shapes, one.__annotations__.values())):
                return _with_shapes(typechecker=typechecker)(one)
            return _beartyped(one, typechecker)
        finally:
            _making.pop()

    def decorated(one: Any) -> Any:
        if isinstance(one, type) or inspect.isgeneratorfunction(one):  # which Ray asks
            return check(one)
        checked: list[Any] = []
        code = id(one.__code__)

        @functools.wraps(one)
        def sometimes(*args: Any, **given: Any) -> Any:
            _called[code] = times = _called.get(code, 0) + 1
            if times > TIMES or (_making and not checked):
                return one(*args, **given)
            if not checked:
                checked.append(check(one))
            return checked[0](*args, **given)

        return sometimes

    return decorated


jaxtyping.jaxtyped = _jaxtyped
