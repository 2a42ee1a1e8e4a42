"""OptiShear: metrics that order every row alike are one, a search never falls behind Wanda, and what it found is what
is pruned."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

import billhook
from billhook import cli
from billhook.cuts import masking
from billhook.errors import BillhookError
from billhook.math import optishear as methods_optishear
from billhook.math import sparsity, wanda
from billhook.math.layerwise import Settings, Target
from billhook.math.metric import ALIKE, FUNCTIONS, SCALES, Metric
from billhook.math.optishear import norms_of, score
from billhook.math.pattern import Pattern, parse
from billhook.reports.search_tables import outcome_words
from billhook.runtime.run import Run
from billhook.search import optishear
from billhook.search.evaluator import evaluator_of
from billhook.search.optishear import Candidate, with_candidate
from billhook.search.trial import Trial
from billhook.search.validation import Validation

SMALL: dict[str, Any] = dict(method="optishear", sparsity=0.5, seq_len=64, samples=6, trials=12)


def pruned(text: str, **other: Any) -> billhook.Result:
    return billhook.prune(tiny.model("llama"), tokenizer=tiny.tokenizer(), **{"calibration": text, **SMALL, **other})


@pytest.fixture(scope="module")
def whole(text: str) -> billhook.Result:
    return pruned(text)


def layer() -> tuple[torch.Tensor, Target]:
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(200, 24, generator=draw, dtype=torch.float64) * torch.rand(24, generator=draw).double().exp() ** 3
    return torch.randn(16, 24, generator=draw) / 5, Target(X.T @ X)


def written_out(W: torch.Tensor, X: torch.Tensor, metric: Metric) -> torch.Tensor:
    """The score as the paper writes it, factors of whole rows included; exp from the largest, since it overflows."""
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        **{"identity": lambda A: A, "sqrt": torch.sqrt, "square": torch.square, "log": torch.log},
        **{"exp": lambda A: (A - A.max(1, keepdim=True).values).exp(), "sigmoid": torch.sigmoid},
        "softmax": lambda A: A.softmax(1),
    }
    scales: dict[str, Callable[[torch.Tensor], Any]] = {
        **{"none": lambda A: 1.0, "row": lambda A: 1 / A.sum(1, keepdim=True), "sum": lambda A: 1 / A.sum()},
        **{"column": lambda A: 1 / A.sum(0, keepdim=True), "mean": lambda A: 1 / A.mean()},
        "both": lambda A: 1 / (A.sum(1, keepdim=True) + A.sum(0, keepdim=True)),
        "frobenius": lambda A: 1 / A.norm(),
    }
    A, X = W.abs(), X[None]
    own = scales[metric.alpha](A) * functions[metric.f1](A)
    return own * scales[metric.beta](X) * functions[metric.f2](X)


@pytest.mark.parametrize("f1", FUNCTIONS)
@pytest.mark.parametrize("alpha", SCALES)
def test_scores_order_rows_as_the_paper_writes_them(alpha: str, f1: str) -> None:
    W, target = layer()
    X = norms_of(target.gram.diagonal(), 200)
    for beta in SCALES:
        for f2 in FUNCTIONS:
            metric = Metric(alpha, f1, beta, f2)
            masks = [
                sparsity.keep_mask(s, Pattern(0.5))
                for s in (written_out(W.double(), X, metric), score(W.double(), X, metric))
            ]
            assert torch.equal(*masks), metric


def test_as_it_stands_it_is_wanda_and_equals_are_known_without_a_trial() -> None:
    W, target = layer()
    for pattern in (Pattern(0.5), parse("2:4")):
        own, known = (one(W, target, pattern, Settings(tokens=200)) for one in (methods_optishear.prune, wanda.prune))
        assert torch.equal(own.weight, known.weight)
    every = {Metric(a, f, b, g).canonical for a in SCALES for f in FUNCTIONS for b in SCALES for g in FUNCTIONS}
    assert len(every) == 3 * 6 * 3 * 6
    assert all(Metric(f1=name).canonical != Metric() for name in FUNCTIONS if name not in ("identity", *ALIKE))


def test_sparsities_over_depth_keep_the_number_of_zeros() -> None:
    how = masking.Masking("optishear", Pattern(0.5), ("q",), "dense", Settings())
    found = with_candidate(how, Candidate(Metric(), 0.1, -0.04), 30).by_layer
    assert sum(found.values()) / 30 == pytest.approx(0.5)
    assert found[29] - found[0] == pytest.approx(0.2)
    assert found[0] < found[15]
    with pytest.raises(BillhookError, match="no share of zeros"):
        with_candidate(
            masking.Masking("optishear", Pattern(0.05), ("q",), "dense", Settings()), Candidate(Metric(), 0.1), 30
        )


@pytest.mark.parametrize(("family", "targets"), [("llama", ("q", "up")), ("gpt2", ("q", "k", "v", "o", "up"))])
def test_the_model_is_as_it_was_after_trials(family: str, targets: tuple[str, ...]) -> None:
    model, how = tiny.model(family), masking.Masking("optishear", Pattern(0.5), targets, "dense", Settings())
    before = {name: one.clone() for name, one in model.state_dict().items()}
    tokens = torch.randint(0, 90, (16, 32), generator=torch.Generator().manual_seed(0))
    windows = Validation(tokens[:0], tokens[:8], tokens[8:])
    problem = optishear.begin(evaluator_of(model, "kl", None), {}, how, windows, tokens, Run())
    found = problem.losses(
        [Trial(n, Candidate(Metric(f1=f1))) for n, f1 in enumerate(("identity", "square"))], windows.rungs
    )
    assert found[0][0] != found[1][0]
    assert min(map(min, (losses for _, losses in found))) > 0
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    with problem.applied(Candidate(Metric())):
        zeros = [
            float((masking.weight_of(model, name) == 0).float().mean())
            for _, _, name in masking.every(model, how.targets)
        ]
    assert zeros == [0.5] * len(zeros)


def test_the_same_seed_gives_the_same_search_and_zeros(text: str, whole: billhook.Result) -> None:
    again = pruned(text)
    assert json.dumps(again.record["search"]) == json.dumps(whole.record["search"])
    for name, one in whole.model.state_dict().items():
        assert torch.equal(one, again.model.state_dict()[name])
    zeros = whole.record["zeros"]
    assert abs(zeros["sparsity"] - 0.5) < 0.01


def test_what_was_found_is_what_is_pruned_and_can_be_named(text: str, whole: billhook.Result) -> None:
    found = whole.record["search"]
    assert found["trials"][0]["metric"] == str(Metric())
    assert {trial["state"] for trial in found["trials"]} <= {"tried", "repeated", "failed"}
    masks = [trial["mask"] for trial in found["trials"] if trial["state"] == "tried"]
    assert len(masks) == len(set(masks))
    winner = found["winner"]
    assert found["accepted"] or winner["metric"] == str(Metric())
    assert outcome_words(found).startswith("12 trials by nsga2")
    shares = {one["layer"]: one["zeros"] / one["weights"] for one in whole.record["zeros"]["operators"]}
    assert (shares[2] > shares[0]) == (winner["slope"] > 0.001)


def test_a_search_goes_on_from_its_answers(text: str, whole: billhook.Result, tmp_path: Path, monkeypatch: Any) -> None:
    assert json.dumps(pruned(text, work=tmp_path / "s").record["search"]) == json.dumps(whole.record["search"])

    def none(*_: Any) -> Any:
        raise AssertionError("tried again")

    monkeypatch.setattr(optishear, "masked_losses", none)
    assert json.dumps(pruned(text, work=tmp_path / "s").record["search"]) == json.dumps(whole.record["search"])
    with pytest.raises(BillhookError, match="differs in sparsity"):
        pruned(text, work=tmp_path / "s", sparsity=0.6)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"metric": "none,identity,none"}, "name alpha, F1, beta and F2"),
        ({"metric": "none,cube,none,sqrt"}, "part of a metric"),
        ({"method": "wanda", "metric": "none,identity,none,sqrt"}, "belongs to method adapruner or optishear"),
        ({"refit": True}, "search first"),
        ({"space": "samples"}, "leaves nothing to choose"),
        ({"space": "budgets", "sparsity": None, "pattern": "2:4"}, "leaves nothing to choose"),
        ({"minutes": 1e-6}, "too short for one trial"),
        ({"sparsity": None}, "no budget: give sparsity"),
    ],
)
def test_bad_input(text: str, other: dict[str, Any], said: str) -> None:
    with pytest.raises(BillhookError, match=said):
        pruned(text, **other)


def test_the_command_writes_what_it_found(text: str, tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    given = ["search", str(tmp_path / "model"), "--method", "optishear", "--pattern", "2:4", "--calibration", text]
    given += ["--seq-len", "64", "--samples", "4", "--trials", "9", "--sampler", "random", "-o", str(tmp_path / "out")]
    ran = CliRunner().invoke(cli.app, given)
    assert ran.exit_code == 0, ran.output
    written = json.loads((tmp_path / "out" / "billhook.json").read_text())
    assert written["search"]["sampler"] == "random"
    assert written["search"]["dimensions"] == ["alpha", "f1", "beta", "f2"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "How the metric was found" in page
    assert "billhook search" in page
    assert "--method optishear" in page
    assert not (tmp_path / "out.unfinished").exists()
