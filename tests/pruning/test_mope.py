"""Module by module: what the table says against modules that are really gone, and what is cut by it."""

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import example_reports
import pytest
import tiny
import torch
from test_allocation import CALIBRATION, PROBE, TEXTS, deep, plan_of
from torch import Tensor
from transformers import PreTrainedModel

import billhook
from billhook.checkpoints.load import Opened
from billhook.choices import AXES
from billhook.cuts.settings import Narrowing
from billhook.errors import BillhookError
from billhook.evaluation import zeroshot
from billhook.methods import METHODS
from billhook.models import sizes
from billhook.models.axes import axes, refusal
from billhook.models.surgery import drop_layers, remove, zero
from billhook.planning import ablation
from billhook.planning.ablation import Accuracy, Judge, Table
from billhook.planning.method import Planned
from billhook.pruning.recipe import recipe
from billhook.reports.page import render
from billhook.runtime.run import Run

SMALL: dict[str, Any] = dict(method="mope", multiple_of=4, missed_on=4, probes=4)


@torch.no_grad()
def kl(dense: PreTrainedModel, other: PreTrainedModel) -> float:
    p, q = (torch.log_softmax(model(PROBE).logits, -1) for model in (dense, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def loss(model: PreTrainedModel) -> float:
    return float(model(PROBE, labels=PROBE).loss)


def without(model: PreTrainedModel, layer: int, kind: str, units: list[int]) -> PreTrainedModel:
    """A copy without a module, by other means: its tensors are narrower, its layer is out of the list."""
    smaller = copy.deepcopy(model)
    if kind == "layers":
        drop_layers(smaller, [layer])
    else:
        (axis,) = [axis for axis in axes(smaller, (kind,)) if axis.layer == layer]
        if len(units) == axis.units:
            zero(smaller, axis, torch.tensor(sorted(units)))  # no family's code runs without any
        else:
            remove(smaller, axis, torch.tensor(sorted(units)))
    return smaller


def table_of(model: PreTrainedModel, kinds: tuple[str, ...], metric: str = "kl", parts: int = 3) -> Table:
    return ablation.measured(Judge(model, PROBE, metric), CALIBRATION, kinds, parts, Narrowing(), Run(), {})


def planned(model: PreTrainedModel, **settings: Any) -> Planned:
    chosen = recipe(**{**SMALL, **settings})
    opened = Opened(model, None, "tiny", None, torch.float32)
    chosen.method.check(opened, chosen)
    return chosen.method.plan(opened, chosen, TEXTS, Run())


@pytest.mark.parametrize("family", tiny.DENSE)
@pytest.mark.covering(some={"family": 6})
def test_the_table_says_what_is_lost_when_a_module_is_really_gone(family: str) -> None:
    model = tiny.model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attention = next((kind for kind in ("groups", "heads") if tiny.has(family, kind)), None)
    found = table_of(model, ("ffn", *filter(None, [attention]), "layers"))
    assert {module.kind for module in found.modules} == {"ffn", "layers", *filter(None, [attention])}
    for module in found.modules:
        expected = kl(model, without(model, module.layer, module.kind, list(module.units)))
        assert module.lost == pytest.approx(expected, rel=2e-3, abs=2e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "forward" not in {name for module in model.modules() for name in vars(module)}
    each = {place: sum(len(m.units) for m in found.modules if (m.layer, m.kind) == place) for place in found.worths}
    assert each == {place: len(worths) for place, worths in found.worths.items()}


def test_the_loss_as_metric_is_the_loss() -> None:
    model = deep()
    whole = loss(model)
    for module in table_of(model, ("ffn", "layers"), "loss").modules:
        gone = without(model, module.layer, module.kind, list(module.units))
        assert module.lost == pytest.approx(loss(gone) - whole, abs=1e-5)


def test_a_curve_is_the_sum_of_the_cheapest_modules() -> None:
    model = deep()
    found = table_of(model, ("groups", "ffn", "layers"), parts=4)
    curves = found.curves(model, whole_layers=True)
    for layer in range(4):
        losses = sorted(m.lost for m in found.modules if m.layer == layer and m.kind == "ffn")
        assert curves[layer, "ffn"][24] == pytest.approx(sum(losses[:2]), rel=1e-5)  # half of 48 channels
        assert curves[layer, "ffn"][48] == pytest.approx(sum(losses), rel=1e-5)
        assert curves[layer, "layers"][1] == found.layers[layer]
    assert not [kind for _, kind in found.curves(model, whole_layers=False) if kind == "layers"]


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("kinds", ["ffn", "groups,ffn", "ffn,layers", "groups,ffn,layers", "layers"])
@pytest.mark.parametrize("order", ["knapsack", "global"])
@pytest.mark.covering
def test_the_budget_is_met(layout: str, kinds: str, order: str) -> None:
    if layout == "uniform" and order == "global":
        order = "knapsack"
    model = deep(6)
    found = planned(model, ratio=0.3, axes=kinds, layout=layout, order=order)
    saved, decoder = sizes.saved_by(model, found.plan), sizes.decoder_parameters(model)
    step = {"layers": decoder / 12, "uniform": 6 * 4 * 96 / 2 + 1, "per_layer": 4 * 4 * 96}[
        kinds if kinds == "layers" else layout
    ]
    assert abs(saved - 0.3 * decoder) <= step
    assert bool(found.plan.layers) == ("layers" in kinds)
    if layout == "uniform":
        assert len({count for (_, kind), count in found.plan.drops.items() if kind == "ffn"}) <= 1


@pytest.mark.parametrize("order", ["knapsack", "global"])
def test_whole_layers_may_be_weighed_against_the_others(order: str) -> None:
    model = deep(6)
    decoder = sizes.decoder_parameters(model)
    found = planned(model, ratio=0.5, axes="ffn,layers", layout="per_layer", stage="joint", order=order)
    assert abs(sizes.saved_by(model, found.plan) - 0.5 * decoder) <= decoder / 12
    assert found.record["mope"]["depth"] == [] and found.plan.layers


def test_in_its_own_order_the_lowest_module_goes_first() -> None:
    model = deep(6)
    found = planned(model, ratio=0.15, axes="groups,ffn", layout="per_layer", order="global", floor=0.01, parts=12)
    table = table_of(model, ("groups", "ffn"), parts=12)
    losses = table.module_losses()
    dearest = 0.0
    for place, count in found.plan.drops.items():
        if count:
            dearest = max(dearest, float(losses[place].sort().values[count - 1]))
    for place, count in found.plan.drops.items():
        left = losses[place].sort().values[count:]
        # the next one costs more, or leads beyond the budget (a group is 24 channels), or is the last that stays
        assert float(left[0]) >= dearest * 0.999 or place[1] == "groups" or len(left) == 4


def test_layers_go_after_the_widths_each_measured_anew() -> None:
    model = deep(6)
    found = planned(model, ratio=0.4, axes="ffn,layers", depth=0.8)
    depth, cut = found.record["mope"]["depth"], copy.deepcopy(model)
    assert len(depth) == len(found.plan.layers) == 2
    widths = planned(model, ratio=0.4, axes="ffn,layers", depth=0.8).plan.drops
    (count,) = {count for count in widths.values()}
    table = table_of(model, ("ffn",), parts=8)
    for axis in axes(cut, ("ffn",)):
        zero(cut, axis, table.worths[axis.layer, "ffn"].argsort(stable=True)[:count])
    before, gone = kl(model, cut), list[int]()
    for one in depth:
        costs = {}
        for n in set(range(6)) - set(gone):
            smaller = copy.deepcopy(cut)
            drop_layers(smaller, [*gone, n])
            costs[n] = kl(model, smaller)
        assert one["layer"] == min(costs, key=lambda n: costs[n])
        assert one["lost"] == pytest.approx(costs[one["layer"]] - before, rel=5e-2, abs=1e-5)
        gone.append(one["layer"])
        before = costs[one["layer"]]


def test_what_was_foretold_and_what_is_lost_are_told_layer_by_layer() -> None:
    model = deep(4)
    found = planned(model, ratio=0.25, axes="groups,ffn", layout="per_layer")
    record, cut = found.record["mope"], copy.deepcopy(model)
    for axis in axes(cut, ("groups", "ffn")):
        if count := found.plan.drops[axis.layer, axis.kind]:
            units = found.scores[axis.layer, axis.kind].argsort(stable=True)[:count]
            zero(cut, axis, units)
    assert record["all"]["measured"] == pytest.approx(kl(model, cut), rel=1e-3)
    assert record["all"]["predicted"] == pytest.approx(sum(row["predicted"] for row in record["layers"]))
    for row in record["layers"]:
        alone = copy.deepcopy(model)
        for axis in axes(alone, ("groups", "ffn")):
            if axis.layer == row["layer"] and (count := found.plan.drops[axis.layer, axis.kind]):
                zero(alone, axis, found.scores[axis.layer, axis.kind].argsort(stable=True)[:count])
        assert row["measured"] == pytest.approx(kl(model, alone), rel=1e-3)


def pruned(text: str, family: str = "llama", **other: Any) -> billhook.Result:
    given = {**SMALL, "ratio": 0.3, "seq_len": 32, "samples": 6, "calibration": text, **other}
    return billhook.prune(tiny.model(family), tokenizer=tiny.tokenizer(), **given)


@pytest.mark.parametrize("family", tiny.ONE_EACH)
@pytest.mark.covering(some={"family": 6})
def test_it_prunes_every_family(family: str, text: str) -> None:
    layout = "per_layer" if family in tiny.DENSE else "uniform"
    kinds = [kind for kind in ("ffn", "groups") if not refusal(tiny.model(family), kind, layout)]
    result = pruned(text, family, axes=",".join([*kinds, "layers"]), layout=layout, ratio=0.4, depth=0.9)
    record = result.record
    assert len(record["dropped_layers"]) == 1 and 0.2 < record["sizes"]["achieved_ratio"] < 0.6
    assert set(record["mope"]) == {"metric", "whole", "windows", "table", "depth", "layers", "all"}
    json.dumps(record["mope"], allow_nan=False)


def test_the_same_call_twice_gives_the_same_cut(text: str) -> None:
    first, second = (pruned(text, layout="per_layer", axes="groups,ffn,layers") for _ in range(2))
    assert json.dumps(first.record["mope"]) == json.dumps(second.record["mope"])
    pairs = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_one_table_serves_other_budgets(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pruned(text, ratio=0.3, statistics=tmp_path)
    monkeypatch.setattr(ablation, "measured", lambda *_: pytest.fail("measured again"))
    second = pruned(text, ratio=0.5, statistics=tmp_path)
    assert first.record["mope"]["table"] == second.record["mope"]["table"]
    assert first.record["sizes"]["achieved_ratio"] < second.record["sizes"]["achieved_ratio"]
    monkeypatch.undo()
    assert pruned(text, ratio=0.5).record["mope"] == second.record["mope"]


def test_budgets_of_a_sweep_share_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model, count = deep(), []
    real = ablation.measured
    monkeypatch.setattr(ablation, "measured", lambda *given: count.append(1) or real(*given))
    recipes = [recipe(**SMALL, ratio=ratio, axes="ffn") for ratio in (0.1, 0.3, 0.95)]
    opened = Opened(model, None, "tiny", None, torch.float32)
    found = METHODS["mope"].plan_each(opened, recipes, TEXTS, Run())
    assert count == [1] and isinstance(found[2], BillhookError)
    for one, chosen in zip(found[:2], recipes, strict=False):
        assert isinstance(one, Planned) and one.plan == plan_of(model, chosen)


# the accuracy of a task as the metric


def row(accuracy: float, error: float | None = 0.04, chance: float | None = 0.25) -> dict[str, Any]:
    return {"task": "t", "accuracy": accuracy, "standard_error": error, "chance": chance}


def by_task(model: PreTrainedModel, accuracy: Any) -> Judge:
    return Judge(model, PROBE, "task:t", lambda: Accuracy([row(accuracy())]))


def test_an_accuracy_is_missed_and_the_divergence_breaks_its_ties() -> None:
    model = deep()

    def accuracy() -> float:
        """All that counts are the channels of layer 1, in steps of a tenth."""
        return 0.4 + 0.1 * math.floor(4 * int(model.model.layers[1].mlp.down_proj.weight.any(0).sum()) / 48)

    judge = by_task(model, accuracy)
    table = ablation.measured(judge, CALIBRATION, ("ffn",), 4, Narrowing(), Run(), {})
    table.check(judge)
    assert judge.whole == 0.8
    assert {(m.layer, round(m.lost, 9)) for m in table.modules} == {(0, 0.0), (1, 0.1), (2, 0.0), (3, 0.0)}
    finer = {(m.layer, m.units): m.lost for m in table_of(model, ("ffn",), parts=4).modules}
    assert [m.finer for m in table.modules] == [finer[m.layer, m.units] for m in table.modules]
    order = sorted(range(16), key=table.losses.__getitem__)
    assert order == sorted(range(16), key=lambda n: (round(table.modules[n].lost, 9), table.modules[n].finer))


@pytest.mark.parametrize(
    ("accuracy", "error", "words"), [(0.3, 0.04, "guessing in 0.250"), (0.9, None, "standard error unknown")]
)
def test_a_task_that_the_model_guesses_at_is_refused_with_the_numbers(
    accuracy: float, error: float | None, words: str
) -> None:
    with pytest.raises(BillhookError, match=rf"metric task:t: .* right in {accuracy:.3f} .*{words}"):
        Judge(deep(), PROBE, "task:t", lambda: Accuracy([row(accuracy, error)]))


def test_a_metric_that_does_not_fall_whatever_goes_is_refused() -> None:
    judge = by_task(model := deep(), lambda: 0.8)
    table = ablation.measured(judge, CALIBRATION, ("layers",), 4, Narrowing(), Run(), {})
    with pytest.raises(BillhookError, match=r"unpruned model's is 0\.8, and no module"):
        table.check(judge)
    assert len(table.modules) == len(model.model.layers)


def test_a_task_is_scored_by_lm_eval(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    from test_zeroshot import task_file

    path = task_file(tmp_path)
    with pytest.raises(BillhookError, match="no module can be missed by it"):  # a random model guesses
        pruned(text, metric=f"task:{path}", documents=8)
    monkeypatch.setattr(Accuracy, "check", lambda *_: None)
    monkeypatch.setattr(Table, "check", lambda *_: None)
    record = pruned(text, metric=f"task:{path}", documents=8, parts=2, axes="ffn").record["mope"]
    tasks = zeroshot.load_tasks([str(path)])
    (expected,) = zeroshot.evaluate(tiny.model("llama"), tiny.tokenizer(), tasks, limit=8, batch_size=16)
    assert record["whole"] == expected["accuracy"]


def test_a_task_without_its_extra_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BillhookError, match=r"billhook\[eval\]"):
        pruned(text, metric="task:words")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(metric="acc"), "unknown metric 'acc'"),
        (dict(metric="task:"), "unknown metric 'task:'"),
        (dict(missed_on=9, probes=8), "--missed-on 9: there are 8"),
        (dict(order="global"), "--order global makes layers differ"),
        (dict(stage="joint"), "--stage joint makes layers differ"),
        (dict(allocation="sensitivity", layout="per_layer"), "mope has no allocation"),
        (dict(axes="value", layout="per_layer"), "mope does not prune 'value'"),
        (dict(depth=0), "depth"),
        (dict(parts=0), "parts"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(BillhookError, match=words):
        recipe(**{**SMALL, "ratio": 0.2, **given})


def test_streamed_weights_and_a_dry_run_are_refused_with_a_reason() -> None:
    chosen = recipe(**SMALL, ratio=0.2)
    assert "whole model" in chosen.method.why_whole(chosen) and "measures" in chosen.method.why_unforeseen(chosen)
    assert set(chosen.method.kinds) <= set(AXES)


def moved(before: Tensor, after: Tensor) -> bool:
    return before.shape != after.shape or not torch.equal(before, after)


def test_what_stays_is_restored_unless_it_is_not_to_be(text: str) -> None:
    restored, bare = (pruned(text, axes="ffn", restoration=flag).model for flag in (True, False))
    weights = [model.model.layers[0].mlp.down_proj.weight for model in (restored, bare)]
    assert weights[0].shape == weights[1].shape and moved(*weights)


def test_the_page_shows_what_was_foretold() -> None:
    report = example_reports.prune()
    told = {"layers": [{"layer": 7, "predicted": 0.01234, "measured": 0.02345}], "depth": [{"layer": 3, "lost": 0.5}]}
    rows = [{"layer": 7, "kind": "ffn", "lost": [0.1, 0.2]}]
    whole = {"metric": "kl", "whole": 0.0, "windows": 2, "table": rows, "all": {"predicted": 0.3, "measured": 0.4}}
    report["cut"]["mope"] = {**told, **whole}
    page = render(report)
    for words in (
        "Predicted and measured",
        "0.01234",
        "0.02345",
        "0.3000 if losses added up",
        "2 modules missed",
        "3: 0.5000",
    ):
        assert words in page
    assert "Predicted and measured" not in render(example_reports.prune())
