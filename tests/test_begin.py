"""Where a tokenizer begins a text with a token, every window begins with it: whatever reads text in windows."""

import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import billhook
from billhook import data
from billhook.checkpoints import load
from billhook.data import Text, windows
from billhook.evaluation import perplexity, side_by_side, zeroshot
from billhook.methods.searched import asked
from billhook.models import vocabulary
from billhook.pruning.recipe import recipe
from billhook.recovery import recover
from billhook.reports import tables
from billhook.reports.cut_tables import calibration_words
from billhook.runtime.special_tokens import special_ids
from billhook.search import pool, validation
from billhook.search.inputs import read_inputs
from billhook.training import text_windows

BEGIN, END = 256, 257
BEGUN = tiny.tokenizer("<s> $A")
AROUND = tiny.tokenizer("<s> $A </s>")
TWICE = tiny.tokenizer("</s> <s> $A")  # as GLM's: two tokens before a text
TEXT = Text("words", tiny.text(200) + " Grün ist die Heide. " * 9)


@pytest.mark.parametrize(("tokenizer", "leading"), [(BEGUN, [BEGIN]), (AROUND, [BEGIN]), (TWICE, [END, BEGIN])])
def test_every_window_begins_as_the_tokenizer_does_and_none_ends(tokenizer: Any, leading: list[int]) -> None:
    found, room = windows(TEXT, tokenizer, 16, spans=True), 16 - len(leading)
    assert all(row[: len(leading)] == leading and END not in row[len(leading) :] for row in found.tokens.tolist())
    body = TEXT.text.encode()
    assert [n for row in found.tokens.tolist() for n in row[len(leading) :]] == tiny.tokenizer()(TEXT.text).input_ids[
        : found.available * room
    ]
    assert found.available == len(body) // room and found.first == len(leading)
    assert sum(found.bytes) == len(body[: found.available * room].decode(errors="ignore").encode())
    assert found.begins_with == tuple(tokenizer.convert_ids_to_tokens(leading))


def test_samples_are_those_of_the_text_alone() -> None:
    some = windows(TEXT, BEGUN, 17, samples=9, seed=3).tokens
    assert torch.equal(some[:, 1:], windows(TEXT, tiny.tokenizer(), 16, samples=9, seed=3).tokens)


def test_without_such_a_token_nothing_changes() -> None:
    plain = tiny.tokenizer()
    found, ids = windows(TEXT, plain, 16, spans=True), list(TEXT.text.encode())
    expected = torch.tensor(plain(TEXT.text).input_ids)[: len(ids) // 16 * 16].view(-1, 16)
    assert torch.equal(found.tokens, expected) and found.begins_with == () and found.first == 1
    assert found.sha256 == hashlib.sha256(expected.numpy().tobytes()).hexdigest()
    known = json.dumps(sorted(plain.get_vocab().items())).encode()
    assert data.fingerprint(plain) == hashlib.sha256(known).hexdigest()[:16]
    assert len({data.fingerprint(one) for one in (plain, BEGUN, TWICE)}) == 3


def test_a_window_with_no_room_for_text_is_refused() -> None:
    with pytest.raises(billhook.BillhookError, match=r"2 tokens has no room for text after the 2 .*: raise --seq-len"):
        windows(TEXT, TWICE, 2)


@pytest.mark.parametrize("tokenizer", [BEGUN, TWICE])
def test_perplexity_counts_tokens_of_text_alone(tokenizer: Any) -> None:
    model, given = tiny.model("llama"), windows(TEXT, tokenizer, 12, samples=5)
    found = perplexity.perplexity(model, given)
    means = []
    for row in given.tokens:
        log = torch.log_softmax(model(row[None]).logits[0].double(), -1)
        means.append(-statistics.fmean(log[n - 1, row[n]].item() for n in range(given.first, 12)))
    assert found.perplexity == pytest.approx(math.exp(statistics.fmean(means)), rel=1e-4)
    assert found.tokens == 5 * (12 - given.first) and found.begins_with == given.begins_with


def test_short_windows_of_a_search_begin_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "SHORT", 9)
    split = validation.split(windows(TEXT, BEGUN, 25).tokens, 0, 1)
    for part, length in ((split.proxy, 9), (split.rungs, 9), (split.final, 25)):
        assert part.shape[1] == length and (part[:, 0] == BEGIN).all() and (part[:, 1:] != BEGIN).all()


def test_a_pool_is_chosen_by_its_text() -> None:
    drawn = [
        pool.draw([TEXT], one, torch.eye(258), 12, length, 3, 0)
        for one, length in ((tiny.tokenizer(), 16), (BEGUN, 17))
    ]
    assert torch.equal(drawn[0].tokens, drawn[1].tokens[:, 1:]) and drawn[1].begins_with == ("<s>",)


def test_a_trimmed_vocabulary_begins_as_before() -> None:
    trimmed, _ = vocabulary.trim(tiny.model("llama"), BEGUN, ["abc abd"])
    assert trimmed.convert_ids_to_tokens(special_ids(trimmed)[0]) == ["<s>"]
    assert windows(Text("t", "abcdabcd"), trimmed, 5).begins_with == ("<s>",)


