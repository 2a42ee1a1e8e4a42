"""Units whose chances are learned: what comes of it on a tiny model; resumed; refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedModel

import billhook
from billhook.errors import BillhookError
from billhook.models import sizes
from billhook.models.axes import axes
from billhook.models.surgery import without, zero
from billhook.pruning.recipe import recipe
from billhook.search import evaluator
from billhook.search import policy as search
from billhook.search.evaluator import masked_losses

SMALL: dict[str, Any] = dict(
    method="policy", ratio=0.3, seq_len=64, samples=4, multiple_of=4, group=12, steps=8, windows=2, window_len=32
)


@pytest.fixture(autouse=True)
def _rungs_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learned is checked on few windows, and decided on as many as ever."""
    monkeypatch.setattr(search, "RUNGS", (4, 8, 16))


def pruned(text: str, model: PreTrainedModel | None = None, **other: Any) -> billhook.Result:
    given = {"calibration": text, **SMALL, **other}
    return billhook.prune(model or tiny.model("llama"), tokenizer=tiny.tokenizer(), **given)


def test_what_matters_is_learned(text: str) -> None:
    how = dict(layout="per_layer", objective="kl", rate=6.0, steps=24, masks=8, restoration=False)
    drifts = []
    for seed in range(2):
        record = pruned(text, tiny.uneven(), seed=seed, **how).record["policy"]
        found, chances = record["unrestored"], {one["layer"]: one["chance"] for one in record["kept"]}
        assert found["gain"] > 4 * found["standard_error"] > 0 and found["learned"] < 0.7 * found["start"]
        drifts.append(chances[1] - chances[2])  # of the layer that matters, and of one that does not
    assert sum(drifts) / 2 > 0.2


@pytest.mark.covering(some={"kinds": 2})
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("kinds", ["ffn", "groups,ffn", "ffn,layers", "layers"])
def test_the_budget_is_met(layout: str, kinds: str, text: str) -> None:
    model = tiny.model("llama", num_hidden_layers=4)
    before = sizes.decoder_parameters(model)
    record = pruned(text, model, axes=kinds, layout=layout, steps=4).record
    step = 0.15 if kinds == "layers" else 0.06 if layout == "uniform" else 0.02
    assert abs(record["sizes"]["achieved_ratio"] - 0.3) <= step
    assert sizes.decoder_parameters(model) == round(before * (1 - record["sizes"]["achieved_ratio"]))
    assert record["policy"]["forwards"] == 16 and len(record["policy"]["trace"]) == 4
    json.dumps(record["policy"], allow_nan=False)


@pytest.mark.covering(some={"family": 2})
@pytest.mark.parametrize("family", tiny.STRUCTURES)
def test_it_prunes_families_of_every_structure(family: str, text: str) -> None:
    layout = "uniform" if family in tiny.MIXTURES else "per_layer"
    record = pruned(text, tiny.model(family), axes="ffn,layers", ratio=0.35, layout=layout, steps=2).record
    assert 0.2 < record["sizes"]["achieved_ratio"] < 0.5


def test_the_same_call_twice_gives_the_same_cut(text: str) -> None:
    first, second = (pruned(text, tiny.uneven(), layout="per_layer") for _ in range(2))
    assert json.dumps(first.record["policy"]) == json.dumps(second.record["policy"])
    pairs = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other = pruned(text, tiny.uneven(), layout="per_layer", seed=1)
    assert json.dumps(first.record["policy"]) != json.dumps(other.record["policy"])


