"""What reaches the terminal of a command is billhook's own."""

import os
import subprocess
import sys

import pytest
import tiny
import torch

from billhook.models import cached

COMMAND = """
import logging, subprocess, sys, types, warnings

def work():  # what libraries do in passing, in a command and in a process that it starts
    for kind in (FutureWarning, UserWarning, DeprecationWarning, RuntimeWarning):
        warnings.warn("a library's word", kind)
    logging.getLogger("library").warning("a library's word")
    subprocess.run([sys.executable, "-c", "import warnings; warnings.warn('of a worker', FutureWarning)"])
    print("done")

sys.modules["billhook.cli"] = types.SimpleNamespace(main=work)
from billhook.__main__ import main
main()
"""


@pytest.mark.parametrize(("asked", "silent"), [({}, True), ({"PYTHONWARNINGS": "default"}, False)])
def test_what_libraries_warn_of_stays_off_the_terminal_unless_asked_for(asked: dict[str, str], silent: bool) -> None:
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND], env=plain | asked, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "done\n"
    assert done.stderr == "" if silent else done.stderr.count("Warning: ") == 5


@pytest.mark.parametrize("family", tiny.CONFIGS)
@torch.no_grad()
def test_every_family_goes_on_from_its_cache_without_a_warning(family: str) -> None:
    model, ids = tiny.model(family), tiny.tokens(2, 9)
    step = model(ids[:, :5], use_cache=True)
    logits = [step.logits]
    for token in ids[:, 5:].split(1, dim=1):
        step = model(token, **cached.after(step))
        logits.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, rtol=1e-4, atol=1e-4)
