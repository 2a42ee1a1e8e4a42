"""A recipe is the same however it is written: by keywords, by part in a file, as the command that its report names."""

import shlex
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from typer.testing import CliRunner

from billhook.cli.commands import app
from billhook.methods import METHODS
from billhook.planning.command import command
from billhook.planning.method import Method, flaw
from billhook.planning.recipe import Recipe
from billhook.pruning.recipe import changed, read_recipe, recipe

GIVEN: dict[str, dict[str, Any]] = {  # settings that differ from their defaults, of every method
    "fasp": dict(ratio=0.2, score="wanda", restoration=False, axes=("ffn", "groups"), clients=("vllm", "llama.cpp")),
    "auto": dict(ratio=0.2, effort="quick", refine=False, layout="per_layer", look=False),
    "mope": dict(ratio=0.2, metric="loss", order="global", stage="joint", layout="per_layer", parts=4),
    "policy": dict(ratio=0.2, steps=9, masks=3, rate=0.125, exact=True, variant="paper", axes=("groups", "ffn")),
    "gates": dict(ratio=0.2, way="straight-through", steps=9, scaling=3, restoration=False, objective="nll"),
    "softtopk": dict(
        ratio=0.2, steps=9, heat=0.25, reopen=False, rate=0.2, calibration="code.txt", axes=("groups", "ffn")
    ),
    "loraprune": dict(ratio=0.2, steps=12, rank=4, objective="kl", shuffled=True, axes=("heads", "ffn")),
    "mlpruning": dict(ratio=0.2, steps=12, rate=0.2, score="wanda", objective="nll", axes=("heads", "ffn")),
    "l0": dict(ratio=0.2, steps=12, rank=0, rate=0.5, adapter_rate=0.01, objective="nll", layout="per_layer"),
    "adapruner": dict(
        params="100M", trials=9, validation=("a b.txt", "c.txt"), calibration="x.txt+y.txt", space="paper"
    ),
    "layerchop": dict(drop="2-3", patch="linear", damping=0.02, held_out=("a.txt",)),
    "experts": dict(ratio=0.25, experts="uncurl", stream="sequential", seed=3),
    "slicegpt": dict(memory="250MB", rotate=False, correction=0.4, vocab_from=("it's.txt",), vocab_size=9),
    "goa": dict(ratio=0.2, score="measured", share=0.3, after=True, axes=("heads",)),
    "rom": dict(ratio=0.2, layout="per_layer", moment="plain", stream="dense", last=4),
    "bolaco": dict(ratio=0.2, layout="per_layer", moment="centred", rounds=9),
    "lorc": dict(kv=0.75, layout="per_layer", rule="uniform", value_basis="channels"),
    "magnitude": dict(pattern="2:4", targets=("gate", "up"), refit=True),
    "wanda": dict(sparsity=0.5, layer_sparsity={0: 0.123456789, 2: 0.7}, keep_zeros=False),
    "optishear": dict(sparsity=0.5, sampler="random", minutes=1.5, objective="kl"),
    "sparsegpt": dict(sparsity=0.4, stream="dense", device="cpu"),
    "fistapruner": dict(sparsity=0.5, refit=False, normalised=False, init="wanda"),
    "admm": dict(sparsity=0.5, init="dense", seq_len=64, samples=3, dtype="bfloat16"),
}


class _Read(Exception):
    """Carries the recipe that a command has read."""


@pytest.mark.parametrize("method", METHODS)
def test_a_file_and_a_command_say_the_same(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe(method, **GIVEN[method])
    for name, content in (("nested", chosen.nested()), ("flat", {"method": method, **GIVEN[method]})):
        path = tmp_path / f"{name}.yaml"
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in content.items()}
        path.write_text(yaml.safe_dump({"model": "demo", **plain}))
        file = read_recipe(path)
        assert file.recipe == chosen and bool(file.note) == (name == "flat")
    assert changed(chosen) == chosen

    def read(*given: Any, **more: Any) -> NoReturn:
        raise _Read(recipe(*given, **more))

    line = command(chosen, "demo").split()
    monkeypatch.setattr(f"billhook.cli.{line[1]}.recipe", read)
    ended = CliRunner().invoke(app, shlex.split(command(chosen, "demo"))[1:])
    assert isinstance(ended.exception, _Read), ended.output
    again: Recipe = ended.exception.args[0]
    assert again == chosen


class Own(Method):
    name, title, paper, does, needs, costs, example = ("own",) * 7


def test_a_method_of_another_package_that_cannot_be_taken_is_told() -> None:
    assert flaw("own", Own()) == ""
    assert flaw("own", object()) == "is no Method"
    assert "calls itself own" in flaw("other", Own())
    assert "paper" in flaw("own", type("Bare", (Method,), {"name": "own", "title": ""})())
    assert "budget" in flaw("own", type("Odd", (Own,), {"budgets": ("weight",)})())
    clash = type("Clash", (Own,), {"Settings": METHODS["fasp"].Settings, "name": "own"})
    assert flaw("own", clash()) == ""
    taken = type("Taken", (METHODS["fasp"].Settings,), {"__annotations__": {"calibration": str}, "calibration": ""})
    assert "calibration" in flaw("own", type("Clash", (Own,), {"Settings": taken})())


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({"method": "fasp"}, 64),
        ({"method": "auto", "effort": "quick"}, 64),
        ({"method": "auto"}, 192),
        ({"method": "auto", "effort": "thorough"}, 512),
        ({"method": "auto", "minutes": 5}, 512),
    ],
)
def test_a_method_says_how_many_windows_it_reads_unless_the_user_does(settings: dict[str, Any], windows: int) -> None:
    assert recipe(ratio=0.2, **settings).samples == windows
    assert recipe(ratio=0.2, samples=7, **settings).samples == 7
