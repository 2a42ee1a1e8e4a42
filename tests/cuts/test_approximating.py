"""Greedy Output Approximation: its mathematics against literal arithmetic, its maps against transformers' own,
its laws on tiny models of every family."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import billhook
from billhook.calibration.attention_maps import NAME, Alike, watched
from billhook.calibration.forward import enter, run_layer
from billhook.cuts.approximating import approximate, unit_scores
from billhook.cuts.settings import Approximating
from billhook.errors import BillhookError
from billhook.math import selection
from billhook.math.divergence import jensen_shannon, redundancy
from billhook.math.restore import toward
from billhook.math.scores import energy_columns, output_metric
from billhook.models.axes import axes, reader_weight
from billhook.models.families import attention, attention_module, layers
from billhook.models.plan import Plan, even_plan
from billhook.runtime.run import Run

IDS = tiny.tokens(16, 32)
UNSEEN = ("bloom", "falcon", "falcon_new", "falcon_alibi", "gpt_oss")
WATCHED = [one for one in tiny.CONFIGS if one not in UNSEEN + tiny.ONLY_FFNS]
PLANS = [{"ffn": 12}, {"groups": 1}, {"heads": 2}, {"ffn": 12, "groups": 1}]
LAWFUL = [
    (family, plan)
    for family in tiny.CONFIGS
    for plan in PLANS
    if all(tiny.has(family, kind) for kind in plan) and (family in WATCHED or set(plan) == {"ffn"})
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divergence(p: Tensor, q: Tensor) -> float:
    """JS(P || Q), term by term."""
    middle = (p + q) / 2
    both = [(a, m) for x in (p, q) for a, m in zip(x.tolist(), middle.tolist(), strict=True)]
    return sum(a * math.log(a / m) for a, m in both if a > 0) / 2


def test_divergences_are_those_of_the_definition() -> None:
    maps = (3 * drawn(2, 3, 5, 7)).softmax(-1)
    found = jensen_shannon(maps)
    for block, i, j in itertools.product(range(2), range(3), range(3)):
        by_hand = sum(divergence(maps[block, i, row], maps[block, j, row]) for row in range(5))
        assert float(found[block, i, j]) == pytest.approx(by_hand, abs=1e-12)


def test_equal_maps_do_not_differ_and_none_differ_by_more_than_ln_2() -> None:
    one = (5 * drawn(1, 1, 40, 9)).softmax(-1).float()
    assert jensen_shannon(one.expand(1, 4, 40, 9)).abs().max() == 0
    apart = torch.eye(4).unsqueeze(1).unsqueeze(0)  # each head looks at a token of its own
    assert jensen_shannon(apart)[0] == pytest.approx(math.log(2) * (1 - torch.eye(4)).double())
    anything = jensen_shannon((20 * drawn(3, 5, 60, 8)).softmax(-1).float()) / 60
    assert anything.min() >= 0 and anything.max() <= math.log(2)


def scanned(D: Tensor, tau: float) -> list[int]:
    """Algorithm 2 as it is printed."""
    listed: list[int] = []
    for i, j in itertools.product(range(len(D)), repeat=2):
        if D[i, j] < tau and i != j and i not in listed and j not in listed:
            listed.append(i)
    return listed


@pytest.mark.parametrize("seed", range(40))
def test_which_heads_go_is_what_the_papers_scan_lists(seed: int) -> None:
    half = torch.rand(9, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * math.log(2)
    D = half.triu(1) + half.triu(1).T
    scores = redundancy(D.unsqueeze(0))
    for count in range(1, 9):
        gone, _ = selection.lowest(scores, count)
        assert sorted(scanned(D, float(scores[gone].max()) * (1 + 1e-12))) == gone.tolist()
        assert len(scanned(D, float(scores[gone].max()))) == count - 1  # no smaller threshold gives as many
    for tau in (0.0, 0.05, 0.1, 0.2, 0.4):
        assert scanned(D, tau) == (scores < tau).nonzero().flatten().tolist()


def test_the_output_metric_is_what_a_channel_puts_out() -> None:
    """Of a linear module to a factor, of one with ReLU on symmetric inputs exactly: that is where the half is from."""
    X, A, B = drawn(200, 6), drawn(9, 6, seed=1), drawn(4, 9, seed=2)
    X = torch.cat([X, -X])
    found, Z = output_metric(B, [A], X.T @ X), X @ A.T
    for put_out, factor in ((Z, 2.0), (Z.relu(), 1.0)):
        by_hand = torch.stack([torch.outer(put_out[:, j], B[:, j]).square().sum() for j in range(9)])
        torch.testing.assert_close(factor * found, by_hand)
        torch.testing.assert_close(energy_columns(B, put_out.T @ put_out), by_hand)
    gate = drawn(9, 6, seed=3)
    torch.testing.assert_close(output_metric(B, [A, gate], X.T @ X), found * output_metric(B, [gate], X.T @ X))


def test_a_refit_comes_no_further_from_its_target_and_whole_it_is_the_least_squares() -> None:
    X, W, Y = drawn(50, 8), drawn(5, 8, seed=1), drawn(50, 5, seed=2)
    G, T = X.T @ X, Y.T @ X
    off = [float((X @ toward(W, T, G, 1e-3, share)[0].T - Y).norm()) for share in (0.0, 0.1, 0.3, 0.7, 1.0)]
    assert off == sorted(off, reverse=True) and off[0] == float((X @ W.T - Y).norm())
    torch.testing.assert_close(toward(W, T, G, 1e-12)[0], torch.linalg.lstsq(X, Y).solution.T)
    assert torch.equal(toward(W, W @ G, G, 1e-3)[0], W)  # no drift: it stays


def eager_maps(model: Any, n: int) -> list[Tensor]:
    """The maps of layer n (windows, heads, queries, keys), as transformers says them."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return eager(IDS, output_attentions=True).attentions[n]


