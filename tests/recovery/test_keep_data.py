"""`billhook recover --keep-data`: windows that are chosen in a first training, and found again by their file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from billhook.checkpoints.result import Result
from billhook.data import calibration_text
from billhook.errors import BillhookError
from billhook.math import window_masks
from billhook.recovery import recover
from billhook.recovery.settings import recovery
from billhook.reports.commands import recover_command
from billhook.reports.recovery_tables import recovered_words
from billhook.training import kept_windows, trainer
from billhook.training.text_windows import Draw, order_of, read
from billhook.training.window_masks import WindowMasks

LENGTH, WINDOWS, KEPT, READ = 16, 18, 9, 36  # READ: windows read in each half, two passes over all


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Twenty windows, two of which are held out."""
    path = tmp_path / "words.txt"
    path.write_text(tiny.text(400)[500 : 500 + 20 * LENGTH])
    return str(path)


def asked(text: str, folder: Path, **more: Any) -> dict[str, Any]:
    found = {"teacher": str(folder), "text": (text,), "held_out": (), "guard": False, "lr": 1e-2, "keep_data": "0.5"}
    found |= {"tokens": 2 * READ * LENGTH, "batch_tokens": 3 * LENGTH, "seq_len": LENGTH}
    return {**found, "device": "cpu", "precision": "float32", **more}


def masks_of(count: int, order: list[int], losses: Callable[[int], float]) -> WindowMasks:
    """Masks that have learned from losses of windows read one at a time."""
    masks = WindowMasks(count, 0.7, order, 1)
    masks.replay([{"window_losses": [[window, losses(window)]]} for window in order])
    return masks


def test_what_is_kept_depends_on_losses_and_not_on_the_order_they_are_read_in() -> None:
    kinds = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)

    def loss(window: int) -> float:
        return float((0.4 * kinds[window] + 0.15 * torch.randn((), generator=draw)).exp())

    first, second = (set(masks_of(100, order_of(100, 400, seed), loss).kept(70).tolist()) for seed in (0, 1))
    assert len(first & second) / len(first | second) >= 0.75  # by chance 0.54


def test_no_mask_moves_before_all_windows_have_a_loss() -> None:
    order = order_of(6, 12, 0)
    masks = WindowMasks(6, 0.5, order, 2)
    masks.replay([{"window_losses": [[n, 1.0], [n + 1, 2.0]]} for n in (0, 2)])
    assert torch.equal(masks.state.masks, torch.ones(6, dtype=torch.float64))
    weights = torch.sigmoid(torch.tensor(window_masks.COLDEST))
    weighed = masks.weighed(torch.tensor([0, 3]), torch.tensor([2.0, 4.0]))
    assert weighed.item() == pytest.approx(3 * weights.item())


def lines(found: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in found.beside["kept.jsonl"].splitlines()]


def same(a: Result, b: Result) -> bool:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_windows_are_chosen_in_half_of_the_tokens_and_their_file_finds_them_again(
    text: str, student: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    whole = recover.recover(student, work=tmp_path / "whole", announce=said.append, **asked(text, folder))
    healing, kept = whole.healing, lines(whole)
    assert len(kept) == healing["windows_available"] == KEPT
    assert healing["choosing"] == {"windows": WINDOWS, "tokens": READ * LENGTH}
    assert healing["tokens"] == READ * LENGTH and healing["passes"] == pytest.approx(4)
    assert f"learning which 50% of {WINDOWS} windows to keep: {READ * LENGTH} tokens at 0.01" in said
    assert all(record["text"] in Path(text).read_text() and record["source"] == "words" for record in kept)
    assert f"({KEPT} of {WINDOWS} windows, chosen in {READ * LENGTH} tokens before)" in recovered_words(healing)
    assert f"--tokens {2 * READ * LENGTH} --text {text} --keep-data 0.5" in recover_command(healing)
    out = whole.save(tmp_path / "out")
    assert calibration_text(str(out / "kept.jsonl")).text == "\n\n".join(record["text"] for record in kept)

    kept_at = trainer.Watch.on_save
    for folder_of, step in (("choosing", 8), ("work", 5)):  # amid the choice, and amid the training after it

        def cut_off(
            self: Any, args: Any, state: Any, control: Any, *, at: Any = (folder_of, step), **more: Any
        ) -> None:
            kept_at(self, args, state, control, **more)
            if (self.trainer.work.name, state.global_step) == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(trainer, "SAVE_SECONDS", 0.0)
            patch.setattr(trainer.Watch, "on_save", cut_off)
            recover.recover(student, work=tmp_path / "work", **asked(text, folder))
    again = recover.recover(student, work=tmp_path / "work", **asked(text, folder))
    assert again.beside == whole.beside and same(again, whole) and again.healing["losses"] == healing["losses"]

    half = asked(text, folder, keep_data=str(out / "kept.jsonl"), tokens=healing["tokens"])
    listed = recover.recover(student, work=tmp_path / "listed", **half)
    assert listed.beside == whole.beside and listed.healing["choosing"] is None
    assert listed.healing["losses"] == pytest.approx(healing["losses"], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"keep_data": "1.5"}, "--keep-data 1.5: give a share between 0 and 1"),
        ({"keep_data": "nan"}, "--keep-data nan: give a share between 0 and 1"),
        ({"mixture": "dro"}, "--keep-data and --mixture dro both say what is read"),
    ],
)
def test_settings_that_do_not_fit(more: dict[str, Any], said: str, text: str, folder: Path) -> None:
    with pytest.raises(BillhookError, match=said):
        recovery(**asked(text, folder, **more))


def test_a_budget_that_learns_nothing(text: str, student: Path, folder: Path, tmp_path: Path) -> None:
    for more, said in (
        ({"tokens": 3 * WINDOWS * LENGTH}, f"which are 1.5 over 18 windows: give --tokens {4 * WINDOWS * LENGTH}"),
        ({"keep_data": "0.01"}, "--keep-data 0.01 of 18 windows is none or all"),
    ):
        with pytest.raises(BillhookError, match=said):
            recover.recover(student, work=tmp_path / "work", **asked(text, folder, **more))
        assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"--keep-data .*kept.jsonl does not exist"),
        ("words\n", r"kept.jsonl, line 1 cannot be read"),
        ('{"text": "words"}\n', r"kept.jsonl, line 1 has no field 'window'"),
        ('{"window": "0123456789abcdef"}\n', r"lists 1 windows that words have not"),
        ("", r"lists no window to train on"),
    ],
)
def test_files_that_list_no_windows_of_the_text(content: str | None, said: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BillhookError, match=said):
        texts = read((text,), (), tiny.tokenizer(), Draw(LENGTH))
        kept_windows.found(texts, kept_windows.listed(path), path)
