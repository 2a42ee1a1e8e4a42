"""The import order of the house: every module stands on a floor and imports only from below it, at its top.

`violations` reads source text alone, so the same checker that passes the package is shown to fail on bad sources.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import billhook
from billhook.modeling_per_layer import FAMILIES

PACKAGE = Path(billhook.__file__).parent
STANDALONE = {  # run where billhook is not: with checkpoints, or by a client's own Python
    *("modeling_per_layer", "transformers_client", "vllm_client", "llamacpp_client"),
}
FLOORS: tuple[tuple[str, ...], ...] = (  # low to high; modules of one floor do not import each other
    ("pages", "pages.scales", "pages.words", "pages.markup"),
    (
        *("errors", "ending", "locks", "renaming"),
        "tensors",
        "doubles",
        "precision",
        "cached",
        "progress",
        "cuts",
        "plan",
        "memory",
        "modes",
        "overlap",
        "around",
        "flags",
        "greedy",
        "interpreters",
        *("generation", "belongings"),
        "tensorfile",
        *STANDALONE,
        "gguf_archs",
        "pages.tables",
    ),
    (
        *(
            "documents",
            "linalg",
            "losses",
            "atomic",
            "scratch",
            "paging",
            "amounts",
            "llamacpp",
            "gguf_vocab",
            "gguf_file",
            "gguf_rope",
            "knee",
            "depth",
        ),
        "writing",
        *("pages.charts", "pages.recovery_tables", "pages.search_tables"),
    ),
    (
        "gguf_words",
        "store",
        "claim",
        "history",
        "hidden",
        "headers",
        "textfile",
        "pages.cut_tables",
        "pages.healing",
        "pages.searched",
        "pages.style",
        "pace",
        "demo",
    ),
    (
        "shards",
        "crew",
        "grams",
        "scores",
        "taylor",
        "solution",
        "allocate",
        "choose",
        "restore",
        "sparsity",
        "axes",
        "merging",
    ),
    ("families", "older", "support", "data", "teacher", "pages.headline"),
    (
        "surgery",
        "fitted",
        "observe",
        "gradients",
        "layout",
        "quality",
        "trainables",
        "zeros",
        "experts",
        "known",
        "residual",
        "configs",
    ),
    ("naming",),
    ("contents",),
    (
        "budget",
        "saving",
        "own_code",
        "export",
        "vocabulary",
        "refit",
        "rotation",
        "evidence",
        "operators",
        "routing",
        "methods.magnitude",
        "methods.wanda",
        "methods.sparsegpt",
    ),
    ("refused",),
    ("skeleton", "journal"),
    ("restream", "gguf_in"),
    ("methods.*", "checkpoint", "speed", "zeroshot", "report", "course", "reading", "pool"),
    ("methods", "clients", "spreading", "sensitivity", "chopping", "evaluate", "training", "pages.page"),
    ("allocation", "slicing", "timing", "publish", "blocks", "masking", "sharing"),
    ("space", "trials"),
    ("samplers",),
    ("recipe",),
    ("planning", "recovery", "rounds", "recipe_file"),
    ("runs", "selection", "searching", "result", "feasible"),
    ("shearing",),
    ("pruning", "rehearsal"),
    ("contest", "recovering", "forecast", "estimate"),
    ("cli.shared",),
    ("cli.*",),
    ("cli",),
    ("", "__main__"),  # the doors: they load the rest on first use, since torch takes seconds
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
NUMERIC = {"torch", "numpy", "scipy"}  # what mathematics may stand on
WORDS = {"errors", "tensors", "doubles"}  # what mathematics and structure may both stand on
MATHEMATICS = {
    "depth",
    "linalg",
    "losses",
    "scores",
    "taylor",
    "solution",
    "allocate",
    "choose",
    "restore",
    "sparsity",
    "support",
    "knee",
    "merging",
}
STRUCTURE = {
    "tensorfile",
    "axes",
    "families",
    "surgery",
    "layout",
    "experts",
    "known",
    "residual",
    "rotation",
    "paging",
}
NAME_FAMILIES = {"families", "modeling_per_layer", "gguf_archs"}
ROOM = re.compile(r"\..*")  # methods.fasp -> methods.*
LAZY = {"", "__main__"}
OPTIONAL = {
    "datasets",
    "huggingface_hub",
    "lm_eval",
    "peft",
    "optuna",
    "pyarrow",
    "ray",
    "tqdm",
}  # may be imported inside a function
HEAVY = {
    "billhook.training"
}  # may be, too: transformers' Trainer brings datasets, pandas and peft, 120 MB and a second
MAX_LINES = 400
TOKENIZERS = {"gpt2"}  # names of families that are names of tokenizers, too
FAMILY = re.compile(  # opt, OPTForCausalLM; not option
    rf"\b(?i:{'|'.join(set(FAMILIES) - TOKENIZERS)})(?!\.cpp)(\b|(?=[A-Z][a-z]))"
)


def modules() -> dict[str, str]:
    """Source by module name, `billhook.` left off."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path.read_text() for name, path in paths.items()}


KNOWN = modules()


