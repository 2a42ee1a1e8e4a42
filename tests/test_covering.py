"""What the fast suite leaves out of a law is never a value, and never the law."""

from itertools import product
from typing import Any

from covering import covering

ROWS, WAYS, SIZES = ("a", "b", "c", "d", "e"), ("x", "y", "z"), (1, 2)
CASES: list[dict[str, Any]] = [{"row": r, "way": w, "size": s} for r, w, s in product(ROWS, WAYS, SIZES)]


def values(chosen: list[int], *names: str) -> set[tuple[Any, ...]]:
    return {tuple(CASES[n][name] for name in names) for n in chosen}


def test_every_value_occurs_in_as_few_cases_as_it_takes() -> None:
    found = covering(CASES)
    assert len(found) == len(ROWS)
    for name, all_of_them in (("row", ROWS), ("way", WAYS), ("size", SIZES)):
        assert values(found, name) == {(one,) for one in all_of_them}


def test_pairs_that_are_named_all_occur() -> None:
    found = covering(CASES, ["row, size"])
    assert len(found) == len(ROWS) * len(SIZES)
    assert values(found, "row", "size") == set(product(ROWS, SIZES)) and values(found, "way") == {(w,) for w in WAYS}


def test_values_come_about_equally_often() -> None:
    rows = [{"family": n, "kind": kind} for n in range(28) for kind in range(4)]
    kinds = [rows[n]["kind"] for n in covering(rows)]
    assert sorted(kinds.count(kind) for kind in range(4)) == [7, 7, 7, 7]


def test_cases_that_say_more_come_first_and_the_others_where_only_they_have_a_value() -> None:
    def telling(row: str, way: str) -> bool:
        return way != "z" and row != "e"

    found = covering(CASES, first=telling)
    assert [CASES[n]["row"] for n in found if not telling(CASES[n]["row"], CASES[n]["way"])] == ["e"]
    assert values(found, "way") == {(w,) for w in WAYS} and values(found, "row") == {(r,) for r in ROWS}


def test_a_choice_is_the_same_each_time_and_another_where_it_starts_elsewhere() -> None:
    assert covering(CASES, start=3) == covering(CASES, start=3) != covering(CASES)


def test_laws_that_take_long_share_the_values_of_a_parameter() -> None:
    found = [covering(CASES, some={"row": 3}, start=n) for n in range(3)]
    assert all(values(one, "way") == {(w,) for w in WAYS} and len(one) == 3 for one in found)
    shared = [covering([{"row": r} for r in ROWS], some={"row": 3}, start=n) for n in range(3)]
    assert sorted(n for one in shared for n in one) == list(range(len(ROWS))) and max(map(len, shared)) == 2


def test_what_cannot_be_hashed_is_a_value_too() -> None:
    rows = [{"settings": {"a": n % 2}, "flag": n > 1} for n in range(4)]
    assert len(covering(rows)) == 2
