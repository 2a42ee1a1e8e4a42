"""What `test_doubles` asks of a device without float64, each in a process that has it: autograd starts threads for
every kind of device that is known, and a process with such threads cannot be forked.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pretended
import pytest
import tiny
import torch

import billhook
from billhook import tensors
from billhook.cuts import masking
from billhook.math.layerwise import Settings
from billhook.math.metric import Metric
from billhook.math.pattern import Pattern
from billhook.runtime.cache import Grams
from billhook.runtime.run import Run
from billhook.search import optishear, pool
from billhook.search.evaluator import evaluator_of
from billhook.search.trial import Trial
from billhook.search.validation import Validation

SMALL: dict[str, Any] = dict(seq_len=16, samples=4, multiple_of=2, ratio=0.2)

tensors.WITHOUT_FLOAT64 = {pretended.NAME}


def pruned(case: tuple[str, dict[str, Any]], text: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """The weights of a pruned model, on the CPU; attention is the same arithmetic on both devices."""
    family, how = case
    model = tiny.model(family, **({"num_hidden_layers": 8 if "preset" in how else 2} if family == "llama" else {}))
    model.set_attn_implementation("eager")
    how = {**SMALL, **how, "tokenizer": tiny.tokenizer(), "calibration": str(text), "device": str(device)}
    return billhook.prune(model.to(device), **{"method": "fasp", "look": False, **how}).model.cpu().state_dict()


def every_method_prunes_as_on_the_cpu(case: tuple[str, dict[str, Any]], text: Path) -> None:
    known = pruned(case, text, torch.device("cpu"))
    with pretended.device():
        found = pruned(case, text, pretended.DEVICE)
    assert found.keys() == known.keys()
    for key, one in known.items():
        torch.testing.assert_close(found[key], one)


def windows_are_grouped_as_on_the_cpu() -> None:
    windows, embedding = torch.randint(50, (20, 8)), torch.randn(50, 6)
    with pretended.device():
        found = pool.clustered(windows, embedding.to(pretended.DEVICE), 3, 0)
    assert found.equal(pool.clustered(windows, embedding, 3, 0))


def kept_grams_are_read_to_where_float64_is(tmp_path: Path) -> None:
    grams, G = Grams(tmp_path, {}), torch.eye(3, dtype=torch.float64)
    grams.keep("reader", G, G)
    with pretended.device():
        assert all(one is not None and one.equal(G) for one in grams.read("reader", pretended.DEVICE))


def a_metric_is_tried_as_on_the_cpu() -> None:
    how = masking.Masking("optishear", Pattern(0.5), ("q", "up"), "dense", Settings())
    tokens = torch.randint(0, 90, (8, 16), generator=torch.Generator().manual_seed(0))
    found = []
    # a CPU with instructions for bfloat16 tries in it, where the pretended device does not
    with pretended.device(), mock.patch("billhook.search.evaluator.autocast_dtype", return_value=None):
        for device in (torch.device("cpu"), pretended.DEVICE):
            windows = Validation(tokens[:0], tokens[:2], tokens[2:])
            model = tiny.model("llama", num_hidden_layers=2).to(device)
            problem = optishear.begin(evaluator_of(model, "nll", None), {}, how, windows, tokens, Run())
            found += problem.losses([Trial(0, optishear.Candidate(Metric(f1="square")))], windows.rungs)
    assert found[0][0] == found[1][0] != ""
    assert found[0][1] == pytest.approx(found[1][1])


def the_device_refuses_what_an_apple_gpu_refuses() -> None:
    with pretended.device():
        x = torch.ones(2, device=pretended.DEVICE)
        for ask in (
            lambda: x.double(),
            lambda: x.sum(dtype=torch.float64),
            lambda: x.to(torch.ones(2, dtype=torch.float64)),
            lambda: torch.zeros(2, dtype=torch.float64, device=pretended.DEVICE),
            lambda: torch.ones(2, dtype=torch.float64).to(pretended.DEVICE),
            lambda: x.new_zeros(2, dtype=torch.float64),
        ):
            with pytest.raises(TypeError, match="float64"):
                ask()
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(2)
        assert tensors.precise(x).equal(torch.ones(2, dtype=torch.float64))
