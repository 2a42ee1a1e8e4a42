"""FASP end to end on tiny models: every family, every stream, every axis, and the Python door."""

import copy
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import billhook
from billhook.calibration.passage import Route
from billhook.calibration.walk import walk
from billhook.choices import AXIS_STREAMS
from billhook.cuts.narrowing import Settings, narrow
from billhook.models.axes import axes, reader_weight
from billhook.models.families import layers
from billhook.models.plan import even_plan
from billhook.models.surgery import cast
from billhook.runtime import tensor_files
from billhook.runtime.run import Run

IDS = tiny.tokens(16, 32)


def damage(model: torch.nn.Module, dense: torch.nn.Module) -> float:
    reference = dense(IDS).logits
    return float((model(IDS).logits - reference).norm() / reference.norm())


@pytest.mark.parametrize("stream", AXIS_STREAMS)
@pytest.mark.parametrize("family", tiny.DENSE)
@pytest.mark.covering(some={"family": 6})
def test_restoration_repairs_in_every_family_and_stream(family: str, stream: str) -> None:
    dense = tiny.model(family)
    plain, restored = copy.deepcopy(dense), copy.deepcopy(dense)
    narrow(plain, IDS, even_plan(3, {"ffn": 12}), Settings(restoration=False, stream=stream), Run())
    cuts = narrow(restored, IDS, even_plan(3, {"ffn": 12}), Settings(stream=stream), Run())
    assert [axis.units + 12 for axis in axes(restored, ("ffn",))] == [axis.units for axis in axes(dense, ("ffn",))]
    assert damage(restored, dense) < damage(plain, dense)
    for cut in cuts:
        assert 0 < cut.error <= cut.error_without + 1e-12
        assert cut.error_held_out is not None and cut.error_held_out > 0


def test_a_dense_target_repairs_more_than_the_sequential_stream() -> None:
    dense = tiny.model("llama")
    found = {}
    for stream in ("sequential", "dense_target"):
        model = copy.deepcopy(dense)
        narrow(model, IDS, even_plan(3, {"ffn": 12}), Settings(stream=stream), Run())
        found[stream] = damage(model, dense)
    assert found["dense_target"] < found["sequential"]


def test_a_dense_target_without_correction_is_the_sequential_stream() -> None:
    one, other = tiny.model("llama"), tiny.model("llama")
    narrow(one, IDS, even_plan(3, {"ffn": 12}), Settings(correction=0.0, stream="dense_target"), Run())
    narrow(other, IDS, even_plan(3, {"ffn": 12}), Settings(stream="sequential"), Run())
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize("family", tiny.DENSE)
@pytest.mark.covering(some={"family": 3})
def test_ends_layer_says_where_the_reader_adds_to_the_output_as_it_is(family: str) -> None:
    """What the dense target relies on: shift the reader's output, and the layer's output shifts by just that."""
    model = tiny.model(family)
    for axis in axes(model, ("ffn", "groups")):
        outputs: list[torch.Tensor] = []
        shift = torch.randn(32, generator=torch.Generator().manual_seed(2))
        watch = layers(model)[axis.layer].register_forward_hook(
            lambda _, __, out, o=outputs: o.append(out[0] if isinstance(out, tuple) else out)
        )
        model(IDS[:2])
        push = model.get_submodule(axis.reader_module).register_forward_hook(lambda _, __, out, s=shift: out + s)
        model(IDS[:2])
        watch.remove()
        push.remove()
        as_it_is = torch.allclose(outputs[1] - outputs[0], shift.expand_as(outputs[0]), atol=1e-4)
        assert axis.ends_layer == (as_it_is and axis.kind == "ffn")  # with a parallel residual, attention does so, too
        assert as_it_is or axis.kind != "ffn" or family in (*tiny.POST_NORM, "granite")


def test_the_paper_score_drops_the_columns_of_least_norm_product() -> None:
    model = tiny.model("llama")
    kept = copy.deepcopy(model)
    narrow(kept, IDS, even_plan(3, {"ffn": 20}), Settings(score="wanda", restoration=False, stream="dense"), Run())
    for layer in walk(tiny.model("llama"), IDS, ("ffn",), Run(), Route(held_out=0.0)):
        axis = layer.axes[0]
        W, norms = reader_weight(model, axis), layer.fit[axis.reader_module].gram.diagonal().sqrt()
        by_hand = (W.abs().sum(0).double() * norms).argsort()[20:].sort().values
        assert torch.equal(reader_weight(kept, axis), W[:, by_hand])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_same_call_twice_gives_the_same_bits(family: str) -> None:
    models = [tiny.model(family) for _ in range(2)]
    for model in models:
        narrow(model, IDS, even_plan(3, {"ffn": 12}), Settings(), Run())
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kinds", [("ffn",), ("heads",), ("groups",), ("ffn", "heads"), ("ffn", "groups")])
@pytest.mark.covering
def test_prune_in_memory_and_save(kinds: tuple[str, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(tiny.text())
    model = tiny.model("llama")
    cast(model, dtype)
    settings = dict(axes=kinds, calibration=str(tmp_path / "words.txt"), samples=8, seq_len=32, multiple_of=4)
    result = billhook.prune(model, method="fasp", tokenizer=tiny.tokenizer(), ratio=0.15, **settings)
    assert result.model is model and model.dtype is dtype
    assert {cut["kind"] for cut in result.record["cuts"]} <= set(kinds)
    out = result.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.dtype is dtype
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert result.record["verified"]["parameters_on_disk"] == result.record["sizes"]["after"]["parameters"]


def test_a_bfloat16_checkpoint_stays_one(tmp_path: Path, text_file: Path) -> None:
    """Computed in float32 on a CPU, written as it came."""
    tiny.model("qwen2").to(torch.bfloat16).save_pretrained(tmp_path / "in")
    tiny.tokenizer().save_pretrained(tmp_path / "in")
    settings = dict(calibration=str(text_file), samples=8, seq_len=32, multiple_of=4)
    billhook.prune(tmp_path / "in", method="fasp", ratio=0.2, **settings).save(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype is torch.bfloat16


def test_a_failing_reload_leaves_nothing(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(calibration=str(text_file), samples=8, seq_len=32, multiple_of=4)
    result = billhook.prune(tiny.model("llama"), method="fasp", tokenizer=tiny.tokenizer(), ratio=0.2, **settings)
    written = tensor_files.write

    def corrupt(tensors: dict[str, torch.Tensor], to: Path) -> None:
        first = next(iter(tensors))
        written({**tensors, first: tensors[first] + 1}, to)

    monkeypatch.setattr(tensor_files, "write", corrupt)
    with pytest.raises(billhook.BillhookError, match="logits after reloading differ"):
        result.save(tmp_path / "deep" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["words.txt"]
