"""What lies in a folder and belongs to the tokenizer or processor is in the output, or a line says that it is not."""

import json
import logging
from pathlib import Path

import pytest
import tiny
import transformers as T

from billhook.checkpoints import belongings, result, save

TEMPLATES = {"default": "{{ messages }}", "rag": "{{ documents }}", "tool_use": "{{ tools }}"}
KEPT = {  # beside what a tokenizer writes
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("audio_tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("spiece.model", "tokenizer.model", "tokenizer.model.v3", "sentencepiece.bpe.model", "bpe.codes", "qwen.tiktoken"),
}
ELSEWHERE = {
    "README.md",
    "training_args.bin",
    "trainer_state.json",
    "model-00001-of-00001.safetensors",
    ".gitattributes",
}
SAID = {"tokenizer/", "tokenization_mine.py", "processor.pkl", "additional_chat_templates.old/"}


def content(name: str) -> str:
    return "{}" if name.endswith(".json") else f"of {name}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tokenizer, folder = tiny.tokenizer(), tmp_path / "source"
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(folder)
    assert (folder / belongings.TEMPLATES).is_dir()
    for name in KEPT | ELSEWHERE | SAID:
        if name.endswith("/"):
            (folder / name).mkdir()
            (folder / name / "tokenizer.json").write_text("{}")
        else:
            (folder / name).write_text(content(name))
    return folder


def test_all_that_belongs_to_a_tokenizer(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    to = tmp_path / "to"
    to.mkdir()
    with caplog.at_level(logging.WARNING, "billhook"):
        save.save(tiny.model("llama"), tiny.tokenizer(), to, source)
    assert all((to / name).read_text() == content(name) for name in KEPT)
    found = T.AutoTokenizer.from_pretrained(to)
    assert found.chat_template == TEMPLATES and found.get_vocab() == tiny.tokenizer().get_vocab()
    there = {one.name + "/" * one.is_dir() for one in to.iterdir()}
    assert not there & (SAID | ELSEWHERE)
    (line,) = caplog.messages
    assert all(repr(name) in line for name in SAID) and not any(name in line for name in ELSEWHERE), line


def test_nothing_is_said_of_what_belongs_to_no_tokenizer(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in SAID:
        one = source / name
        one.rename(source / f"other-{len(name)}")
    (tmp_path / "to").mkdir()
    belongings.carry(source, tmp_path / "to", ("other-20", "other-21"))
    assert not caplog.messages
    assert (tmp_path / "to" / "other-20").is_file()  # a name that the tokenizer's class gives


def test_what_is_left_where_the_tokenizer_is_trimmed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(result.Result, "_fill", lambda *_: (tmp_path / "tokenizer.json").write_text(json.dumps({})))
    result.Result(None, None, {}, source, trimmed=True).write(tmp_path)
    (line,) = caplog.messages
    assert "'preprocessor_config.json'" in line and "merges.txt" not in line
