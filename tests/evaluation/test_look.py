"""The look at the end of a prune: what it sees of each family, and when it warns."""

import copy

import pytest
import tiny
import torch

import billhook
from billhook.evaluation import look as looking
from billhook.evaluation.look import Look, compared, look, questions, warning
from billhook.reports.cut_tables import look_rows


@pytest.mark.covering(some={"family": 6})
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_model_is_no_worse_than_itself(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "NEW_TOKENS", 8)
    model, tokenizer = tiny.model(family), tiny.tokenizer()
    seen = [look(model, tokenizer) for _ in range(2)]
    both = compared(*seen)
    assert both["factor"] == 1 and both["kl"] == pytest.approx(0, abs=1e-6) and not both["warning"]
    assert all(before == after for before, after in (both["repetition"] | both["tasks"]).values())


def test_a_look_leaves_no_trace() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    look(model, tokenizer)
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_a_changed_model_is_told_from_the_unpruned_one() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    before = look(model, tokenizer)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(8)
    both = compared(before, look(model, tokenizer))
    assert both["kl"] > 1e-3 and both["factor"] != 1


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [(0.05, 0.30, "6.0 × as often"), (0.0, 0.4, "40% of the time"), (0.2, 0.3, ""), (None, 0.9, ""), (0.5, 0.1, "")],
)
def test_only_a_model_that_begins_to_repeat_itself_is_warned_of(
    before: float | None, after: float | None, said: str
) -> None:
    found = warning({"greedy": [before, after]})
    assert (said in found) if said else not found


def test_the_answers_of_the_examples_are_right() -> None:
    for question, answer in questions()["sums"]:
        a, b = question.splitlines()[-1].removesuffix(" =").split(" + ")
        assert int(answer) == int(a) + int(b)
    for question, answer in questions()["counting"]:
        assert int(answer) == int(question.splitlines()[-1].split(", ")[-1].removesuffix(",")) + 1
    assert all(answer.strip() in question for question, answer in questions()["copying"])


def test_another_vocabulary_is_not_compared_token_by_token() -> None:
    few, many = (Look((1.0,), torch.zeros(1, 2, size), {}, {}) for size in (4, 8))
    assert compared(few, many)["kl"] is None


@pytest.mark.usefixtures("looks")
def test_a_prune_ends_with_a_look() -> None:
    settings = {"ratio": 0.3, "calibration": str, "samples": 4, "seq_len": 32, "multiple_of": 2}
    settings["calibration"] = __file__
    for asked in (True, False):
        result = billhook.prune(
            tiny.model("llama"), method="fasp", tokenizer=tiny.tokenizer(), look=asked, quiet=True, **settings
        )
        seen = result.record["look"]
        assert (seen is not None) == asked
        if seen:
            assert seen["kl"] > 0
            assert next(name for name, _ in look_rows(seen)) == "on Python's language reference"
            assert "look" in result.record["seconds"]
