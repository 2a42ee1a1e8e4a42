"""Text decoders of multimodal models: cut where they stand, all else byte for byte, loaded in the stock class."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as T
from folders import run
from safetensors.torch import load_file

import billhook
from billhook.checkpoints import load
from billhook.errors import BillhookError
from billhook.models.families import layers
from billhook.models.multimodal import within

IMAGE = 250  # id of the token that stands for a piece of an image
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
DEEP = {**tiny.SHAPE, "num_hidden_layers": 4}
QWEN = dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, spatial_merge_size=2)
CONFIGS: dict[str, Any] = {
    "gemma3": lambda: T.Gemma3Config(
        text_config=T.Gemma3TextConfig(**DEEP, **tiny.GATED, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
        vision_config=T.SiglipVisionConfig(**VISION, image_size=16, patch_size=4),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    ),
    "gemma4": lambda: T.Gemma4Config(
        text_config=T.Gemma4TextConfig(**DEEP, **tiny.GATED, **tiny.GEMMA4, layer_types=[tiny.SLIDING, tiny.FULL] * 2),
        vision_config=T.Gemma4VisionConfig(
            **VISION, num_key_value_heads=2, head_dim=8, patch_size=4, pooling_kernel_size=2, position_embedding_size=16
        ),
        image_token_id=IMAGE,
    ),
    "llava": lambda: T.LlavaConfig(
        text_config=T.LlamaConfig(**DEEP, **tiny.GATED),
        vision_config=T.CLIPVisionConfig(**VISION, image_size=16, patch_size=8, projection_dim=16),
        image_token_index=IMAGE,
    ),
    "qwen3_vl": lambda: T.Qwen3VLConfig(
        text_config=T.Qwen3VLTextConfig(
            **DEEP, **tiny.GATED, head_dim=16, rope_parameters={"rope_theta": 1e4, "mrope_section": [4, 2, 2]}
        ),
        vision_config=T.Qwen3VLVisionConfig(
            **QWEN, out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0]
        ),
        image_token_id=IMAGE,
        vision_start_token_id=251,
        tie_word_embeddings=True,
    ),
}
CLIP = dict(**VISION, image_size=16, patch_size=8)
DELTA = {**tiny.DELTA, "layer_types": ["linear_attention", "full_attention"] * 2}
EYES = dict(**QWEN, out_hidden_size=32, num_position_embeddings=16)
MORE: dict[str, Any] = {  # the same, in other words: seen on text alone
    "llava_next": lambda: T.LlavaNextConfig(
        text_config=T.MistralConfig(**DEEP, **tiny.GATED),
        vision_config=T.CLIPVisionConfig(**CLIP),
        image_token_index=IMAGE,
    ),
    "llava_onevision": lambda: T.LlavaOnevisionConfig(
        text_config=T.Qwen2Config(**DEEP, **tiny.GATED),
        vision_config=T.SiglipVisionConfig(**CLIP),
        image_token_index=IMAGE,
    ),
    "mistral3": lambda: T.Mistral3Config(
        text_config=T.MistralConfig(**DEEP, **tiny.GATED, head_dim=8),
        vision_config=T.PixtralVisionConfig(**CLIP),
        image_token_index=IMAGE,
    ),
    "qwen2_5_vl": lambda: T.Qwen2_5_VLConfig(
        text_config=T.Qwen2_5_VLTextConfig(
            **DEEP, **tiny.GATED, rope_parameters={"rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        ),
        vision_config=T.Qwen2_5_VLVisionConfig(**QWEN, out_hidden_size=32),
        image_token_id=IMAGE,
    ),
    "qwen3_5": lambda: T.Qwen3_5Config(
        text_config=T.Qwen3_5TextConfig(**DEEP, **tiny.GATED, **DELTA), vision_config=EYES, image_token_id=IMAGE
    ),
    "qwen3_5_moe": lambda: T.Qwen3_5MoeConfig(
        text_config=T.Qwen3_5MoeTextConfig(
            **DEEP, num_key_value_heads=2, **tiny.MIXED, **tiny.QWEN_MOE, **DELTA, shared_expert_intermediate_size=24
        ),
        vision_config=EYES,
        image_token_id=IMAGE,
    ),
}
IDS = tiny.tokens(2, 24)


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = T.AutoModelForImageTextToText.from_config({**CONFIGS, **MORE}[name]()).eval().requires_grad_(False)
    for param in model.parameters():
        param.data = torch.randn_like(param) * 0.1 + (1.0 if param.ndim == 1 else 0.0)
    return model


def stock(folder: Path) -> Any:
    return T.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp("models") / name for name in CONFIGS}
    for name, folder in found.items():
        made(name).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text('{"size": 16}')
        (folder / "README.md").write_text("---\npipeline_tag: image-text-to-text\n---\n")
    return found


def with_image(name: str) -> dict[str, Any]:
    """Token ids, some of which an image stands for, and that image."""
    pieces = 4
    ids = tiny.tokens(1, 16, seed=2).clamp(max=200)
    ids[:, 4 : 4 + pieces] = IMAGE
    draw = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {"input_ids": ids}
    if name == "gemma4":
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
        return given | {"pixel_values": torch.randn(1, 16, 48, generator=draw), "image_position_ids": places}
    if name != "qwen3_vl":
        return given | {"pixel_values": torch.randn(1, 3, 16, 16, generator=draw)}
    grid = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE).int()}
    return given | grid | {"pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=draw)}


@pytest.mark.parametrize("name", CONFIGS)
def test_on_text_the_decoder_computes_what_the_whole_does(name: str, folders: dict[str, Path]) -> None:
    ours = load.load(folders[name])
    assert torch.equal(ours(IDS).logits, stock(folders[name])(IDS).logits)
    assert within(ours).model_type == name  # type: ignore[union-attr]


CUTS: dict[str, dict[str, Any]] = {
    "layers": {"method": "layerchop", "drop": "2"},
    "ffn": {"method": "fasp", "axes": ("ffn",), "ratio": 0.2, "multiple_of": 8},
    "groups": {"method": "fasp", "axes": ("groups",), "ratio": 0.2},
}


@pytest.mark.parametrize(
    ("name", "cut"),
    [("gemma3", "layers"), ("gemma4", "layers"), ("llava", "ffn"), ("qwen3_vl", "groups"), ("qwen3_vl", "layers")],
)
@pytest.mark.covering
def test_what_is_cut_loads_in_its_stock_class(
    name: str, cut: str, folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    given = {"calibration": str(text_file), "samples": 8, "seq_len": 32, **CUTS[cut]}
    result = billhook.prune(folders[name], **given)
    out = result.save(tmp_path / "out")
    again, before = stock(out), stock(folders[name])
    assert type(again) is type(before)
    assert torch.equal(again(IDS).logits, result.model(IDS).logits)
    # the whole as it was, with the decoder that was cut in its place
    decoder = before.model.language_model
    decoder.layers = layers(result.model)
    decoder.config.num_hidden_layers = len(decoder.layers)
    if name == "gemma4":  # parts for each layer, and kinds of layers, are of the body and its config
        before.model.language_model, before.config.text_config = result.model.base_model, result.model.config
    torch.testing.assert_close(again(**with_image(name)).logits, before(**with_image(name)).logits)
    assert result.record["model_type"] == name


@pytest.mark.whole
@pytest.mark.parametrize("name", MORE)
def test_other_models_with_eyes_load_in_their_stock_class(name: str, text_file: Path, tmp_path: Path) -> None:
    made(name).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    assert torch.equal(load.load(tmp_path / "model")(IDS).logits, stock(tmp_path / "model")(IDS).logits)
    cut = {"method": "experts", "ratio": 0.2} if name == "qwen3_5_moe" else {"method": "layerchop", "drop": "2"}
    result = billhook.prune(tmp_path / "model", calibration=str(text_file), samples=8, seq_len=32, **cut)
    out = result.save(tmp_path / "out")
    torch.testing.assert_close(stock(out)(IDS).logits, result.model(IDS).logits)
    assert result.record["sizes"]["achieved_ratio"] > 0.1


def test_a_config_with_the_keys_of_its_decoder_among_its_own(tmp_path: Path) -> None:
    """As the released Qwen2.5-VL has it."""
    made("qwen2_5_vl").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    text = content.pop("text_config")
    file.write_text(json.dumps(text | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}} | content))
    assert torch.equal(load.load(tmp_path / "model")(IDS).logits, stock(tmp_path / "model")(IDS).logits)
    result = billhook.prune(tmp_path / "model", method="layerchop", drop="2")
    out = result.save(tmp_path / "out")
    assert torch.equal(stock(out)(IDS).logits, result.model(IDS).logits)
    assert "text_config" not in json.loads((out / "config.json").read_text())


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_all_else_goes_along_as_it_is(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    billhook.prune(folders[name], method="layerchop", drop="2").save(out)
    old, new = contents(folders[name]), contents(out)
    assert {key for key in old if "layers.3." not in key or "language_model" not in key} == set(new)
    other = [key for key in old if "language_model" not in key and "lm_head" not in key]
    assert other and all(torch.equal(old[key], new[key]) for key in other)
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (folders[name], out))
    differing = {key for key in was if was[key] != now.get(key)}
    assert differing == {"text_config"}
    changed = {key for key, value in now["text_config"].items() if was["text_config"].get(key) != value}
    assert changed - {"layer_types", "per_layer_config"} == {"num_hidden_layers"}
    assert (out / "preprocessor_config.json").read_text() == '{"size": 16}'
    assert "\npipeline_tag: image-text-to-text\n" in (out / "README.md").read_text()


def test_layers_that_images_reach_stay(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match="layer 0 would go: qwen3_vl adds image features to the first 1 layers"):
        billhook.prune(folders["qwen3_vl"], method="layerchop", drop="0")


REFUSED = {
    "--method slicegpt --ratio 0.2": "gemma3 cannot give up 'residual'",
    "--method fasp --ratio 0.2 --layout per_layer": "gemma3 has no per_layer layout",
    "--method layerchop --drop 1 --vocab-from TEXT": "the vocabulary of gemma3 cannot be trimmed",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_would_not_fit_around_it_is_refused(
    arguments: str, folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    given = ["--calibration", text_file, "--samples", 4, "--seq-len", 32, "-o", tmp_path / "out"]
    said = run("prune", folders["gemma3"], *arguments.replace("TEXT", str(text_file)).split(), *given)
    assert REFUSED[arguments] in said and not (tmp_path / "out").exists()


def test_a_decoder_that_reads_images_in_layers_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(T.MllamaConfig().to_dict()))
    with pytest.raises(BillhookError, match=r"multimodal \(mllama\): its decoder reads the image in layers of cross"):
        load.load(tmp_path)


def test_a_config_that_transformers_refuses_is_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    content = json.loads((folders["qwen3_vl"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"vision_config": {"hidden_size": "wide"}}))
    with pytest.raises(BillhookError, match=r"config.json: transformers could not read it"):
        load.load(tmp_path)


def test_no_gguf_is_written_of_the_decoder_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    assert "no GGUF of llava, which is multimodal" in run("export", folders["llava"], "-o", tmp_path / "out.gguf")
