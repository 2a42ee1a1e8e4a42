"""What people's folders hold besides plain weights: opened whole and page by page, a model has the same tensors, or the
same refusal."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_bad_input
import tiny
import torch
from folders import written
from safetensors.torch import load_file, save_file
from test_bad_input import Bench

from billhook.checkpoints import load, save, shards, verify
from billhook.errors import BillhookError
from billhook.runtime import offload

bench = test_bad_input.bench

IDS = tiny.tokens()
Tensors = dict[str, torch.Tensor]
HEAD, TABLE, UP = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"


def stored(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        held = change(load_file(folder / "model.safetensors"))
        save_file({key: one.clone() for key, one in held.items()}, folder / "model.safetensors", {"format": "pt"})

    return damage


def said(**keys: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return damage


def beside(name: str, **tensors: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: save_file(tensors, folder / name)


def sharded(folder: Path) -> None:
    """An index of other weights, behind the single file that transformers takes."""
    other = folder / "other"
    tiny.model("llama", seed=1).save_pretrained(other, max_shard_size="60KB")
    for file in other.glob("model*"):
        file.rename(folder / file.name)


def without_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    sharded(folder)
    said(transformers_weights="mine.safetensors")(folder)


def prefixed(prefix: str) -> Callable[[Path], None]:
    return stored(lambda held: {prefix + key: one for key, one in held.items()})


MASK = torch.ones(4, 4).tril()[None, None]
THE_SAME: dict[str, tuple[str, Callable[[Path], None], int]] = {  # and how many tensors are said to be unused
    "U8 masks": ("gpt_neox", stored(lambda t: t | {"gpt_neox.layers.0.attention.bias": MASK.byte()}), 0),
    "BOOL masks": ("gpt_neox", stored(lambda t: t | {"gpt_neox.layers.0.attention.bias": MASK.bool()}), 0),
    "other masks": ("llama", stored(lambda t: t | {"model.layers.0.self_attn.bias": MASK.byte()}), 1),
    "counters": (
        "llama",
        stored(lambda t: t | {"model.step": torch.tensor(3), "model.sum": torch.ones(2).double()}),
        2,
    ),
    "inv_freq": (
        "llama",
        stored(lambda t: t | {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": MASK for n in range(3)}),
        0,
    ),
    "a value head": ("llama", stored(lambda t: t | {"v_head.weight": torch.ones(1, 32)}), 1),
    "a large value head": ("llama", stored(lambda t: t | {"v_head.weight": torch.ones(999, 999).half()}), 1),
    "float64": ("llama", stored(lambda t: {key: one.double() for key, one in t.items()}), 0),
    "one tensor in float64": ("llama", stored(lambda t: t | {UP: t[UP].double()}), 0),
    "the embedding under the head's name": (
        "llama",
        stored(lambda t: {key.replace(TABLE, HEAD): t[key] for key in t}),
        0,
    ),
    "the embedding twice": ("llama", stored(lambda t: t | {HEAD: t[TABLE]}), 0),
    "the embedding twice, once wide": ("llama", stored(lambda t: t | {HEAD: t[TABLE].double()}), 0),
    "module.": ("llama", prefixed("module."), 0),
    "module.module.": ("mixtral", prefixed("module.module."), 0),
    "_orig_mod.": ("gpt_neox", prefixed("_orig_mod."), 0),
    "module._orig_mod.": ("gpt2", prefixed("module._orig_mod."), 0),
    "base_model.model.": ("qwen2_moe", prefixed("base_model.model."), 0),
    "layers compiled one by one": (
        "llama",
        stored(lambda t: {k.replace(".mlp", "._orig_mod.mlp"): t[k] for k in t}),
        0,
    ),
    "without its base model's name": ("gpt2", stored(lambda t: {k.removeprefix("transformer."): t[k] for k in t}), 0),
    "an index beside": ("llama", sharded, 0),
    "another file beside": ("llama", beside("consolidated.safetensors", tok_embeddings=torch.ones(9, 9)), 0),
    "an adapter's file beside": ("llama", beside("adapter_model.safetensors", lora=torch.full((9, 9), torch.nan)), 0),
    "a file that config.json names": ("llama", named, 0),
}


def both(folder: Path) -> tuple[Any, Any]:
    return tuple(load.open_model(str(folder), stream=stream).model for stream in (False, True))  # type: ignore[return-value]


def assert_equal(whole: Any, streamed: Any) -> None:
    own, other = dict(offload.parameters(whole)), {k: one.clone() for k, one in offload.parameters(streamed)}
    assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
    assert whole.config.to_dict() == streamed.config.to_dict()
    assert torch.equal(whole(IDS).logits, streamed(IDS).logits)


@pytest.mark.parametrize(("family", "damage", "unused"), THE_SAME.values(), ids=list(THE_SAME))
def test_what_is_odd_about_a_folder_does_not_change_its_model(
    family: str, damage: Callable[[Path], None], unused: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder := written(family, tmp_path / "model"))
    with caplog.at_level(logging.WARNING, "billhook"):
        opened = [load.open_model(str(folder), stream=stream) for stream in (False, True)]
    assert_equal(*(one.model for one in opened))
    assert torch.equal(opened[0].model(IDS).logits, tiny.model(family)(IDS).logits)
    assert {one.dtype for one in opened} == {torch.float32}
    lines = {record.getMessage() for record in caplog.records}
    assert len(lines) == bool(unused) and all(f"{unused} stored tensors are not used" in line for line in lines)


def test_a_command_says_once_what_is_stored_for_nothing(bench: Bench) -> None:
    said(num_hidden_layers=2)(bench.model)
    assert_equal(*both(bench.model))
    code, out, err = bench.run(*bench.prune("--json"))
    assert code == 0 and json.loads(out)
    assert re.fullmatch(
        r"billhook: warning: .*: 9 stored tensors are not used by its model, first model.layers.2.in.*\n", err
    )


def test_only_the_set_of_weights_that_transformers_takes_is_counted(tmp_path: Path) -> None:
    folder = written("llama", tmp_path / "model")
    before = save.stored_parameters(folder), save.stored_bytes(folder), shards.digest(folder)
    sharded(folder)
    beside("consolidated.safetensors", one=torch.ones(9, 9))(folder)
    assert (save.stored_parameters(folder), save.stored_bytes(folder), shards.digest(folder)) == before


OTHERWISE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "another head": ("llama", stored(lambda t: t | {HEAD: t[TABLE] * 2})),
    "another head, gpt2": ("gpt2", stored(lambda t: t | {HEAD: t["transformer.wte.weight"] * 2})),
    "another head under a prefix": (
        "qwen2",
        stored(lambda t: {f"module.{k}": one for k, one in (t | {HEAD: -t[TABLE]}).items()}),
    ),
}


@pytest.mark.parametrize(("family", "damage"), OTHERWISE.values(), ids=list(OTHERWISE))
def test_a_head_of_its_own_stays_its_own(family: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    """Whatever the flag says: the model is untied, its config says so, and what is written comes back equal."""
    folder = written(family, tmp_path / "model")
    assert load.open_model(str(folder)).model.config.tie_word_embeddings
    damage(folder)
    whole, streamed = both(folder)
    assert_equal(whole, streamed)
    head, table = whole.get_output_embeddings().weight, whole.get_input_embeddings().weight
    assert head is not table and not torch.equal(head, table) and not whole.config.tie_word_embeddings
    assert not load.open_skeleton(str(folder)).config.tie_word_embeddings
    for n, model in enumerate((whole, streamed)):
        (out := tmp_path / str(n)).mkdir()
        save.save(model, None, out, folder)
        verify.verify(out, model)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def resized(rows: int, *keys: str) -> Callable[[Path], None]:
    return stored(lambda t: {k: torch.cat([one, one[:rows]]) if k in keys else one for k, one in t.items()})


REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a tensor gone": (
        "llama",
        stored(lambda t: {k: t[k] for k in t if k != UP}),
        f"1 tensors are missing .*first {UP}",
    ),
    "no head": (
        "mistral",
        stored(lambda t: {k: t[k] for k in t if k != HEAD}),
        f"1 tensors are missing .*first {HEAD}",
    ),
    "a larger embedding": (
        "llama",
        resized(6, TABLE),
        rf"{TABLE} \(264 x 32 stored, 258 x 32 by config.*set vocab_size to 264",
    ),
    "both larger": (
        "mistral",
        resized(2, TABLE, HEAD),
        r"2 tensors .*260 x 32 stored, 258 x 32 by .*set vocab_size to 260",
    ),
    "another width": (
        "llama",
        said(intermediate_size=44),
        r"mlp\.\w+\.weight \(.*48.* stored, .*44.* by config.json\)",
    ),
    "integers": ("llama", stored(lambda t: t | {UP: t[UP].to(torch.int8)}), "stores weights as I8: dequantise"),
    "an expert gone": (
        "mixtral",
        stored(lambda t: {k: t[k] for k in t if "1.block_sparse_moe.experts.5" not in k}),
        "3 tensors are missing",
    ),
    "an expert too many": (
        "mixtral",
        stored(lambda t: t | {k.replace("experts.5", "experts.6"): one for k, one in t.items() if "experts.5" in k}),
        "9 tensors have no place .*experts.6",
    ),
    "shards without index": ("llama", without_index, "neither model.safetensors nor model.safetensors.index.json"),
    "a file that is not there": (
        "llama",
        said(transformers_weights="no.safetensors"),
        "'no.safetensors' as transformers_weights",
    ),
    "a file elsewhere": ("llama", said(transformers_weights="../model/model.safetensors"), "no file of the folder"),
}


@pytest.mark.parametrize(("family", "damage", "words"), REFUSED.values(), ids=list(REFUSED))
def test_a_refusal_is_the_same_in_both_ways(
    family: str, damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    folder = written(family, tmp_path / "model")
    damage(folder)
    found = []
    for stream in (False, True):
        with pytest.raises(BillhookError, match=words) as refusal:
            load.open_model(str(folder), stream=stream)
        found.append(str(refusal.value))
    assert found[0] == found[1] and "\n" not in found[0]
