"""What a checkpoint's files hold is what transformers would have written, and what a safetensors file is."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from billhook.checkpoints import save
from billhook.models import layout
from billhook.runtime import tensor_files


def held(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.covering(some={"family": 3})
def test_a_checkpoint_is_what_transformers_writes(family: str, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    model = tiny.model(family).to(torch.bfloat16)
    save.save(model, tiny.tokenizer(), ours, None)
    model.save_pretrained(theirs)
    tiny.tokenizer().save_pretrained(theirs)

    assert {f.name for f in ours.iterdir()} == {f.name for f in theirs.iterdir()}
    said, expected = (json.loads((of / "config.json").read_text()) for of in (ours, theirs))
    assert said.items() >= layout.config_json(model, expected).items()  # and keys of older releases
    found, stored = held(ours), held(theirs)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], one) and found[name].dtype == one.dtype for name, one in stored.items())


def test_a_tensor_comes_back_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.rand(3, 5) * 9).to(dtype) for dtype in tensor_files.NAMES}
    tensors |= {"transposed": torch.randn(4, 6).T, "scalar": torch.tensor(3.0), "none": torch.zeros(0, 4)}
    tensors["odd"] = torch.rand(7).to(torch.uint8)  # ends at no multiple of anything
    tensor_files.write(tensors, tmp_path / "one.safetensors")

    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == tensors.keys()
        for name, one in tensors.items():
            back = file.get_tensor(name)
            assert back.dtype == one.dtype and back.shape == one.shape and torch.equal(back, one)