def test_what_was_cut_off_goes_on_to_the_same_end(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pruned(text, layout="per_layer", steps=20).record["policy"]
    real, asked, most = evaluator.masked_losses, [0], 70

    def tried(*given: Any) -> list[float]:
        asked[0] += 1
        if asked[0] == most:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(evaluator, "masked_losses", tried)
    with pytest.raises(KeyboardInterrupt):
        pruned(text, layout="per_layer", steps=20, work=tmp_path / "run")
    asked[0], most = 0, 10**6
    again = pruned(text, layout="per_layer", steps=20, work=tmp_path / "run").record["policy"]
    assert json.dumps(again) == json.dumps(whole)
    assert asked[0] < 20 * 4 - 64 + 8  # the first 16 steps were not made again


def test_the_papers_own_setting(text: str) -> None:
    record = pruned(text, variant="paper", steps=3, axes="groups,ffn", group=None).record
    told = record["policy"]
    assert (told["masks"], told["rate"], told["baseline"], told["margin"]) == (2, 0.002, "ema", 0.0)
    assert told["units"] == 3 * (48 + 2) and not told["restoration"]
    assert {cut["damping"] for cut in record["cuts"]} == {0.0}  # nothing was restored
    chosen = recipe("policy", ratio=0.2, variant="paper")
    assert [chosen.settings.own(name) for name in ("steps", "group", "price")] == [15_000, 1, "count"]


def test_an_axis_may_lose_all_its_units_in_a_mask() -> None:
    for family in ("llama", "falcon", "gpt2"):
        model, tokens = tiny.model(family), tiny.tokens(2, 16)
        chosen = [axis for axis in axes(model, ("groups", "ffn")) if axis.layer == 1]
        every = [(axis, torch.arange(axis.units)) for axis in chosen]
        with without(model, every):
            found = model(tokens).logits
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for axis, units in every:
            zero(model, axis, units)
        assert torch.allclose(found, model(tokens).logits, atol=1e-5)
        assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def pool(model: PreTrainedModel, group: int = 12, by_count: bool = False, whole: bool = True) -> search.Pool:
    scores = {(a.layer, a.kind): torch.rand(a.units) for a in axes(model, ("groups", "ffn"))}
    return search.pool(model, scores, [0.3, 0.1, 0.2] if whole else [], group, by_count)


def test_prices_are_parameters_and_a_mask_is_what_they_say() -> None:
    model = tiny.model("llama")
    units, decoder = pool(model), sizes.decoder_parameters(model)
    ones = torch.ones(len(units.members), dtype=torch.float64)
    assert float(units.prices.kept(ones)) == decoder
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        stays = (torch.rand(len(ones), generator=draw) < 0.7).double()
        mask = units.mask(stays)
        gone = {n for n, kind in mask if kind == "layers"}
        saved = sum(sizes.layer_parameters(model, n) for n in gone)
        for axis in axes(model, ("groups", "ffn")):
            saved += len(mask.get((axis.layer, axis.kind), ())) * axis.price(model) * (axis.layer not in gone)
        assert float(units.prices.kept(stays)) == pytest.approx(decoder - saved)
    losses = masked_losses(model, units.mask(torch.zeros_like(ones)), tiny.tokens(), None, None, None)
    assert len(losses) == 2  # all layers skipped


def test_units_go_by_their_chances_and_equal_ones_as_at_the_start() -> None:
    units = pool(tiny.model("llama"), group=6)
    chances = torch.full((len(units.members),), 0.5, dtype=torch.float64)
    within, _, whole = units.order(chances)
    order = [unit for place, part in units.members if place == (1, "ffn") for unit in part.tolist()]
    assert within[1, "ffn"].argsort(stable=True).tolist() == order
    assert sorted(whole, key=whole.__getitem__) == [1, 2, 0]
    chances[[n for n, (place, _) in enumerate(units.members) if place == (1, "ffn")][-1]] = 0.1
    assert units.order(chances)[0][1, "ffn"].argsort(stable=True)[:6].tolist() == order[-6:]


def test_batches_take_every_window_before_one_comes_again() -> None:
    batches = search.Batches(torch.arange(20).view(10, 2), 4, 0)
    seen = torch.cat([batches.at(step)[:, 0] for step in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(0, 20, 2)) and seen[:10] != seen[10:]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(masks=1), "--baseline loo compares the masks of a step"),
        (dict(price="count", axes="ffn,layers"), "--price count gives every axis its own budget"),
        (dict(axes="heads"), "policy does not prune 'heads'"),
        (dict(steps=0), "steps"),
        (dict(baseline="mean"), "unknown baseline 'mean'"),
        (dict(allocation="sensitivity", layout="per_layer"), "policy has no allocation"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(BillhookError, match=words):
        recipe(**{**SMALL, **given})


def test_what_cannot_be_learned_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BillhookError, match="one unit, which says nothing of the others: lower group"):
        pruned(text, group=48)
    with pytest.raises(BillhookError, match="windows of 32 tokens, fewer than the 9000 of a step"):
        pruned(text, windows=9000)
    real = search.Evaluator.losses
    monkeypatch.setattr(
        search.Evaluator, "losses", lambda *given: [[float("nan")] * len(each) for each in real(*given)]
    )
    with pytest.raises(BillhookError, match=r"no mask has a finite loss in (float32|bfloat16)"):
        pruned(text)