def imports(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every import, wherever it stands: (statement, dotted module); names of the package itself resolve to its modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node, inner if inner.removeprefix("billhook.") in KNOWN else base


def floor(module: str) -> int | None:
    return FLOOR.get(module, FLOOR.get(ROOM.sub(".*", module)))


def import_violations(module: str, target: str) -> Iterator[str]:
    top, _, inside = target.partition(".")
    if not top:
        yield f"relative import {target}"
    elif top == "billhook":
        here, there = floor(module), floor(inside)
        if here is None or there is None:
            yield f"{module if here is None else inside} has no floor"
        elif there >= here:
            yield f"upward import of billhook.{inside}"
        if module in MATHEMATICS and inside not in MATHEMATICS | WORDS:
            yield f"mathematics imports billhook.{inside}"
        if module in STRUCTURE and inside not in STRUCTURE | STANDALONE | WORDS:
            yield f"structure imports billhook.{inside}"
    elif module in MATHEMATICS and top not in NUMERIC and top not in sys.stdlib_module_names:
        yield f"mathematics imports {top}"


def texts(tree: ast.Module) -> Iterator[str]:
    """String constants that are not docstrings, and the names that imports bring in."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = [node for node in ast.walk(tree) if isinstance(node, owners) and ast.get_docstring(node) is not None]
    docstrings = {id(node.body[0].value) for node in documented if isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        elif isinstance(node, ast.alias):
            yield node.name


def violations(module: str, source: str) -> list[str]:
    """All that is wrong with the source text of billhook.`module`."""
    tree, found = ast.parse(source), []
    for node, target in imports(tree):
        found += import_violations(module, target)
        if (
            module not in LAZY
            and node not in tree.body
            and target.partition(".")[0] not in OPTIONAL
            and target not in HEAVY
        ):
            found.append(f"{target} is not imported at the top")
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else None
        name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
        if name in ("__import__", "import_module"):
            found.append(f"{name} hides an import")
        if name == "print" and not module.startswith("cli") and module not in STANDALONE:
            found.append("print outside cli")
    if module in STANDALONE:
        found += [f"{target} does not travel" for _, target in imports(tree) if target.startswith("billhook")]
    if module not in NAME_FAMILIES:
        found += [f"family name in {text!r}" for text in texts(tree) if FAMILY.search(text)]
    if source.count("\n") > MAX_LINES:
        found.append(f"{source.count(chr(10))} lines")
    if not module and not all(map(_exports, tree.body)):
        found.append("logic in __init__")
    return found


def _exports(node: ast.stmt) -> bool:
    """Whether a statement is an import, a docstring, a plain list assigned to `__all__`, or what makes imports lazy."""
    if isinstance(node, ast.FunctionDef):
        return node.name == "__getattr__"
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    if isinstance(node, ast.Assign):
        try:
            return ast.unparse(node.targets[0]) == "__all__" and isinstance(ast.literal_eval(node.value), list)
        except ValueError:
            return False
    return isinstance(node, ast.ImportFrom) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


@pytest.mark.parametrize("module", KNOWN)
def test_a_module_keeps_to_its_floor(module: str) -> None:
    assert floor(module) is not None, f"give {module} a floor in FLOORS"
    assert violations(module, KNOWN[module]) == []


def test_every_floor_is_inhabited() -> None:
    assert {name if name in FLOOR else ROOM.sub(".*", name) for name in KNOWN} == set(FLOOR)
    assert len(FLOOR) == sum(map(len, FLOORS))


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("axes", "from billhook.families import axes", "upward import of billhook.families"),
        (
            "demo",
            "import billhook.data",
            "upward import of billhook.data",
        ),  # data imports demo: the cycle's one edge up
        ("speed", "from billhook import checkpoint", "upward import of billhook.checkpoint"),  # same floor
        ("methods.fasp", "from billhook.methods import METHODS", "upward import of billhook.methods"),
        ("methods.new", "from billhook.methods.fasp import fit", "upward import of billhook.methods.fasp"),
        ("recipe", "from billhook import BillhookError", "upward import of billhook"),
        ("recipe", "from billhook.utils import helper", "utils has no floor"),
        ("choose", "import billhook.axes", "mathematics imports billhook.axes"),
        ("restore", "from transformers import PreTrainedModel", "mathematics imports transformers"),
        ("surgery", "from billhook import restore", "structure imports billhook.restore"),
        ("families", "from billhook.linalg import factor", "structure imports billhook.linalg"),
        ("recipe", "def f():\n    import yaml", "yaml is not imported at the top"),
        ("recipe", "if True:\n    from billhook import data", "billhook.data is not imported at the top"),
        ("recipe", "from . import data", "relative import"),
        ("linalg", "x = __import__('transformers')", "__import__ hides an import"),
        ("data", "print('hello')", "print outside cli"),
        ("surgery", "if kind == 'opt':\n    pass", "family name in 'opt'"),
        ("surgery", "x = f'{y} is a Llama'", "family name in ' is a Llama'"),
        ("checkpoint", "from transformers import OPTForCausalLM", "family name in 'OPTForCausalLM'"),
        ("report", "\n" * 401, "401 lines"),
        ("", "from billhook.recipe import prune\nVERSION = compute()", "logic in __init__"),
        ("", "from billhook.recipe import prune\ndef f(): ...", "logic in __init__"),
        ("", "import torch\n__all__ = sorted(globals())", "logic in __init__"),
    ],
)
def test_the_checker_catches(module: str, source: str, wrong: str) -> None:
    assert any(text.startswith(wrong) for text in violations(module, source)), violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data", "def f():\n    from datasets import load_dataset"),
        ("cli", "print('hello')"),
        ("surgery", '"""Cuts a llama."""\nfrom billhook import axes\n\n\ndef f():\n    """Also an OPT."""'),
        ("budget", "OPTIONS = 'an option, optional, OPTIMAL'"),
        ("scores", "import math\n\nimport torch\n\nfrom billhook.linalg import factor"),
        ("", '"""Doc."""\n\nfrom billhook.recipe import prune\n\n__all__ = ["prune"]'),
    ],
)
def test_the_checker_lets_pass(module: str, source: str) -> None:
    assert violations(module, source) == []
