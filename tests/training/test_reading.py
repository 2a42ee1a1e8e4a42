"""What judges a recovery: windows that neither the prune nor an earlier recovery has seen, or a line that says
otherwise."""

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import billhook
from billhook import data
from billhook.math import overlap
from billhook.recovery import recover
from billhook.training import text_windows
from billhook.training.fitted import calibrated_on

LENGTH = 16
SEEDS = range(5)


def letters(seed: int, size: int) -> str:
    """Text in which nothing comes twice."""
    draw = random.Random(seed)
    return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(size))


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    for n, name in enumerate(("one", "two")):
        (tmp_path / f"{name}.txt").write_text(letters(n, 1600))
    return tmp_path / "one.txt", tmp_path / "two.txt"


def record_of(source: str, samples: int, seed: int, length: int = LENGTH) -> dict[str, Any]:
    """What billhook.json says of a prune that was calibrated so."""
    seen = data.windows(data.calibration_text(source), tiny.tokenizer(), length, samples, seed)
    return {
        "calibration": {
            "source": seen.source,
            "windows": samples - 2,
            "probes": 2,
            "seq_len": length,
            "text_sha256": seen.text_sha256,
            "tokens_sha256": seen.sha256,
        },
        "recipe": {"calibration": source, "seed": seed},
        "fitted": seen.tokens,
    }


def read(training: tuple[Path, ...], record: dict[str, Any] | None, seed: int = 0) -> text_windows.TrainingTexts:
    return text_windows.read(
        [str(one) for one in training], (), tiny.tokenizer(), text_windows.Draw(LENGTH, seed), record=record
    )


@pytest.mark.parametrize(("joined", "length"), [(False, LENGTH), (False, 40), (True, 40)])
def test_what_a_prune_was_fitted_on_is_not_held_out_of_several_texts(
    joined: bool, length: int, texts: tuple[Path, Path]
) -> None:
    source = "+".join(map(str, texts)) if joined else str(texts[0])
    twice = 0
    for seed in SEEDS:
        record = record_of(source, 30, seed, length)
        found, blind = read(texts, record, seed), read(texts, None, seed)
        assert not overlap.overlapping(found.held_out[0].tokens, record["fitted"]).any() and not found.doubt
        assert len(found.held_out[0].tokens) == text_windows.HELD_OUT
        every = [sorted(map(tuple, [*one.train.tolist(), *one.held_out[0].tokens.tolist()])) for one in (found, blind)]
        assert every[0] == every[1]
        twice += int(overlap.overlapping(blind.held_out[0].tokens, record["fitted"]).sum())
    assert twice > 0  # it would be so otherwise


def test_windows_that_were_drawn_and_not_needed_do_not_hide_which_were_fitted(texts: tuple[Path, Path]) -> None:
    """A prune within some minutes draws more than it reads."""
    record = record_of(str(texts[0]), 30, 0)
    record["calibration"] |= {"windows": 10, "drawn": 30}
    found, lost = calibrated_on(record, (), tiny.tokenizer())
    assert found is not None and not lost and torch.equal(found.tokens, record["fitted"])


def test_windows_that_were_fitted_are_held_out_where_there_are_no_others(texts: tuple[Path, Path]) -> None:
    found = read(texts[:1], record_of(str(texts[0]), 98, 0))
    assert found.doubt == "windows held out of one are the prune's own, 6 of 8: there are no others"


def test_a_calibration_text_that_is_gone_or_changed(texts: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(letters(7, 1600) + texts[0].read_text()[:600])
    record = record_of(str(other), 20, 0)
    assert not read(texts, record).doubt  # it is read where it lies
    other.write_text(other.read_text() + letters(8, 100))  # all of it counts then
    found, rest = read(texts, record), data.windows(data.calibration_text(str(other)), tiny.tokenizer(), LENGTH)
    assert not found.doubt and not overlap.overlapping(found.held_out[0].tokens, rest.tokens).any()
    other.unlink()
    assert read(texts, record).doubt == (
        "windows held out of one and two may be among those that the prune was calibrated on: its text other is not found here"
    )


@pytest.mark.parametrize(
    "record", [None, {}, {"cuts": []}, {"calibration": 3, "recipe": None}, {"recovery": [3, {"text_sha256": 4}]}]
)
def test_a_record_that_says_nothing_changes_nothing(record: dict[str, Any] | None, texts: tuple[Path, Path]) -> None:
    found = read(texts, record)
    assert not found.doubt and found.train.equal(read(texts, None).train)


def test_a_recovery_says_what_may_judge_it_too_kindly(texts: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    given = {"calibration": str(texts[0]), "samples": 30, "seq_len": LENGTH, "seed": 3}
    model = billhook.prune(folder, method="fasp", ratio=0.2, multiple_of=2, **given).save(tmp_path / "small")
    for n, (seed, line) in enumerate(
        [
            (0, ""),
            (0, ""),  # the same windows are held out of the same order
            (1, "windows held out of one and two may have been trained on by recovery 1 and 2 of this model"),
        ]
    ):
        lines: list[str] = []
        found = recover.recover(
            model,
            objective="ce",
            text=tuple(map(str, texts)),
            held_out=(),
            guard=False,
            **{"tokens": LENGTH, "seq_len": LENGTH, "lr": 1e-4, "device": "cpu", "precision": "float32"},
            seed=seed,
            announce=lines.append,
        )
        assert line in lines if line else not any("held out of" in one for one in lines), lines
        assert found.healing["held_out_doubt"] == (line or None)
        model = found.save(tmp_path / f"healed-{n}")
