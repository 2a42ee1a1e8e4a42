"""Texts and comparisons are plain argmax, whatever generation_config.json and the tokenizer ask for, and the file goes
along."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from folders import written
from tokenizers import processors
from transformers import GenerationConfig

from billhook.checkpoints import generation, load, save
from billhook.checkpoints.clients import transformers_client
from billhook.evaluation.continuations import continuations
from billhook.models import greedy
from billhook.runtime import special_tokens

NEW = 6
ENDING = list(range(0, 258, 3))
ODD: dict[str, Any] = {  # a value of each setting of `generate` that would change what it needs, returns or prefers
    **{"max_length": 3, "max_new_tokens": 3, "min_length": 60, "min_new_tokens": 60, "max_time": 1e-9},
    **{"early_stopping": "never", "stop_strings": ["a"], "do_sample": True, "num_beams": 3, "use_mtp": True},
    **{"use_cache": False, "cache_implementation": "static", "cache_config": {"a": 1}, "max_cache_len": 4},
    **{"temperature": 0.1, "top_k": 2, "top_p": 0.2, "min_p": 0.9, "top_h": 0.2, "typical_p": 0.1},
    **{"epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "repetition_penalty": 9.0, "encoder_repetition_penalty": 9.0},
    **{"length_penalty": 3.0, "no_repeat_ngram_size": 1, "bad_words_ids": [[n] for n in range(200)]},
    **{"renormalize_logits": True, "forced_bos_token_id": 3, "forced_eos_token_id": 3, "remove_invalid_values": True},
    **{"exponential_decay_length_penalty": [1, 9.0], "suppress_tokens": list(range(200))},
    **{"begin_suppress_tokens": list(range(200)), "sequence_bias": [[[5], 500.0]], "token_healing": True},
    **{"guidance_scale": 3.0, "watermarking_config": {"greenlist_ratio": 0.5, "bias": 500.0}},
    **{"num_return_sequences": 2, "output_attentions": True, "output_hidden_states": True, "output_scores": True},
    **{"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 5, "bos_token_id": 5},
    **{"eos_token_id": ENDING, "encoder_no_repeat_ngram_size": 1, "decoder_start_token_id": 3, "is_assistant": True},
    **{"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.9},
    **{"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 3, "assistant_early_exit": 1},
    **{"assistant_lookbehind": 3, "target_lookbehind": 3, "assistant_ensemble_weight": 0.5},
    **{"speculation_type": "dflash", "compile_config": {"fullgraph": True}, "disable_compile": True},
    **{"continuous_batching_config": {"a": 1}, "low_memory": True, "penalty_alpha": 0.6, "dola_layers": "high"},
    **{"diversity_penalty": 0.5, "num_beam_groups": 3, "constraints": [1], "force_words_ids": [[5]]},
    **{"prefill_chunk_size": 2, "transformers_version": "9", "a_setting_of_a_later_release": 3},
}
TOGETHER: dict[str, Any] = {"penalty_alpha": {"top_k": 4}, "guidance_scale": {"do_sample": True}}  # what one needs
BROKEN = ["", "{", "[]", "null", '"x"', '{"eos_token_id": {}}', '{"eos_token_id": "x"}', '{"max_new_tokens": 0}']
CASES = [json.dumps({key: value} | TOGETHER.get(key, {})) for key, value in ODD.items()] + BROKEN

LOADED = [BROKEN[1], BROKEN[3], *(json.dumps({key: ODD[key]}) for key in ("num_return_sequences", "stop_strings"))]


def argmax(model: Any, ids: list[int], count: int, ends: list[int]) -> list[int]:
    """The likeliest token each time, the whole text anew for each."""
    made: list[int] = []
    while len(made) < count and not (made and made[-1] in ends):
        made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return made


def test_every_setting_has_an_odd_value() -> None:
    assert {key for key in vars(GenerationConfig()) if not key.startswith("_")} <= set(ODD)


def test_text_is_argmax_whatever_the_settings_are(tmp_path: Path) -> None:
    """Every setting, one after the other, as billhook reads it from a folder."""
    model, tokenizer = tiny.model("llama", num_hidden_layers=1), tiny.tokenizer()
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    ids = tokenizer("abc").input_ids
    bare, ended = argmax(model, ids, NEW, []), argmax(model, ids, NEW, ENDING)
    assert len(ended) < len(bare) == NEW
    for content in CASES:
        (tmp_path / generation.NAME).write_text(content)
        model.generation_config = asked = generation.read(tmp_path)
        texts, _ = continuations(model, tokenizer, ["abc"], NEW)
        expected = ended if content == json.dumps({"eos_token_id": ENDING}) else bare
        assert texts == [tokenizer.decode(expected, skip_special_tokens=True)], content
        assert greedy.greedy_tokens(model, torch.tensor([ids]), NEW).tolist() == [bare], content
        assert model.generation_config is asked


@pytest.mark.parametrize("content", LOADED)
def test_settings_neither_end_nor_change_what_is_done(content: str, tmp_path: Path) -> None:
    """Of a folder that is opened whole, streamed and by the stock client, and is written again."""
    folder, ids = written("llama", tmp_path / "m"), tiny.tokens(2, 3)
    (folder / generation.NAME).write_text(content)
    expected = [argmax(tiny.model("llama"), row, NEW, []) for row in ids.tolist()]
    for stream in (False, True):
        model = load.load(folder, stream=stream)
        assert greedy.greedy_tokens(model, ids, NEW).tolist() == expected
        (made := tmp_path / f"out-{stream}").mkdir()
        save.save(model, tiny.tokenizer(), made, folder)
        assert (made / generation.NAME).read_text() == content
    stock = transformers_client.opened(str(folder), False)
    for cache in (True, False):
        assert transformers_client.generated(stock, ids, NEW, cache) == expected


def test_settings_that_were_edited_in_memory_are_written(tmp_path: Path) -> None:
    """Also such as transformers reads with a warning and refuses to write."""
    folder = written("llama", tmp_path / "m")
    model = load.load(folder)
    model.generation_config.temperature = 0.25
    for name, source in (("from a folder", folder), ("from memory", None)):
        (made := tmp_path / name).mkdir()
        save.save(model, tiny.tokenizer(), made, source)
        assert json.loads((made / generation.NAME).read_text())["temperature"] == 0.25


def test_settings_that_only_config_json_has_are_the_same_whole_and_streamed(tmp_path: Path) -> None:
    folder = written("llama", tmp_path / "m")
    (folder / generation.NAME).unlink()
    config = json.loads((folder / "config.json").read_text()) | {"repetition_penalty": 1.5, "num_return_sequences": 2}
    (folder / "config.json").write_text(json.dumps(config))
    whole, streamed = (load.load(folder, stream=stream).generation_config for stream in (False, True))
    assert whole == streamed
    del config["num_return_sequences"]  # which transformers refuses
    (folder / "config.json").write_text(json.dumps(config))
    whole, streamed = (load.load(folder, stream=stream).generation_config for stream in (False, True))
    assert whole == streamed and whole.repetition_penalty == 1.5


def adding(template: str) -> Any:
    """The tests' tokenizer with special tokens around a text."""
    found = tiny.tokenizer()
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    return found


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>", "<s> $A", "<s> <s> $A </s> </s>"])
def test_a_prompt_begins_as_the_tokenizer_says_and_has_no_end(template: str) -> None:
    model, tokenizer = tiny.model("llama"), adding(template)
    before, encoded = [256] * template.count("<s>"), tokenizer.backend_tokenizer.to_str()
    assert special_tokens.without_end_token(tokenizer)("abc").input_ids == before + tiny.tokenizer()("abc").input_ids
    expected = argmax(model, before + tiny.tokenizer()("abc").input_ids, NEW, [257])
    assert continuations(model, tokenizer, ["abc"], NEW)[0] == [tokenizer.decode(expected, skip_special_tokens=True)]
    assert tokenizer.backend_tokenizer.to_str() == encoded


def test_only_tokens_go_to_the_model() -> None:
    """A tokenizer may return more, for models of another kind."""
    tokenizer = tiny.tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in tokenizer("abc")
    model = tiny.model("llama")
    assert continuations(model, tokenizer, ["abc"], NEW) == continuations(model, tiny.tokenizer(), ["abc"], NEW)
