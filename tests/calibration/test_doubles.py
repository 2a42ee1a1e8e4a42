"""What needs float64 runs on a device that has none, and comes out as on the CPU."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from processes import Child

from billhook.choices import MEASURED_PRESETS, PATCHES

Case = tuple[str, dict[str, Any]]  # a family, and how it is pruned
CHOPPED: dict[str, Any] = dict(method="layerchop", layers=7, ratio=None)
SPARSE: dict[str, Any] = dict(sparsity=0.5, ratio=None)
LAYERWISE: dict[str, Any] = dict(allocation="sensitivity", layout="per_layer")
FAST: dict[str, Case] = {
    "fasp": ("llama", {}),
    "fasp in the dense stream": ("gpt2", dict(stream="dense", axes=("ffn",))),
    "goa": ("llama", dict(method="goa", axes=("ffn", "groups"))),
    "gradients": ("llama", dict(score="taylor1_element")),
    "slicegpt": ("llama", dict(method="slicegpt", rotate=False)),
    "slicegpt, rotated": ("llama", dict(method="slicegpt", rotate=True)),
    "slicegpt, a scaled embedding": ("gemma2", dict(method="slicegpt", rotate=False)),
    "layerchop block-influence": ("llama", dict(preset="block-influence", **CHOPPED)),
    "layerchop angular": ("llama", dict(preset="angular", **CHOPPED)),
    "layerchop taylor": ("llama", dict(preset="taylor", **CHOPPED)),
    "experts reap": ("olmoe", dict(method="experts", experts="reap")),
    "experts uncurl": ("olmoe", dict(method="experts", experts="uncurl")),
    "wanda": ("llama", dict(method="wanda", stream="dense", **SPARSE)),
}
SLOW: dict[str, Case] = {
    "fasp and layers": ("llama", dict(axes=("ffn", "layers"), **LAYERWISE)),
    "sensitivity": ("llama", LAYERWISE),
    "heads": ("llama", dict(axes=("ffn", "groups"), layout="per_layer")),
    "adapruner": ("llama", dict(method="adapruner", trials=3, pool=8, pool_len=16, layout="per_layer")),
    "slicegpt, norms over heads": ("qwen3", dict(method="slicegpt")),
    "optishear": ("llama", dict(method="optishear", **SPARSE)),
    **{
        name: ("llama", dict(preset=preset, **CHOPPED))
        for preset in MEASURED_PRESETS
        if (name := f"layerchop {preset}") not in FAST
    },
    **{
        f"layerchop, {patch} for the layers": ("llama", dict(preset="middle", patch=patch, **CHOPPED))
        for patch in PATCHES
        if patch != "none"
    },
    **{
        f"{method}, {stream}": ("llama", dict(method=method, stream=stream, **SPARSE))
        for method in ("magnitude", "wanda", "sparsegpt", "admm", "fistapruner")
        for stream in ("dense", "sequential", "dense_target")
    },
}


def in_a_process(check: str, *given: Any) -> None:
    """One of `doubles_checks`, which must not be imported here."""
    getattr(import_module("doubles_checks"), check)(*given)


def holds(check: str, *given: Any) -> None:
    code, _, said = Child(in_a_process, check, *given, fresh=True).ended()
    assert code == 0, said


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(FAST[name], id=name) for name in FAST),
        *(pytest.param(SLOW[name], id=name, marks=pytest.mark.slow) for name in SLOW),
    ],
)
@pytest.mark.covering(some={"case": 2})
def test_every_method_prunes_as_on_the_cpu(case: Case, text_file: Path) -> None:
    holds("every_method_prunes_as_on_the_cpu", case, text_file)


def test_windows_are_grouped_as_on_the_cpu() -> None:
    holds("windows_are_grouped_as_on_the_cpu")


def test_kept_grams_are_read_to_where_float64_is(tmp_path: Path) -> None:
    holds("kept_grams_are_read_to_where_float64_is", tmp_path)


def test_a_metric_is_tried_as_on_the_cpu() -> None:
    holds("a_metric_is_tried_as_on_the_cpu")


def test_the_device_refuses_what_an_apple_gpu_refuses() -> None:
    holds("the_device_refuses_what_an_apple_gpu_refuses")
