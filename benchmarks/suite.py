"""CPU seconds of the fast suite, in one process: python benchmarks/suite.py --part 0/6 tests

User and system, of processes that tests start as well.  Prints the time of collection, of the tests, of the files and
of the functions that take most.  A part is one test in so many, the same ones each time; its first test of each kind
pays for what the others of the whole suite share.
"""

import argparse
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

LISTED = 20


def cpu_seconds() -> float:
    """Of this process, of its children that have ended, and of those that run, with theirs."""
    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])  # own user and system, and those of ended children
        except psutil.NoSuchProcess:
            continue
    return total


class Plugin:
    """Times each test with its setup and teardown."""

    def __init__(self, part: int, parts: int) -> None:
        self.part, self.parts = part, parts
        self.files, self.functions = Counter[str](), Counter[str]()
        self.collected = 0.0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % self.parts == self.part]

    def pytest_collection_finish(self) -> None:
        self.collected = cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        before = cpu_seconds()
        done = yield
        spent = cpu_seconds() - before
        self.files[item.nodeid.split("::")[0]] += spent
        self.functions[item.nodeid.split("[")[0]] += spent
        return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="0/1", help="K/N: every test of the K-th of N parts")
    parser.add_argument("tests", nargs="*", default=["tests"])
    given = parser.parse_args()
    plugin = Plugin(*map(int, given.part.split("/")))
    code = pytest.main(["-p", "no:xdist", "-p", "no:cacheprovider", *given.tests], plugins=[plugin])
    print(f"\ncollection {plugin.collected:.1f} s, tests {plugin.files.total():.1f} s of CPU\n")
    for counts in (plugin.files, plugin.functions):
        print("\n".join(f"{spent:8.1f}  {name}" for name, spent in counts.most_common(LISTED)), end="\n\n")
    sys.exit(code)
