"""`billhook recover --mixture dro`: shares of texts that follow where the student lags its teacher."""

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from billhook.checkpoints.result import Result
from billhook.errors import BillhookError
from billhook.recovery import recover
from billhook.recovery.settings import recovery
from billhook.reports.commands import recover_command
from billhook.reports.recovery_tables import share_rows
from billhook.training import trainer
from billhook.training.mixture import Mixture, first_shares, readable
from billhook.training.text_windows import Draw, read

LENGTH = 16


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, str]:
    """Words, and digits that are a third of them."""
    draw = random.Random(0)
    words, digits = tmp_path / "words.txt", tmp_path / "digits.txt"
    words.write_text(tiny.text(1200)[:3000])
    digits.write_text("".join(draw.choice("0123456789") for _ in range(1000)))
    return str(words), str(digits)


def asked(texts: tuple[str, ...], folder: Path, **more: Any) -> dict[str, Any]:
    found = {"teacher": str(folder), "text": texts, "mixture": "dro", "held_out": (), "guard": False, "lr": 1e-3}
    found |= {"tokens": 10 * 2 * LENGTH, "batch_tokens": 2 * LENGTH, "seq_len": LENGTH}
    return {**found, "device": "cpu", "precision": "float32", **more}


def of(texts: tuple[str, ...]) -> Mixture:
    found = read(texts, (), tiny.tokenizer(), Draw(LENGTH, apart=True))
    losses = {windows.source: [1.0] * len(windows.tokens) for windows in found.held_out}
    return Mixture.of(found, len(found.train), losses, 0)


def test_windows_come_in_the_shares_and_all_before_any_comes_twice(texts: tuple[str, str]) -> None:
    mixture = of(texts)
    order = mixture.order([[0.5, 0.5], [0.9, 0.1]], [60, 160, 200])
    assert len(order) == 160  # the shares of the others are not known yet
    which = mixture.text_of[order]
    assert int((which[:60] == 1).sum()) == 30 and int((which[60:] == 1).sum()) == 10
    for n in (0, 1):
        own, pool = [number for number in order if mixture.text_of[number] == n], (mixture.text_of == n).sum()
        assert len(set(own[:pool])) == min(len(own), pool)
    assert mixture.order([[0.5, 0.5]], [60, 160, 200]) == order[:60]


def test_each_text_has_its_own_held_out_windows(texts: tuple[str, str]) -> None:
    found = read(texts, (), tiny.tokenizer(), Draw(LENGTH, apart=True))
    assert [windows.source for windows in found.of_training] == ["words, held out", "digits, held out"]
    digits = set(tiny.tokenizer()("0123456789").input_ids)
    for n, windows in enumerate(found.of_training):
        assert set(windows.tokens.flatten().tolist()).issubset(digits) == bool(n)
        trained = {tuple(row) for row in found.train[found.text_of == n].tolist()}
        assert not trained & {tuple(row) for row in windows.tokens.tolist()} and len(windows.tokens) > 5
    ahead = found.begun_with(readable(found, 40))
    assert sorted(ahead.train.tolist()) == sorted(found.train.tolist())
    assert torch.equal(first_shares(ahead), first_shares(found))


def test_no_judgements_ask_for_windows_that_the_teacher_has_not_answered(texts: tuple[str, str]) -> None:
    """The worst of them: one text lags from the first to the last."""
    found, windows = read(texts, (), tiny.tokenizer(), Draw(LENGTH, apart=True)), 40
    numbers = readable(found, windows)
    ahead = found.begun_with(numbers)
    for lags in (0, 1):
        held = {one.source: [1.0] for one in ahead.held_out}
        mixture, base, shares = Mixture.of(ahead, len(numbers), held, 0), [], []
        for n in range(4):
            losses = {one.source: [1.0 + (n == lags)] for n, one in enumerate(ahead.held_out)}
            entry = mixture.judged(losses, base, n / 4)
            shares, base = [*shares, entry["shares"]], entry["base_shares"]
        order = mixture.order(shares, [10, 20, 30, windows])
        assert len(order) == windows and len(set(order)) == windows and max(order) < len(numbers)


def shares_of(found: Result) -> list[dict[str, float]]:
    return [entry["shares"] for entry in found.healing["evaluations"] if "shares" in entry]


def test_a_run_goes_on_in_the_same_bits(
    texts: tuple[str, str], student: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    whole = recover.recover(student, work=tmp_path / "whole", announce=said.append, **asked(texts, folder))
    judged = whole.healing["evaluations"]
    assert len(shares_of(whole)) == len(judged) - 1 and whole.healing["mixture"] == "dro"
    assert all(sum(shares.values()) == pytest.approx(1) for shares in shares_of(whole))
    assert any(line.startswith("step 0 of 10: windows of words ") for line in said)
    assert [row[0] for row in share_rows(whole.healing)] == [f"{entry['tokens']}" for entry in judged[:-1]]
    assert "--mixture dro" in recover_command(whole.healing)
    kept = trainer.Watch.on_save

    def cut_off(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        kept(self, args, state, control, **more)
        if state.global_step in (3, 5):  # right after a judgement, and amid what it decided
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "SAVE_SECONDS", 0.0)
        patch.setattr(trainer.Watch, "on_save", cut_off)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                recover.recover(student, work=tmp_path / "work", **asked(texts, folder))
    again = recover.recover(student, work=tmp_path / "work", **asked(texts, folder))
    assert again.healing["losses"] == whole.healing["losses"] and shares_of(again) == shares_of(whole)
    ours, theirs = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"text": ("words.txt",)}, "--mixture dro shares the training among texts: name two or more"),
        ({"teacher": "", "objective": "ce"}, "--mixture dro weighs texts by the loss beyond the teacher's"),
        ({"mixture": "robust"}, "did you mean"),
    ],
)
def test_settings_that_do_not_fit(more: dict[str, Any], said: str, texts: tuple[str, str], folder: Path) -> None:
    with pytest.raises(BillhookError, match=said if said != "did you mean" else "mixture 'robust'"):
        recovery(**asked(texts, folder, **more))


def test_texts_that_cannot_be_told_apart(texts: tuple[str, str], tmp_path: Path) -> None:
    def refused(other: Path, content: str, said: str) -> None:
        other.parent.mkdir(exist_ok=True)
        other.write_text(content)
        with pytest.raises(BillhookError, match=said):
            read((texts[0], str(other)), (), tiny.tokenizer(), Draw(LENGTH, apart=True))

    refused(tmp_path / "few.txt", tiny.text(60)[: 9 * LENGTH], "text 'few' has 9 windows, and of fewer than 10 none")
    refused(tmp_path / "other" / "words.txt", tiny.text(900)[1000:], "two training texts are named 'words'")
    refused(tmp_path / "copy.txt", Path(texts[0]).read_text(), "text 'words' is there twice")
