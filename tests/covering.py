"""Which cases of a law the fast suite runs, where its parameters multiply to hundreds.

`@pytest.mark.covering` over a test: the fast suite runs a few of its cases, in which every value of every parameter
occurs. The others get the mark `whole`; `make test-whole` runs them all.

    @pytest.mark.covering                               every value once
    @pytest.mark.covering("family, dtype")              and every pair of a family and a dtype that there is
    @pytest.mark.covering(first=lambda family, kind: ...)  from such cases as far as they go: others say less
    @pytest.mark.covering(some={"family": 3})            one family in three, for laws that take long: others have the
    rest

Ties go to values that came least often so far, and each law starts elsewhere, so that what one leaves out another has.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest

Case = Mapping[str, Any]  # the parameters of one case, by name


def covering(
    cases: Sequence[Case],
    together: Iterable[str] = (),
    first: Callable[..., bool] | None = None,
    some: Mapping[str, int] | None = None,
    start: int = 0,
) -> list[int]:
    """The indices of the cases that cover all; `start` says which of several that do equally well is the first."""
    names = [tuple(name.strip() for name in group.split(",")) for group in together]
    spared = _spared(cases, some or {}, start)
    wanted = [_values(case, names) - spared for case in cases]
    telling = [first is None or bool(first(**_taken(first, case))) for case in cases]
    order = [(start + n) % len(cases) for n in range(len(cases))]
    covered: Counter[Any] = Counter()
    chosen: list[int] = []
    for allowed in (True, False):
        left = [n for n in order if telling[n] is allowed]
        while left:
            gains = {n: len(wanted[n] - covered.keys()) for n in left}
            left = [n for n in left if gains[n]]  # what brings nothing new now never will
            if not left:
                break
            best = max(left, key=lambda n: (gains[n], -sum(covered[value] for value in wanted[n])))
            chosen.append(best)
            covered.update(wanted[best])
            left.remove(best)
    return sorted(chosen)


def _spared(cases: Sequence[Case], some: Mapping[str, int], start: int) -> set[Any]:
    """The values that another law has to have."""
    found: set[Any] = set()
    for name, of in some.items():
        values = dict.fromkeys(_value(name, case[name]) for case in cases)
        found |= {value for n, value in enumerate(values) if (n + start) % of}
    return found


def _value(name: str, value: Any) -> tuple[str, type, Any]:
    return name, type(value), _key(value)


def _values(case: Case, together: Sequence[tuple[str, ...]]) -> set[Any]:
    each = {name: _value(name, value) for name, value in case.items()}
    return {*each.values(), *(tuple(each[name] for name in names) for names in together)}


def _key(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def _taken(first: Callable[..., bool], case: Case) -> dict[str, Any]:
    names = first.__code__.co_varnames[: first.__code__.co_argcount]
    return {name: case[name] for name in names}


def thin(items: Sequence[pytest.Item]) -> None:
    """Mark as `whole` what the fast suite leaves out."""
    laws: dict[tuple[str, str], list[pytest.Function]] = {}
    for item in items:
        asked = item.get_closest_marker("covering") and "slow" not in item.keywords and "whole" not in item.keywords
        if asked and isinstance(item, pytest.Function):
            laws.setdefault((str(item.path), item.originalname), []).append(item)
    for (_, name), cases in laws.items():
        mark = cases[0].get_closest_marker("covering")
        assert mark is not None
        start = zlib.crc32(name.encode())
        kept = set(covering([case.callspec.params for case in cases], mark.args, start=start, **mark.kwargs))
        assert kept, f"{name} has no case left: other laws have all values of its parameters"
        for n, case in enumerate(cases):
            if n not in kept:
                case.add_marker("whole")
