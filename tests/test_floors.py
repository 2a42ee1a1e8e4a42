"""The import order of the house: a folder imports folders of lower floors only, at the top of a file; inside one there
is no cycle.

`violations` reads source text alone, so the same checker that passes the package is shown to fail on bad sources.
"""

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import billhook
from billhook.models.families import FAMILIES

PACKAGE = Path(billhook.__file__).parent
FLOORS = (  # low to high: folders, and files that stand beside them
    {"errors"},
    {"choices", "tensors"},
    {"math", "runtime"},
    {"models", "reports", "demo"},
    {"calibration", "checkpoints", "data"},
    {"evaluation"},
    {"training"},
    {"cuts", "recovery"},
    {"search", "planning"},
    {"methods"},
    {"pruning"},
    {"cli", "results"},
    {"api"},  # the commands as functions
    {"", "__main__"},  # the doors: they load the rest on first use, since torch takes seconds
)
CLIENTS = "checkpoints.clients."
STANDALONE = {  # run where billhook is not: with checkpoints, or by a client's own Python
    "models.modeling_per_layer",
    *(f"{CLIENTS}{name}_client" for name in ("transformers", "vllm", "llamacpp")),
}
JUDGING = {"errors", "choices", "tensors", "runtime", "math", "models", "reports", "checkpoints", "data"}
MAY_IMPORT = {  # folders that may import few others
    "math": {"errors", "choices", "tensors"},
    "runtime": {"errors", "choices", "tensors"},
    "models": {"errors", "choices", "tensors", "runtime"},
    "reports": {"errors", "choices", "runtime"},
    "recovery": JUDGING | {"evaluation", "training"},
    "evaluation": JUDGING | {"demo"},
}
NUMERIC = {"torch", "numpy", "scipy"}  # what mathematics may stand on
NAME_FAMILIES = {
    "models.families",
    "models.modeling_per_layer",
    "models.stock_families",
    "models.multimodal",
    "checkpoints.gguf.architectures",
}
LAZY = {"", "__main__", "planning.method"}  # what takes seconds to load is loaded once nothing is left to refuse
LAZY_ROOMS = {"cli", "methods"}  # likewise, in every file of these folders
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
HEAVY = {  # may be, too
    "importlib.metadata",  # a tenth of a second, where no package adds anything
    "billhook.training.trainer",  # transformers' Trainer brings datasets, pandas and peft, 120 MB and a second
    "pydoc_data.topics",  # half a megabyte of text, which a look alone reads
    "billhook.runtime.yaml_files",  # the parser takes 50 ms, a tenth of what help may take
}
MAX_LINES = 400
TOKENIZERS = {"gpt2"}  # names of families that are names of tokenizers, too
FAMILY = re.compile(  # opt, OPTForCausalLM; not option
    rf"\b(?i:{'|'.join(set(FAMILIES) - TOKENIZERS)})(?!\.cpp|-quantize)(\b|(?=[A-Z][a-z]))"
)


