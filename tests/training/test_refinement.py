"""Block-local refinement: which layers, towards what, and that it never makes a model worse."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from billhook.calibration.forward import enter, run_layer
from billhook.models.families import layers
from billhook.models.surgery import drop_layers
from billhook.runtime.run import Run
from billhook.training import refinement
from billhook.training.refinement import Refining, Span, aims, refine, spans

TOKENS = torch.randint(0, 258, (20, 16), generator=torch.Generator().manual_seed(0))
GENTLE = Refining(passes=4, rate=1e-3, length=2, rows=2, precision="float32")


@pytest.mark.parametrize("length", [1, 2, 3, 6])
@pytest.mark.parametrize("total", [1, 4, 7])
def test_spans_hold_what_was_touched_and_what_stands_beside_a_gap(total: int, length: int) -> None:
    for mask in itertools.product((0, 1), repeat=total):
        kept = [n for n in range(total) if mask[n]]
        if not kept:
            continue
        for touched in (set(), set(kept), {kept[0]}, {kept[-1]}):
            found = spans(kept, touched, total, length)
            covered = [n for span in found for n in range(span.first, span.last + 1)]
            assert covered == sorted(set(covered)) and all(0 <= n < len(kept) for n in covered)
            for span in found:
                assert span.last - span.first < length
                assert span.after == (kept[span.last + 1] if span.last + 1 < len(kept) else total)
            assert {kept[n] for n in covered} >= touched
            assert not covered or kept[: covered[0]] == list(range(covered[0]))  # no gap before the first
            assert covered or (not touched and len(kept) == total)
            if not touched and len(kept) == total:
                assert not found


def test_a_span_stands_around_its_gap() -> None:
    kept = [n for n in range(30) if not 13 <= n <= 18]
    assert spans(kept, {12}, 30, 6) == [Span(10, 15, 22)]
    assert spans(kept, (), 30, 1) == [Span(12, 12, 19)]  # what is patched is before the gap


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "mixtral", "gpt2", "falcon", "opt"])
def test_goals_are_what_the_unpruned_model_puts_out(family: str) -> None:
    model = tiny.model(family)
    wanted = [Span(1, 1, 2), Span(2, 2, 3)]
    found = aims(model, TOKENS, wanted, GENTLE, Run())
    (state,), (calls,) = enter(model, [TOKENS[:2]])
    after = []
    for n, module in enumerate(layers(model)):
        state = run_layer(module, state, calls[n])
        after.append(state)
    assert [len(states) for states in (found.entering, *found.goals)] == [10, 10, 10]
    for states, expected in zip((found.entering, *found.goals), after, strict=True):
        assert torch.equal(states[0].read(), expected)


@pytest.mark.covering("dtype, precision", some={"family": 2})
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "mixtral", "gpt2", "falcon", "opt"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_cut_has_left_comes_nearer_to_the_unpruned_model(
    family: str, dtype: torch.dtype, precision: str
) -> None:
    model, settings = tiny.model(family).to(dtype), replace(GENTLE, precision=precision)
    aimed = aims(model, TOKENS, [Span(0, 1, 3)], settings, Run())
    drop_layers(model, (1,))
    asked = [param.requires_grad for param in model.parameters()]
    (found,) = refine(model, TOKENS, aimed, settings, Run())
    assert found.after < found.before and found.kept
    assert [param.requires_grad for param in model.parameters()] == asked
    assert all(param.dtype == dtype and param.grad is None for param in model.parameters())


def test_a_span_that_gets_worse_is_left_as_it_was() -> None:
    model = tiny.model("llama")
    before = copy.deepcopy(model.state_dict())
    aimed = aims(model, TOKENS, [Span(0, 2, 3)], GENTLE, Run())  # nothing was cut: it can only get worse
    (found,) = refine(model, TOKENS, aimed, GENTLE, Run())
    assert not found.kept
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_only_the_span_changes_and_later_spans_see_it() -> None:
    def refined(wanted: list[Span], settings: Refining = GENTLE) -> tuple[Any, list[float]]:
        model = tiny.model("llama")
        aimed = aims(model, TOKENS, wanted, settings, Run())
        for module in layers(model):
            module.mlp.down_proj.weight.data *= 0.3
        found = refine(model, TOKENS, aimed, settings, Run())
        return model, [one.before for one in found]

    one, _ = refined([Span(0, 0, 1)])
    both, before = refined([Span(0, 0, 1), Span(1, 2, 3)])
    _, unmoved = refined([Span(0, 0, 1), Span(1, 2, 3)], replace(GENTLE, rate=0.0))
    for first, second in zip(layers(one)[0].parameters(), layers(both)[0].parameters(), strict=True):
        assert torch.equal(first, second)
    damaged = tiny.model("llama").model.layers[2].mlp.down_proj.weight * 0.3
    assert torch.equal(layers(one)[2].mlp.down_proj.weight, damaged)
    assert before[0] == unmoved[0] and before[1] < unmoved[1]  # its inputs are nearer to the unpruned model's
    assert torch.equal(one.model.embed_tokens.weight, both.model.embed_tokens.weight)


def test_it_ends_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second a step: the passes would take longer, or do not."""
    steps: list[int] = []
    monkeypatch.setattr(refinement.time, "perf_counter", lambda: float(len(steps)))
    run = Run(tick=lambda stage, done, total: steps.append(done) if done < total else None)

    def taken(seconds: float | None) -> int:
        model = tiny.model("llama")
        aimed = aims(model, TOKENS, [Span(0, 2, 3)], GENTLE, Run())
        steps.clear()
        refine(model, TOKENS, aimed, replace(GENTLE, passes=4.0, seconds=seconds), run)
        return len(steps)

    assert taken(12.0) == 12 < taken(None) == taken(1e6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_that_is_only_timed_leaves_no_trace(family: str) -> None:
    model = tiny.model(family)
    before = copy.deepcopy(model.state_dict())
    asked = [param.requires_grad for param in model.parameters()]
    (state,), (calls,) = enter(model, [TOKENS[:1]])
    with refinement.rehearsed(model, 1, state, calls[1]) as step:
        step()
        moved = any(not torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert moved  # it was a step
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert [param.requires_grad for param in model.parameters()] == asked
    assert all(param.grad is None for param in model.parameters())
