"""Laws of the documentation: lines, links, navigation, and the form of the lab book."""

import re
import shlex
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from billhook.cli.commands import FORMER, command
from billhook.methods import METHODS
from billhook.planning.recipe import PARTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *DOCS.rglob("*.md"),
        *(ROOT / ".github").rglob("*.md"),
        *(ROOT / folder / "README.md" for folder in ("benchmarks", "recipes")),
    ]
)
LIMIT = 120  # characters of a line of prose; tables and links cannot be wrapped


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What `#…` may name: headings as GitHub and Python-Markdown shorten them, which agree on all of these pages."""
    headings = re.findall(r"^#+ (.+)", without_code(page.read_text()), re.M)
    words = [re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower() for heading in headings]
    objects = re.findall(r"^::: (\S+)", page.read_text(), re.M)  # of the Python API
    return {*(re.sub(r"[-\s]+", "-", word) for word in words), *objects}


def broken(page: Path) -> list[str]:
    """Links of a page, inline and by reference, whose file or heading is not there."""
    text = without_code(page.read_text())
    links = re.findall(r"\]\(<?([^)>\s]+)", text) + re.findall(r"^\[[^\]]+\]: (\S+)", text, re.M)
    used = {name or label for label, name in re.findall(r"\[([^\]`\n]+)\]\[([^\]\n]*)\]", text)}
    found = [f"[{name}]" for name in used - set(re.findall(r"^\[([^\]]+)\]:", text, re.M))]
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_readme_is_a_page() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= LIMIT


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_pages_name_exist(page: Path) -> None:
    folders = "tests|benchmarks|src/billhook|examples|recipes|docs"
    paths = re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/.-]*\w", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_pages_that_code_names_exist() -> None:
    text = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    assert [page for page in set(re.findall(r"(?<![\w/])docs/[\w/.-]+\.md", text)) if not (ROOT / page).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_fit(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert [
        line for line in lines if len(line) > LIMIT and not line.lstrip().startswith(("|", "[")) and " " in line
    ] == []


def pages_of(nav: list[Any]) -> list[str]:
    """The files of a navigation, which is a list of files, titled files and titled lists."""
    entries = [value for entry in nav for value in (entry.values() if isinstance(entry, dict) else [entry])]
    return [file for entry in entries for file in (pages_of(entry) if isinstance(entry, list) else [entry])]


def test_every_page_is_in_the_navigation_once() -> None:
    nav = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@cache
def hooks() -> ModuleType:
    """What the build of the site calls: docs/hooks.py."""
    spec = spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_field_of_a_recipe_is_told() -> None:
    assert hooks().fields("").count("\n| `") == sum(len(part.model_fields) for part in PARTS.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_page_that_asks_for_its_settings(method: str) -> None:
    marks = re.findall(r"^<!-- (\w+): (\w+) -->$", (DOCS / "methods" / f"{method}.md").read_text(), re.M)
    assert marks == [("method", method), ("settings", method)]
    page = "\n".join(f"<!-- {kind}: {of} -->" for kind, of in marks)
    filled = hooks().on_page_markdown(page, SimpleNamespace(file=SimpleNamespace(src_uri="methods"), meta={}))
    assert "<!--" not in filled and filled.count("| `") > 2 and METHODS[method].title in filled


def commands(page: Path) -> list[list[str]]:
    """Every `billhook …` that a page shows, in blocks and in lines, as words; continued lines are one."""
    text = page.read_text()
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.M | re.S)
    lines = [line for block in blocks for line in re.sub(r"\s*\\?\n +", " ", block).splitlines()]
    lines += re.findall(r"`(billhook [^`]+)`", without_code(text))
    return [shlex.split(re.sub(r"\s+", " ", line), comments=True)[1:] for line in lines if line.startswith("billhook ")]


@cache
def options(name: str) -> set[str]:
    """Every option of a command."""
    parameters = command(FORMER.get(name, name)).params
    return {"--help", *(option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts))}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_that_pages_show_exist(page: Path) -> None:
    """The command and each of its options, by its name alone: what it takes, the command line itself refuses."""
    for name, *words in commands(page):
        if name.startswith("-"):
            assert name in ("--help", "--version", "--install-completion")
        elif name != "COMMAND":
            flags = {word.partition("=")[0] for word in words if re.match("--?[a-z]", word)}
            assert flags <= options(name), f"billhook {name}: {flags - options(name)}"


def test_the_lab_book_is_a_table_of_decisions() -> None:
    table = (DOCS / "LOG.md").read_text().partition("## Decisions")[2].partition("## ")[0]
    head, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    assert head == "| decision | default it set | evidence | date |" and 25 <= len(rows) <= 40
    for row in rows:
        assert re.search(r"\| \[[^\]]+\]\[[^\]]+\] \| 2\d{3}-\d\d-\d\d \|$", row) and len(row) <= LIMIT, row


@pytest.mark.parametrize("page", sorted((DOCS / "log").glob("*.md")), ids=name)
def test_each_entry_of_the_lab_book_is_whole(page: Path) -> None:
    """Date, question, result, decision, command: an entry without one of them cannot be used by whoever comes next."""
    parts = ["Date", "Question", "Result", "Decision", "Command"]
    entries = re.split(r"^## ", without_code(page.read_text()), flags=re.M)[1:]
    assert entries
    for entry in entries:
        assert re.findall(rf"^\*\*({'|'.join(parts)})\*\*", entry, re.M) == parts, entry.splitlines()[0]


def test_a_broken_page_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](#here) [b](#there) [c](gone.md) [d][e] [f](https://example.org)\n\n[f]: page.md#here\n"
    )
    assert sorted(broken(page)) == ["#there", "[e]", "gone.md"]
