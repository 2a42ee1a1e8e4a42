"""Every budget reaches what it says: counted from what is written, from a real KV cache, and from a clock that is
known."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_bad_input
import tiny
import torch
from safetensors import safe_open
from test_allocation import deep, planned
from test_bad_input import Bench
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from billhook.checkpoints import load
from billhook.cuts.narrowing import Settings, narrow
from billhook.errors import BillhookError
from billhook.models import cached, sizes
from billhook.models.axes import axes
from billhook.models.families import layers
from billhook.models.plan import Plan
from billhook.planning import latency
from billhook.pruning.recipe import recipe
from billhook.runtime.run import Run

bench = test_bad_input.bench

UNEVEN = ["--layout", "per_layer", "--allocation"]
WAYS: dict[str, list[object]] = {
    "equal": [],
    "skip": [*UNEVEN, "skip:1,0"],
    "sensitivity": [*UNEVEN, "sensitivity", "--axes", "ffn,groups"],
}


def carried_out(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """A copy of the model, cut as the plan says, without repair."""
    cut = copy.deepcopy(model)
    narrow(cut, tiny.tokens(2, 16), plan, Settings(score="energy", restoration=False, stream="dense"), Run())
    return cut


def stored(folder: Path) -> tuple[int, int]:
    """Parameters and bytes of the tensors in a folder."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
    return sum(t.numel() for t in tensors), sum(t.numel() * t.itemsize for t in tensors)


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, context: int, batch: int) -> int:
    """Of keys and values after `context` tokens."""
    cache = DynamicCache(config=model.config)
    model(tiny.tokens(batch, context), **{cached.NAME: cache}, use_cache=True)
    return sum(t.numel() * t.itemsize for layer in cache.layers for t in (layer.keys, layer.values))


def unbudgeted(bench: Bench, *more: object) -> list[object]:
    """Arguments of a prune without a budget."""
    arguments = bench.prune(*more)
    at = arguments.index("--ratio")
    return arguments[:at] + arguments[at + 2 :]


def pruned(bench: Bench, *more: object) -> dict[str, Any]:
    code, out, err = bench.run(*unbudgeted(bench, "--json", *more))
    assert (code, err) == (0, ""), err
    return json.loads(out)


def step(model: PreTrainedModel, way: str, multiple_of: int) -> int:
    """Parameters of one step of the FFN width, in every layer that gives some."""
    givers = {"equal": 3, "skip": 2}.get(way, 1)
    return multiple_of * givers * axes(model, ("ffn",))[0].price(model)


# through the command line


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.covering(some={"way": 2})
def test_a_number_of_parameters_is_reached(way: str, bench: Bench) -> None:
    before, goal = stored(bench.model)[0], 28_100
    report = pruned(bench, "--params", "28.1K", *WAYS[way])
    after = stored(bench.tmp / "new" / "out")[0]
    assert abs(after - goal) <= step(load.load(bench.model), way, 4) / 2
    assert report["sizes"]["after"]["parameters"] == after < before == report["sizes"]["before"]["parameters"]
    assert "28,100" in json.dumps(report["sizes"])


def test_a_ratio_is_reached(bench: Bench) -> None:
    model = load.load(bench.model)
    pruned(bench, "--ratio", 0.23, *WAYS["sensitivity"])
    gone = sizes.total_parameters(model) - stored(bench.tmp / "new" / "out")[0]
    assert abs(gone - 0.23 * sizes.decoder_parameters(model)) <= step(model, "sensitivity", 4) / 2


@pytest.mark.parametrize("way", [*WAYS, "value", "half"])
@pytest.mark.covering(some={"way": 2})
def test_a_memory_is_reached(way: str, bench: Bench) -> None:
    """Within 2 % of the tensors in the file and of a real cache, in the dtype that is stored."""
    if way == "half":
        AutoModelForCausalLM.from_pretrained(bench.model).to(torch.bfloat16).save_pretrained(bench.model)
    more = {"value": [*UNEVEN, "skip:1,0", "--axes", "ffn,value"], "half": ["--axes", "ffn,groups"]} | WAYS
    whole = stored(bench.model)[1] + cache_bytes(load.load(bench.model), 96, 2)
    goal = round(0.88 * whole)
    pruned(bench, "--memory", f"{goal / 1000}kB", "--context", 96, "--batch", 2, "--multiple-of", 2, *more[way])
    out = bench.tmp / "new" / "out"
    held = stored(out)[1] + cache_bytes(load.load(out), 96, 2)
    assert held == pytest.approx(goal, rel=0.02)