def modules() -> dict[str, str]:
    """Source by module name, `billhook.` left off."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path.read_text() for name, path in paths.items()}


KNOWN = modules()


def imports(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every import, wherever it stands: (statement, dotted module); names of the package itself resolve to its
    modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node, inner if inner.removeprefix("billhook.") in KNOWN else base


def room(module: str) -> str:
    """The folder of a module, or the file that stands beside the folders."""
    return module.partition(".")[0]


def floor(module: str) -> int | None:
    return next((number for number, rooms in enumerate(FLOORS) if room(module) in rooms), None)


def import_violations(module: str, target: str) -> Iterator[str]:
    top, _, inside = target.partition(".")
    if not top:
        yield f"relative import {target}"
    elif top == "billhook":
        here, there = floor(module), floor(inside)
        if here is None or there is None:
            yield f"{room(module if here is None else inside)} has no floor"
        elif room(module) != room(inside) and there >= here:
            yield f"upward import of billhook.{inside}"
        elif room(inside) not in MAY_IMPORT.get(room(module), set()) | {room(module)} and room(module) in MAY_IMPORT:
            yield f"{room(module)} imports billhook.{inside}"
    elif room(module) == "math" and top not in NUMERIC and top not in sys.stdlib_module_names:
        yield f"math imports {top}"


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
            and room(module) not in LAZY_ROOMS
            and node not in tree.body
            and target.partition(".")[0] not in OPTIONAL
            and target not in HEAVY
        ):
            found.append(f"{target} is not imported at the top")
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else None
        name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
        if name in ("__import__", "import_module") and module not in LAZY | {"cli.commands"}:
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
        return node.name in ("__getattr__", "__dir__")
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    if isinstance(node, ast.Assign):
        try:
            return ast.unparse(node.targets[0]) == "__all__" and isinstance(ast.literal_eval(node.value), list)
        except ValueError:
            return False
    return isinstance(node, ast.ImportFrom) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def imports_within(folder: str, known: dict[str, str]) -> dict[str, set[str]]:
    """Of every module in a folder, those in it that it imports; the folder's own `__init__` has the folder's name."""
    inside = {module: source for module, source in known.items() if room(module) == folder}
    return {
        module: {
            target.removeprefix("billhook.")
            for _, target in imports(ast.parse(source))
            if target.removeprefix("billhook.") in inside
        }
        for module, source in inside.items()
    }


@pytest.mark.parametrize("module", KNOWN)
def test_a_module_keeps_to_its_floor(module: str) -> None:
    assert violations(module, KNOWN[module]) == []


@pytest.mark.parametrize("folder", sorted({room(module) for module in KNOWN}))
def test_no_cycle_in_a_folder(folder: str) -> None:
    assert list(graphlib.TopologicalSorter(imports_within(folder, KNOWN)).static_order())


def test_a_cycle_is_caught() -> None:
    cycle = {"math.a": "from billhook.math import b", "math.b": "from billhook.math.a import x"}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(graphlib.CycleError):
        patch.setitem(KNOWN, "math.a", "")
        patch.setitem(KNOWN, "math.b", "")
        list(graphlib.TopologicalSorter(imports_within("math", cycle)).static_order())


def test_every_floor_is_inhabited() -> None:
    assert {room(module) for module in KNOWN} == set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(set().union(*FLOORS))


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("models.axes", "from billhook.calibration.walk import walk", "upward import of billhook.calibration.walk"),
        ("demo", "import billhook.data", "upward import of billhook.data"),
        ("data", "from billhook.checkpoints import load", "upward import of billhook.checkpoints.load"),  # same floor
        ("recovery.setup", "from billhook.methods import METHODS", "upward import of billhook.methods"),
        ("pruning.recipe", "from billhook import BillhookError", "upward import of billhook"),
        ("pruning.recipe", "from billhook.utils import helper", "utils has no floor"),
        ("math.selection", "import billhook.models.axes", "upward import of billhook.models.axes"),
        ("math.selection", "from billhook.runtime import cache", "upward import of billhook.runtime.cache"),
        ("math.restore", "from transformers import PreTrainedModel", "math imports transformers"),
        ("models.surgery", "from billhook.math import restore", "models imports billhook.math.restore"),
        ("reports.card", "from billhook.math.layer_presets import cuts", "reports imports billhook.math.layer_presets"),
        (
            "evaluation.speed",
            "from billhook.calibration.walk import walk",
            "evaluation imports billhook.calibration.walk",
        ),
        ("pruning.recipe", "def f():\n    import yaml", "yaml is not imported at the top"),
        ("pruning.recipe", "if True:\n    from billhook import data", "billhook.data is not imported at the top"),
        ("pruning.recipe", "from . import data", "relative import"),
        ("math.linalg", "x = __import__('transformers')", "__import__ hides an import"),
        ("data", "print('hello')", "print outside cli"),
        ("models.surgery", "if kind == 'opt':\n    pass", "family name in 'opt'"),
        ("models.surgery", "x = f'{y} is a Llama'", "family name in ' is a Llama'"),
        ("checkpoints.load", "from transformers import OPTForCausalLM", "family name in 'OPTForCausalLM'"),
        ("reports.records", "\n" * 401, "401 lines"),
        ("", "from billhook.pruning.recipe import prune\nVERSION = compute()", "logic in __init__"),
        ("", "from billhook.pruning.recipe import prune\ndef f(): ...", "logic in __init__"),
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
        (
            "models.surgery",
            '"""Cuts a llama."""\nfrom billhook.models import axes\n\n\ndef f():\n    """Also an OPT."""',
        ),
        ("models.sizes", "OPTIONS = 'an option, optional, OPTIMAL'"),
        ("math.scores", "import math\n\nimport torch\n\nfrom billhook.math.linalg import factor"),
        ("", '"""Doc."""\n\nfrom billhook.pruning.recipe import prune\n\n__all__ = ["prune"]'),
    ],
)
def test_the_checker_lets_pass(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_a_folder_lists_its_files() -> None:
    for module in KNOWN:
        folder, _, name = module.rpartition(".")
        if folder:
            listed = {line.split()[0] for line in (ast.get_docstring(ast.parse(KNOWN[folder])) or "").splitlines()[2:]}
            assert name in listed or any(other.startswith(f"{module}.") for other in KNOWN), module


def test_the_map_names_every_room() -> None:
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    assert all(f"`{one}/`" in page or f"`{one}.py`" in page for one in set().union(*FLOORS) - FLOORS[-1])