def test_tasks_begin_so_too() -> None:
    wrapped = zeroshot._wrap(tiny.model("llama"), BEGUN, 1)
    context, continuation = wrapped._encode_pair("a b", " c")
    assert context == BEGUN("a b").input_ids and continuation == list(BEGUN(" c", add_special_tokens=False).input_ids)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Rows of token ids that the embeddings of any model read."""
    found: list[list[int]] = []
    forward = torch.nn.Embedding.forward

    def noted(module: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        found.extend(ids.flatten(0, -2).tolist() if module.num_embeddings == 258 else [])
        return forward(module, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", noted)
    return found


PRUNES: dict[str, dict[str, Any]] = {
    "fasp": {"ratio": 0.2},
    "measured": {"ratio": 0.2, "allocation": "sensitivity", "layout": "per_layer", "probes": 2},
    "taylor": {"ratio": 0.2, "score": "taylor2_element"},
    "layers": {"method": "layerchop", "ratio": 0.3},
    "search": {"method": "adapruner", "ratio": 0.3, "pool": 24, "pool_len": 33, "trials": 8, "seq_len": 64},
    "masks": {"method": "optishear", "sparsity": 0.5, "trials": 6, "seq_len": 64},
}


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] * (one in ("search", "masks"))) for one in PRUNES]
)
def test_all_that_a_prune_reads_begins_so(name: str, seen: list[list[int]], tmp_path: Path) -> None:
    text_file = tmp_path / "words.txt"
    text_file.write_text(tiny.text(3000, 300))
    given = {"method": "fasp", "samples": 6, "seq_len": 32, "calibration": str(text_file), **PRUNES[name]}
    if given.get("method") not in ("layerchop", "optishear"):
        given["multiple_of"] = 4
    found = billhook.prune(tiny.model("llama"), tokenizer=BEGUN, **given).record
    assert seen and {row[0] for row in seen} == {BEGIN} and all(BEGIN not in row[1:] for row in seen)
    assert found["calibration"]["begins_with"] == ["<s>"]


def test_a_search_reads_windows_that_begin_so(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(tiny.text(3000, 300))
    given = {"ratio": 0.3, "pool": 24, "pool_len": 33, "seq_len": 64, "calibration": str(tmp_path / "words.txt")}
    opened = load.Opened(tiny.model("llama"), BEGUN, "tiny", None, torch.float32)
    found = read_inputs(opened, asked(recipe(method="adapruner", **given)))
    split = found.texts.validation
    for part in (found.pool.tokens, split.proxy, split.rungs, split.final):
        assert (part[:, 0] == BEGIN).all() and (part[:, 1:] != BEGIN).all()
    assert not any("<s>" in one for one in found.samples)
    with pytest.raises(
        billhook.BillhookError, match=r"\d+ of the \d+ windows of --validation are also in the calibration"
    ):
        read_inputs(opened, asked(recipe(method="adapruner", validation=(given["calibration"],), **given)))


def test_training_reads_windows_that_begin_so(tmp_path: Path) -> None:
    names = [tmp_path / "one.txt", tmp_path / "held.txt"]
    for n, name in enumerate(names):
        name.write_text(tiny.text(900, 30 + n))
    found = text_windows.read((str(names[0]),), (str(names[1]),), BEGUN, text_windows.Draw(16))
    for tokens in (found.train, *(one.tokens for one in found.held_out)):
        assert (tokens[:, 0] == BEGIN).all() and (tokens[:, 1:] != BEGIN).all()
    assert found.begins_with == ("<s>",)
    for one in text_windows.conditions(found).values():
        assert one["tokens"] == 15 * one["windows"] and one["begins_with"] == ["<s>"]


@pytest.mark.slow
def test_all_that_a_recovery_trains_and_judges_on_begins_so(
    seen: list[list[int]], text_file: Path, folder: Path, tmp_path: Path
) -> None:
    BEGUN.save_pretrained(folder)
    held = tmp_path / "held.txt"
    held.write_text(tiny.text(300, 30))
    asked: dict[str, Any] = {"seq_len": 16, "device": "cpu", "precision": "float32", "lr": 1e-3, "tokens": 320}
    texts = {"text": (str(text_file),), "held_out": (str(held),), "teacher": str(folder)}
    found = recover.recover(folder, work=tmp_path / "work", **texts, **asked).record
    assert seen and {row[0] for row in seen} == {BEGIN}
    (found,) = found["recovery"]
    assert found["begins_with"] == ["<s>"]
    assert found["judged_by"]["held"]["tokens"] == 15 * found["judged_by"]["held"]["windows"]


def test_a_measured_model_is_read_so_and_its_tables_say_it(seen: list[list[int]]) -> None:
    subject = side_by_side.Subject("one", tiny.model("llama"), BEGUN)
    asked = side_by_side.Measures(texts=[TEXT], seq_len=16, max_windows=3, new_tokens=2, parts=("texts",))
    found = side_by_side.side_by_side([subject], asked)
    assert seen and {row[0] for row in seen if len(row) > 1} == {BEGIN}
    (row,) = (row for row in tables.measures(found) if row.name == "perplexity on words")
    assert row.conditions == "45 tokens, windows of 16, each begins with <s>"


def test_a_card_says_how_windows_begin() -> None:
    text = {"windows": 6, "seq_len": 32, "source": "words", "begins_with": ["<s>"]}
    assert calibration_words({"calibration": text}) == "6 windows of 32 tokens of words, each begins with <s>"
    del text["begins_with"]
    assert calibration_words({"calibration": text}) == "6 windows of 32 tokens of words"
