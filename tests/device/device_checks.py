"""What `test_device` asks of a pretended accelerator that has float64, each in a process of its own."""

from collections import Counter
from pathlib import Path
from typing import Any

import pretended
import pytest
import tiny
import torch

import billhook
from billhook.calibration import passage
from billhook.data import Text
from billhook.data import windows as windows_of
from billhook.evaluation.perplexity import perplexities
from billhook.search import evaluator

SMALL: dict[str, Any] = dict(method="fasp", seq_len=16, samples=8, multiple_of=2, ratio=0.2, look=False, quiet=True)
FORWARD = "calibration/forward.py enter"
CPU = torch.device("cpu")


def pruned(case: tuple[str, dict[str, Any]], text: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """The weights of a pruned model; attention is the same arithmetic on both devices."""
    family, how = case
    model = tiny.model(family, **(dict(num_hidden_layers=5) if how.get("method") == "layerchop" else {}))
    model.set_attn_implementation("eager")
    how = {**SMALL, **how, "tokenizer": tiny.tokenizer(), "calibration": str(text), "device": str(device)}
    return billhook.prune(model.to(device), **how).model.state_dict()


def every_method_prunes_as_on_the_cpu(case: tuple[str, dict[str, Any]], text: Path) -> None:
    known = pruned(case, text, CPU)
    with pretended.device(float64=True):
        found = {key: one.cpu() for key, one in pruned(case, text, pretended.DEVICE).items()}
    assert found.keys() == known.keys()
    for key, one in known.items():
        torch.testing.assert_close(found[key], one)


def waits(case: tuple[str, dict[str, Any]], text: Path, windows: int) -> Counter[str]:
    with pretended.device(float64=True) as counted:
        pruned((case[0], {**case[1], "samples": windows}), text, pretended.DEVICE)
        return Counter(counted)


def waits_do_not_grow_with_the_text(case: tuple[str, dict[str, Any]], text: Path) -> None:
    """Twice as many batches: every function waits as often, but for the whole model's forward, where transformers
    looks at its masks."""
    passage.BATCH_TOKENS = 16
    few, many = (waits(case, text, windows) for windows in (10, 20))
    more = {place: (few[place], count) for place, count in many.items() if count > few[place]}
    assert few and more.keys() <= {FORWARD}, more


def perplexity_is_as_on_the_cpu_whatever_the_windows() -> None:
    text = Text("here", tiny.text(900))
    found, counts = [], []
    for device in (CPU, pretended.DEVICE):
        for windows in (8, 16):
            model = tiny.model("llama")
            model.set_attn_implementation("eager")
            with pretended.device(float64=True) as counted:
                two = [model.to(device), tiny.model("llama", seed=1).to(device)]
                given = windows_of(text, tiny.tokenizer(), 16, windows)
                found.append(perplexities(two, given, reference=True)[1])
                counts.append({line: n for line, n in counted.items() if line.startswith("evaluation/")})
    assert [one.perplexity for one in found[:2]] == pytest.approx([one.perplexity for one in found[2:]], rel=1e-5)
    assert counts[:2] == [{}, {}] and counts[2] == counts[3]


def a_trial_waits_as_often_for_more_windows() -> None:
    model, tokens = tiny.model("llama"), tiny.tokens(8, 16)
    with pretended.device(float64=True) as counted:
        model = model.to(pretended.DEVICE)
        seen = []
        for windows in (4, 8):
            counted.clear()
            evaluator.masked_losses(model, {}, tokens[:windows], None, None, None)
            seen.append(sum(n for line, n in counted.items() if line.startswith("search/")))
    assert seen == [2, 2]  # transformers waits, too, once in a forward


def waits_are_counted() -> None:
    with pretended.device(float64=True) as counted:
        x = torch.arange(4.0).to(pretended.DEVICE)
        x.double() @ x.double() + 1
        assert not counted
        for ask in (
            lambda: x.sum().item(),
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: bool((x > 5).any()),
            lambda: x.nonzero(),
            lambda: x[x > 1],
            lambda: float(x[0]),
        ):
            before = sum(counted.values())
            ask()
            assert sum(counted.values()) == before + 1