@pytest.mark.parametrize("kind", ["heads", "groups"])
@pytest.mark.parametrize("family", WATCHED)
@pytest.mark.covering(some={"family": 3})
def test_watched_maps_are_those_of_eager_attention(family: str, kind: str) -> None:
    model = tiny.model(family)
    before = model.config._attn_implementation
    (state,), (calls,) = enter(model, [IDS])
    alike, module = Alike(kind), attention_module(model, 0)
    plain = run_layer(layers(model)[0], state, calls[0])
    with watched(module, alike):
        seen = run_layer(layers(model)[0], state, calls[0])
    torch.testing.assert_close(seen, plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="amid"), watched(module, alike):
        raise RuntimeError("amid")
    assert model.config._attn_implementation == before and NAME not in ALL_ATTENTION_FUNCTIONS
    sizes = attention(model, 0)
    maps = eager_maps(model, 0)[:, :, 1:].unflatten(1, (sizes.kv_heads, sizes.group))  # windows, KV heads, heads, …
    for i, j in itertools.combinations(range(sizes.group if kind == "heads" else sizes.kv_heads), 2):
        a, b = (maps[:, :, one] if kind == "heads" else maps[:, one] for one in (i, j))
        middle = (a + b) / 2
        apart = [(x * (x / middle).log()).nan_to_num().sum(-1) for x in (a, b)]
        by_block = (sum(apart) / 2).double().movedim(1, 0) if kind == "heads" else (sum(apart) / 2).double()[None]
        torch.testing.assert_close(alike.mean[:, i, j], by_block.flatten(1).mean(1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("family", "plan"), LAWFUL)
@pytest.mark.covering(some={"family": 8})
def test_a_refit_never_errs_more_on_the_windows_it_was_fitted_on(family: str, plan: dict[str, int]) -> None:
    for settings in (Approximating(), Approximating(share=0.3, after=True, score="measured")):
        model = tiny.model(family)
        found = approximate(model, IDS, even_plan(3, plan), settings, Run())
        for one in found.rebuilt:
            assert 0 < one.after <= one.before * (1 + 1e-6) and one.held_out is not None, one
        for cut in found.cuts:
            assert 0 <= cut.error <= cut.error_without * (1 + 1e-9)
            assert settings.after or cut.error == pytest.approx(cut.error_without)
        assert {(one.layer, one.kind) for one in found.cuts} == {
            (n, kind) for n in range(3) for kind in plan if has(model, n, kind)
        }
        assert all(0 < tau < math.log(2) for one in found.thresholds for tau in one.tau)
        left = {(axis.layer, axis.kind): axis.units for axis in axes(model, tuple(plan))}
        for axis in axes(tiny.model(family), tuple(plan)):
            assert left[axis.layer, axis.kind] == axis.units - plan[axis.kind]
        assert model(IDS).logits.isfinite().all()


def has(model: Any, n: int, kind: str) -> bool:
    return any(axis.layer == n for axis in axes(model, (kind,)))


def test_a_share_of_nothing_is_no_recovery() -> None:
    one, other = tiny.model("llama"), tiny.model("llama")
    plan = even_plan(3, {"ffn": 12, "groups": 1})
    approximate(one, IDS, plan, Approximating(share=0.0), Run())
    found = approximate(other, IDS, plan, Approximating(recovery=False), Run())
    assert not found.rebuilt
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def changed(model: Any, before: Any) -> set[str]:
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    return {name for (name, p), q in pairs if p.shape != q.shape or not torch.equal(p, q)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2_moe"])
def test_what_sees_no_drift_stays(family: str) -> None:
    before = tiny.model(family)
    model = copy.deepcopy(before)
    assert approximate(model, IDS, even_plan(3, {"ffn": 0}), Approximating(), Run()).rebuilt == []
    assert changed(model, before) == set()
    n = min(axis.layer for axis in axes(before, ("ffn",)))
    found = approximate(model, IDS, Plan({(n, "ffn"): 12}), Approximating(), Run())
    (axis,) = (one for one in axes(before, ("ffn",)) if one.layer == n)
    own = {slot.param for slot in axis.slots}
    apart = changed(model, before)
    assert own <= apart and {one.layer for one in found.rebuilt} == set(range(n + 1, 3))
    assert not any(".experts." in name for name in apart)  # which tokens go to one is not settled
    assert all(name in own or int(name.split(".h." if ".h." in name else ".layers.")[1][0]) > n for name in apart)


@pytest.mark.parametrize("kind", ["heads", "groups"])
def test_heads_that_look_where_others_do_go_first(kind: str) -> None:
    """The first layer sees no drift: its maps are the unpruned model's."""
    before = tiny.model("llama", num_attention_heads=8, num_key_value_heads=4 if kind == "groups" else 2)
    sizes = attention(before, 0)
    maps = eager_maps(before, 0)[:, :, 1:].double().unflatten(1, (sizes.kv_heads, sizes.group))
    units = maps.transpose(0, 1).flatten(1, 3)[None] if kind == "groups" else maps.permute(1, 2, 0, 3, 4).flatten(2, 3)
    D = jensen_shannon(units) / units.shape[2]
    expected = []
    for block, pairs in enumerate(D):
        taus = sorted({float(d) for d in pairs.triu(1).flatten() if d > 0})
        listed = next(found for tau in taus if len(found := scanned(pairs, tau * (1 + 1e-9))) == 2)
        expected += [block * len(pairs) + i for i in sorted(listed)]
    model = copy.deepcopy(before)
    count = 2 * len(D)
    found = approximate(model, IDS, Plan({(0, kind): count}), Approximating(), Run())
    (axis,) = (one for one in axes(before, (kind,)) if one.layer == 0)
    keep = torch.tensor([unit for unit in range(axis.units) if unit not in expected])
    assert torch.equal(reader_weight(model, axis), reader_weight(before, axis)[:, axis.columns(keep)])
    assert found.thresholds[0].tau == pytest.approx(
        [float(s) for s in redundancy(D).view(len(D), -1).sort(1).values[:, 1]], rel=1e-4
    )


@pytest.mark.parametrize("score", ["analytic", "measured"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_channels_go_by_the_metric_of_what_enters_and_leaves_them(family: str, score: str) -> None:
    before = tiny.model(family)
    (axis,) = (one for one in axes(before, ("ffn",)) if one.layer == 0)
    rows = {
        "llama": ("mlp.gate_proj", "mlp.up_proj"),
        "phi3": ("mlp.gate_up_proj",),
        "gpt2": ("mlp.c_fc",),
        "opt": ("fc1",),
    }
    entered: dict[str, Tensor] = {}
    watches = [
        layers(before)[0]
        .get_submodule(path)
        .register_forward_pre_hook(lambda _, given, at=path: entered.__setitem__(at, given[0].flatten(0, -2).double()))
        for path in (rows[family][0], axis.reader_module.split(".0.")[1])
    ]
    before(IDS)
    for one in watches:
        one.remove()
    x, z = entered.values()
    B = reader_weight(before, axis).double()
    if score == "measured":
        M = B.square().sum(0) * z.square().sum(0)
    else:
        found = [layers(before)[0].get_submodule(path).weight.double() for path in rows[family]]
        A = [part for one in found for part in (one.T if family == "gpt2" else one).split(axis.units)]
        M = torch.stack([0.5 * B.square().sum(0) * (x @ a.T).square().sum(0) for a in A]).prod(0)
    assert len(axis.writers) >= len(rows[family])
    keep = M.argsort(stable=True)[12:].sort().values
    model = copy.deepcopy(before)
    approximate(model, IDS, Plan({(0, "ffn"): 12}), Approximating(score=score), Run())
    assert torch.equal(reader_weight(model, axis), reader_weight(before, axis)[:, keep])
    scores = unit_scores(before, IDS, ("ffn",), Approximating(score=score), Run())[0, "ffn"]
    assert torch.equal(scores.argsort(stable=True)[12:].sort().values, keep)


ALLOCATIONS = ("equal", "skip:1,0", "global", "standardised", "sensitivity")


@pytest.mark.parametrize("score", ["analytic", "measured"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.covering(some={"allocation": 2})
def test_every_allocation_and_both_layouts(allocation: str, score: str, text_file: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"calibration": str(text_file), "samples": 8, "seq_len": 32, "multiple_of": 4, "probes": 2}
    for layout in ("uniform", "per_layer") if allocation == "equal" else ("per_layer",):
        shape = {"layout": layout, "allocation": allocation, "axes": ("ffn", "groups")}
        model = tiny.model("llama")
        before = sum(p.numel() for p in layers(model).parameters())
        found = billhook.prune(
            model, tokenizer=tiny.tokenizer(), method="goa", score=score, ratio=0.2, **shape, **given
        )
        left = sum(p.numel() for p in layers(found.model).parameters())
        assert 1 - left / before == pytest.approx(0.2, abs=0.05)
        out = found.save(tmp_path / layout)
        assert torch.equal(billhook.load(out)(IDS).logits, found.model(IDS).logits)


def test_a_file_says_how_much_goes(text_file: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("0: {ffn: 48}\n1: {ffn: 20}\n2: {ffn: 32}\n")
    found = billhook.prune(
        tiny.model("llama"),
        tokenizer=tiny.tokenizer(),
        method="goa",
        allocation=str(plan),
        layout="per_layer",
        **{"calibration": str(text_file), "samples": 8, "seq_len": 32},
    )
    assert [axis.units for axis in axes(found.model, ("ffn",))] == [48, 20, 32]


@pytest.mark.parametrize("kind", ["heads", "groups"])
def test_attention_that_takes_no_other_function_is_refused(kind: str, text_file: Path) -> None:
    given: dict[str, Any] = {"calibration": str(text_file), "ratio": 0.1, "axes": (kind,), "layout": "per_layer"}
    with pytest.raises(BillhookError, match=r"falcon computes attention in its own way.*axes ffn.*method fasp"):
        billhook.prune(tiny.model("falcon_new"), tokenizer=tiny.tokenizer(), method="goa", **given)


@pytest.mark.parametrize(("samples", "said"), [(1, True), (8, False)])
def test_fewer_tokens_than_inputs_are_told(samples: int, said: bool, text_file: Path) -> None:
    heard: list[str] = []
    billhook.prune(
        tiny.model("llama"),
        tokenizer=tiny.tokenizer(),
        method="goa",
        announce=heard.append,
        **{"ratio": 0.2, "multiple_of": 4, "calibration": str(text_file), "samples": samples, "seq_len": 32},
    )
    line = "32 tokens of calibration text are fewer than the 48 inputs of a weight: statistics lack rank"
    assert (line in heard[0]) is said


def test_the_report_says_what_was_refitted(text_file: Path) -> None:
    from billhook.reports.cut_tables import cut_rows

    given: dict[str, Any] = {"calibration": str(text_file), "samples": 10, "seq_len": 32, "multiple_of": 4}
    found = billhook.prune(
        tiny.model("llama"), tokenizer=tiny.tokenizer(), method="goa", ratio=0.35, axes=("ffn", "groups"), **given
    )
    rows = dict(cut_rows(found.record))
    assert "o 0." in rows["modules refitted"] and "on held-out windows" in rows["modules refitted"]
    assert "nats" in rows["threshold of heads"]
