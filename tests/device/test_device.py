"""Everything runs on an accelerator: no tensor is left on the CPU, and the CPU does not wait for values in loops."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from processes import Child

from billhook.methods import METHODS

Case = tuple[str, dict[str, Any]]  # a family, and how it is pruned
SPARSE: dict[str, Any] = dict(ratio=None, sparsity=0.5)
TWO_OF_FOUR: dict[str, Any] = dict(ratio=None, pattern="2:4")
CASES: dict[str, Case] = {
    "fasp": ("llama", {}),
    "fasp, sensitivity": ("llama", dict(stream="dense_target", allocation="sensitivity", layout="per_layer")),
    "fasp, KV groups": ("gpt2", dict(axes=("ffn", "groups"), layout="per_layer")),
    "fasp, experts": ("qwen2_moe", dict(axes=("expert_ffn",), multiple_of=8)),
    "fasp, gradients": ("llama", dict(score="taylor2_vector")),
    "mope": ("llama", dict(method="mope")),
    "policy": ("llama", dict(method="policy", group=8)),
    "gates": ("llama", dict(method="gates", steps=4)),
    "softtopk": ("llama", dict(method="softtopk", steps=4)),
    "loraprune": ("llama", dict(method="loraprune", steps=12)),
    "mlpruning": ("llama", dict(method="mlpruning", steps=12, settling=4)),
    "l0": ("llama", dict(method="l0", steps=12)),
    "auto": ("llama", dict(method="auto", probes=2)),
    "adapruner": ("llama", dict(method="adapruner", trials=3, pool=8, pool_len=16)),
    "goa": ("llama", dict(method="goa", axes=("ffn", "groups"))),
    "rom": ("llama", dict(method="rom", layout="per_layer")),
    "bolaco": ("llama", dict(method="bolaco", layout="per_layer", rounds=3)),
    "lorc": ("llama", dict(method="lorc", keys="pairs", ratio=0.1)),
    "layerchop": ("llama", dict(method="layerchop", layers=2, ratio=None, preset="greedy", patch="linear")),
    "experts": ("olmoe", dict(method="experts", experts="uncurl")),
    "slicegpt": ("llama", dict(method="slicegpt")),
    "optishear": ("llama", dict(method="optishear", **SPARSE)),
    "magnitude": ("llama", dict(method="magnitude", **TWO_OF_FOUR)),
    "wanda": ("llama", dict(method="wanda", refit=True, **TWO_OF_FOUR)),
    "sparsegpt": ("phi3", dict(method="sparsegpt", stream="dense_target", **SPARSE)),
    "fistapruner": ("llama", dict(method="fistapruner", **TWO_OF_FOUR)),
    "admm": ("llama", dict(method="admm", **SPARSE)),
}
LONG = ("policy", "optishear", "adapruner", "fistapruner")
ONE_PASS = ("fasp", "wanda", "sparsegpt", "admm", "slicegpt", "goa")  # of which no part tries anything out


def in_a_process(check: str, *given: Any) -> None:
    """One of `device_checks`, which must not be imported here."""
    getattr(import_module("device_checks"), check)(*given)


def holds(check: str, *given: Any) -> None:
    code, _, said = Child(in_a_process, check, *given, fresh=True).ended()
    assert code == 0, said


def test_every_method_has_a_case() -> None:
    assert {how.get("method", "fasp") for _, how in CASES.values()} == set(METHODS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in CASES]
)
@pytest.mark.covering(some={"name": 4})
def test_every_method_prunes_as_on_the_cpu(name: str, text_file: Path) -> None:
    holds("every_method_prunes_as_on_the_cpu", CASES[name], text_file)


@pytest.mark.parametrize("name", ONE_PASS)
@pytest.mark.covering(some={"name": 3})
def test_waits_do_not_grow_with_the_text(name: str, text_file: Path) -> None:
    holds("waits_do_not_grow_with_the_text", CASES[name], text_file)


@pytest.mark.parametrize(
    "check",
    [
        "perplexity_is_as_on_the_cpu_whatever_the_windows",
        "a_trial_waits_as_often_for_more_windows",
        "layers_are_judged_without_waiting",
        "a_solver_waits_for_no_column",
        "refinement_is_as_on_the_cpu_whatever_the_windows",
        "a_look_is_as_on_the_cpu",
        "models_are_measured_side_by_side_as_on_the_cpu",
        "waits_are_counted",
    ],
)
def test_what_needs_no_method(check: str) -> None:
    holds(check)


@pytest.mark.parametrize("float64", [True, False])
def test_recovery_is_as_on_the_cpu(float64: bool, tmp_path: Path) -> None:
    """An Apple GPU, too, trains without float64."""
    holds("recovery_is_as_on_the_cpu", tmp_path, float64)