@pytest.fixture
def known_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer takes a nanosecond a parameter; embedding and head take as long as half a layer."""

    def seconds(task: Callable[[], object], whole: float) -> float:
        task()
        (layer,) = task.__defaults__ or (None,)
        return 1e-9 * (sum(p.numel() for p in layer.parameters()) if layer is not None else whole)

    def in_turns(tasks: list[Callable[[], object]], device: torch.device, tick: object) -> list[float]:
        first = seconds(tasks[1], 0) * 1e9
        return [seconds(task, 3.5 * first) for task in tasks]

    monkeypatch.setattr(latency, "_in_turns", in_turns)


@pytest.mark.usefixtures("known_clock")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.covering(some={"way": 2})
def test_a_speedup_is_reached(way: str, bench: Bench) -> None:
    pruned(bench, "--speedup", 1.2, "--multiple-of", 2, *WAYS[way])
    before, after = (load.load(folder) for folder in (bench.model, bench.tmp / "new" / "out"))
    per_layer = sizes.layer_parameters(before, 0)
    took = [0.5 * per_layer + sizes.decoder_parameters(model) for model in (before, after)]
    assert took[0] / took[1] == pytest.approx(1.2, rel=0.01)


# plans alone


@pytest.mark.usefixtures("known_clock")
@pytest.mark.parametrize("kinds", [("ffn",), ("ffn", "groups"), ("ffn", "value"), ("ffn", "heads"), ("ffn", "layers")])
def test_the_table_of_layer_times_adds_up(kinds: tuple[str, ...]) -> None:
    model = tiny.model("llama")
    found = axes(model, kinds)
    seconds = latency.layer_times(model, tuple(kind for kind in kinds if kind != "layers"))
    plan = Plan(
        {(a.layer, a.kind): a.blocks * (a.layer + 1) for a in found if a.units > 2 * a.blocks},
        (1,) if "layers" in kinds else (),
    )
    plan = Plan({place: n for place, n in plan.drops.items() if place[0] not in plan.layers}, plan.layers)
    saved = sizes.saved_by(model, plan)
    assert seconds(Plan()) == pytest.approx(3.5e-9 * sizes.layer_parameters(model, 0))
    assert seconds(Plan()) - seconds(plan) == pytest.approx(1e-9 * saved) and saved > 0


def test_timing_leaves_the_model_as_it_was() -> None:
    model = tiny.model("qwen3")
    before, modules = {k: p.clone() for k, p in model.named_parameters()}, list(model.modules())
    seconds = latency.layer_times(model, ("ffn", "groups"))
    assert seconds(Plan()) > 0 and list(model.modules()) == modules
    assert all(torch.equal(p, before[k]) for k, p in model.named_parameters())


@pytest.mark.usefixtures("known_clock")
def test_an_axis_that_can_give_nothing_stops_no_speedup() -> None:
    """Of one KV head nothing can go."""
    model = AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"](num_key_value_heads=1)).eval().requires_grad_(False)
    plan = planned(model, speedup=1.1, axes=("ffn", "groups"))
    assert plan.kinds == ("ffn",)


MIXED: dict[str, Callable[[PreTrainedModel], Plan]] = {
    "ffn+groups": lambda m: Plan({(0, "ffn"): 5, (1, "ffn"): 40, (1, "groups"): 1, (2, "groups"): 1}),
    "ffn+value": lambda m: Plan(
        {(0, "ffn"): 7, (0, "value"): first(m, "value").blocks, (2, "value"): 3 * first(m, "value").blocks}
    ),
    "ffn+heads": lambda m: Plan({(0, "ffn"): 7, (0, "heads"): first(m, "heads").blocks, (2, "ffn"): 47}),
    "ffn+layers": lambda m: Plan({(0, "ffn"): 5, (2, "ffn"): 9}, (1,)),
    "ffn+groups+layers": lambda m: Plan({(2, "ffn"): 9, (2, "groups"): 1}, (0, 1)),
    "nothing": lambda m: Plan({(0, "ffn"): 0, (1, "groups"): 0}),
}


def first(model: PreTrainedModel, kind: str) -> Any:
    return axes(model, (kind,))[0]


@pytest.mark.parametrize("mixed", MIXED)
@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen2", "qwen3", "opt", "opt_350m"])
@pytest.mark.covering
def test_what_a_plan_saves_is_what_goes(family: str, mixed: str) -> None:
    model = tiny.model(family)
    if mixed == "ffn+heads" and family.startswith("opt"):
        return  # every head is a group of its own
    plan = MIXED[mixed](model)
    cut = carried_out(model, plan)
    assert sizes.saved_by(model, plan) == sizes.total_parameters(model) - sizes.total_parameters(cut)
    assert len(layers(cut)) == 3 - len(plan.layers) and cut(tiny.tokens()).logits.isfinite().all()


@pytest.mark.parametrize("mixed", MIXED)
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.covering
def test_the_cache_of_a_plan_is_that_of_the_model_it_leaves(family: str, mixed: str) -> None:
    model = tiny.model(family)
    if mixed == "ffn+heads" and family == "opt":
        return
    plan = MIXED[mixed](model)
    assert 4 * sizes.kv_cache_entries(model, plan, 24, 3) == cache_bytes(carried_out(model, plan), 24, 3)
    assert 4 * sizes.kv_cache_entries(carried_out(model, plan), Plan(), 24, 3) == 4 * sizes.kv_cache_entries(
        model, plan, 24, 3
    )


@pytest.mark.parametrize("family", ["mistral_sliding", "qwen2_sliding"])
def test_the_cache_of_a_sliding_window_is_no_longer_than_the_window(family: str) -> None:
    model = tiny.model(family)
    assert 4 * sizes.kv_cache_entries(model, Plan(), 24, 1) == cache_bytes(model, 24, 1)


# amounts

AMOUNTS: dict[str, tuple[str, int | None]] = {
    "100M": ("params", 100_000_000),
    "39K": ("params", 39_000),
    "39k": ("params", 39_000),
    "1.5B": ("params", 1_500_000_000),
    "134,515,008": ("params", 134_515_008),
    " 12_000 ": ("params", 12_000),
    "1e6": ("params", 1_000_000),
    "250MB": ("memory", 250_000_000),
    "1GiB": ("memory", 2**30),
    "0.5 gib": ("memory", 2**29),
    "4096": ("memory", 4096),
    "4096b": ("memory", 4096),
    "512KiB": ("memory", 512 * 1024),
    "250M": ("memory", None),
    "100MB": ("params", None),
    "M": ("params", None),
    "-5M": ("params", None),
    "5 parsecs": ("memory", None),
    "1 2": ("params", None),
    "nan": ("memory", None),
    "inf": ("memory", None),
    "": ("params", None),
}


@pytest.mark.parametrize(("text", "said"), AMOUNTS.items(), ids=list(AMOUNTS))
def test_amounts(text: str, said: tuple[str, int | None]) -> None:
    name, value = said
    if value is None:
        units = {"params": "k, m, b", "memory": "b, kb, mb, gb, kib, mib, gib"}[name]
        with pytest.raises(BillhookError, match=f"^--{name} {re.escape(repr(text))} is no amount: .*one of {units}$"):
            recipe(**{name: text})
    else:
        assert getattr(recipe(**{name: text}).budget, name) == value


def test_an_endless_amount_is_refused() -> None:
    with pytest.raises(BillhookError, match="--params '1e999' is no amount"):
        recipe(params="1e999")


# what cannot be had


@pytest.mark.parametrize("kinds", ["ffn", "ffn,groups"])
@pytest.mark.parametrize(("name", "allocation"), [("params", "skip:1,1"), ("params", "global"), ("memory", "equal")])
@pytest.mark.covering
def test_the_smallest_possible_is_possible(name: str, allocation: str, kinds: str) -> None:
    """What the refusal says can be had is then had."""
    model = deep()
    layout = "uniform" if allocation == "equal" else "per_layer"
    settings = dict(axes=tuple(kinds.split(",")), allocation=allocation, layout=layout, context=64)
    with pytest.raises(BillhookError, match=r"^1,000 .*is below the smallest possible here, ([\d,]+) ") as refused:
        planned(model, **settings, **{name: 1000})
    found = re.search(r"here, ([\d,]+)", str(refused.value))
    assert found
    plan = planned(model, **settings, **{name: found[1]})
    cached = sizes.kv_cache_entries(model, plan, 64, 1)
    left = sizes.total_parameters(model) - sizes.saved_by(model, plan)
    assert {"params": left, "memory": 4 * (left + cached)}[name] == pytest.approx(
        int(found[1].replace(",", "")), rel=5e-3
    )


@pytest.mark.parametrize("name", ["params", "memory"])
def test_a_model_that_is_small_enough_is_left_alone(name: str) -> None:
    with pytest.raises(BillhookError, match=r"is no less than the model's own .*: nothing is left to cut"):
        planned(deep(), **{name: 10**7})


@pytest.mark.usefixtures("known_clock")
def test_a_speedup_that_cannot_be_had_is_refused_in_its_own_words() -> None:
    with pytest.raises(BillhookError, match=r"1,?000.* times") as refused:
        planned(deep(), speedup=1000.0)
    assert "raise it" not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"params": sizes.total_parameters(deep()) - 3},
        {"ratio": 1e-6, "allocation": "sensitivity", "layout": "per_layer"},
        {"ratio": 1e-6, "allocation": "global", "layout": "per_layer"},
    ],
    ids=["params", "sensitivity", "global"],
)
def test_less_than_half_a_step_is_refused_by_every_budget(settings: dict[str, Any]) -> None:
    with pytest.raises(BillhookError, match="less than half of the smallest step"):
        planned(deep(), **settings)
