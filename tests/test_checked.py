"""What the tests check the first times that each of them calls a function: types, and of tensors their shapes."""

from typing import Any

import beartype
import jaxtyping
import pytest
import torch

from billhook.choices import check_axes
from billhook.math import selection


@pytest.mark.parametrize("wrong", [("ffn", "uniform"), (("ffn",), 3)], ids=["kinds", "layout"])
def test_a_wrong_type_is_refused(wrong: tuple[Any, Any]) -> None:
    """Of a function that names no shape: beartype alone has checked it."""
    with pytest.raises(Exception, match=r"check_axes.*parameter (kinds|layout)=.* violates type hint"):
        check_axes(*wrong)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 2), torch.zeros(4, dtype=torch.long)], ids=["shape", "dtype"])
def test_a_wrong_shape_is_refused(wrong: torch.Tensor) -> None:
    selection.lowest(torch.zeros(4), 1)
    with pytest.raises(
        Exception, match=r"Type-check error whilst checking the parameters of billhook.math.selection.lowest"
    ):
        selection.lowest(wrong, 1)


def test_each_of_the_functions_that_a_line_makes_is_checked_and_does_its_own() -> None:
    def adding(what: int) -> Any:
        @jaxtyping.jaxtyped(typechecker=beartype.beartype)
        def add(to: int) -> int:
            return to + what

        return add

    first, second = adding(1), adding(10)
    assert (first(1), second(1), first(2)) == (2, 11, 3)
    for add in (first, second):
        with pytest.raises(Exception, match=r"add.*parameter to=.* violates type hint"):
            add("1")


def test_what_is_called_while_a_check_is_made_waits_for_none() -> None:
    """As a signal's handler may be, while beartype holds its lock."""
    made = []

    def maker(one: Any) -> Any:
        made.append(one.__name__)
        return (inner if one.__name__ == "outer" else beartype.beartype)(one)

    @jaxtyping.jaxtyped(typechecker=maker)
    def handler(number: int) -> int:
        return number

    def inner(one: Any) -> Any:
        handler(1)
        return beartype.beartype(one)

    @jaxtyping.jaxtyped(typechecker=maker)
    def outer() -> int:
        return 2

    assert outer() == 2 and made == ["outer"]
    assert handler(1) == 1 and made == ["outer", "handler"]
