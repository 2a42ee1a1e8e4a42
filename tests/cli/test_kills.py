"""Commands that are killed, told to end, or interrupted, at any moment: no traceback, no hang, no loss, and the same
command ends well."""

import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny
from folders import tensors, written
from processes import Child
from safetensors.torch import save_file

from billhook import __main__ as command_line
from billhook.checkpoints.clients import check
from billhook.runtime import signals

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
TEXT = ["--calibration", "{text}", "--samples", "10", "--seq-len", "32"]
CUT = ["prune", "{model}", "-o", "{out}", "--method=fasp", *TEXT, "--multiple-of", "2"]
GATED = ("gates", "loraprune", "l0", "softtopk", "mlpruning")
KINDS: dict[str, list[str]] = {
    "fasp": [*CUT, "--ratio", "0.2"],
    "auto": [*CUT, "--method=auto", "--ratio", "0.35"],
    "fasp, streamed, in place of another": [*CUT, "--ratio", "0.2", "--stream-weights", "--overwrite"],
    "masks, streamed": [*CUT[:-2], "--method", "sparsegpt", "--sparsity", "0.5", "--stream-weights"],
    "masks, in place of another": [*CUT[:-2], "--method", "wanda", "--sparsity", "0.5", "--overwrite"],
    "slicegpt, streamed": [*CUT, "--method", "slicegpt", "--ratio", "0.3", "--stream-weights"],
    "slicegpt, in place of another": [*CUT, "--method", "slicegpt", "--ratio", "0.3", "--overwrite"],
    "layerchop": [*CUT[:-2], "--method", "layerchop", "--layers", "2"],
    "search": [
        *("search", "{model}", "-o", "{out}", *TEXT, "--ratio", "0.2", "--trials", "12", "--pool", "12"),
        *("--pool-len", "16", "--clusters", "3", "--multiple-of", "4", "--overwrite"),
    ],
    "recover": [
        *("recover", "{model}", "-o", "{out}", "--teacher", "{teacher}", "--text", "{text}", "--held-out", "{other}"),
        *("--tokens", "1000", "--seq-len", "32", "--batch-tokens", "64", "--lr", "1e-3", "--no-guard"),
    ],
    "export": ["export", "{model}", "-o", "{out}.gguf", "--overwrite"],
    "compare": [
        *("compare", "{model}", "--methods", "fasp", "--methods", "layerchop:preset=input", "--ratio", "0.35", *TEXT),
        *("--text", "{text}", "--windows", "4", "--json", "{out}.json"),
    ],
    **{name: [*CUT, "--method", name, "--ratio", "0.3", "--steps", "40"] for name in GATED},
}


@dataclass
class Range:
    """A command, a place of its own, and what became of the times that it was cut off."""

    kind: str
    at: Path
    draw: random.Random
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.out, places = self.at / "out", {"out": self.at / "out", "model": self.at / "model"}
        places |= {"teacher": self.at / "teacher", "text": self.at / "text.txt"}
        places["text"].write_text(tiny.text(1500))
        places["other"] = self.at / "other.txt"
        places["other"].write_text(tiny.text(600, lexicon=12))
        for name in ("model", "teacher"):
            written("llama", self.at / name)
        (self.at / "tmp").mkdir()
        self.replaces = "--overwrite" in KINDS[self.kind] and "export" not in KINDS[self.kind]
        self.arguments = ["billhook", *(one.format(**places) for one in KINDS[self.kind])]
        self.mine = {one.name for one in self.at.iterdir()}

    def start(self) -> Child:
        begun = self.at / "tmp" / "begun"

        def work() -> None:
            signals.end_on_signals()  # as the first line of the command does
            begun.touch()
            tempfile.tempdir = str(self.at / "tmp")
            sys.argv = self.arguments
            command_line.main()

        process = Child(work)
        while not begun.exists():
            time.sleep(0.0005)
        begun.unlink()
        return process

    def ends_well(self) -> object:
        """Run to the end, with nothing left beside the output; what came out."""
        code, _, said = self.start().ended(120)
        assert code == 0, said
        left = {one.name for one in self.at.iterdir()} - self.mine
        assert len(left) == 1 and next(iter(left)).startswith("out"), left
        assert not list((self.at / "tmp").iterdir())
        return self.found()

    def found(self) -> object:
        """The output, whole; nothing if there is none."""
        if self.out.is_dir():
            json.loads((self.out / "billhook.json").read_text())
            json.loads((self.out / "config.json").read_text())
            return {name: one.flatten().tolist() for name, one in sorted(tensors(self.out).items())}
        for suffix in (".gguf", ".json"):
            if (file := self.out.with_name(f"out{suffix}")).exists():
                return (
                    file.read_bytes()
                    if suffix == ".gguf"
                    else [p["perplexities"] for p in json.loads(file.read_text())["points"]]
                )
        return None

    def passing(self) -> set[Path]:
        """What nobody is to find there."""
        return {*self.at.glob(".*"), *(self.at / "tmp").iterdir()}

    def clear(self) -> None:
        """An older output, where there is one to replace; otherwise none."""
        for one in (*self.at.iterdir(), *self.at.parent.glob("cache")):  # where compare keeps its points
            if one.name.startswith(("out", "cache")):
                one.rename(Path(tempfile.mkdtemp(dir=self.at.parent)) / one.name)
        if self.replaces:
            self.out.mkdir()
            for name in ("billhook.json", "config.json"):
                (self.out / name).write_text("{}")
            save_file(tensors(self.at / "model"), self.out / "old.safetensors")

    def cut_off(self, number: signal.Signals, after: float, old: object, new: object) -> None:
        before = self.passing()
        process = self.start()
        time.sleep(after)
        process.send(number)
        code, _, said = process.ended(60)
        assert code in (0, ENDS[number]), (self.kind, number, code, said)
        assert "Traceback" not in said and "Error" not in said, (self.kind, number, said)
        self.counts[number.name if code else "had ended"] += 1
        assert self.found() in ((old, new) if self.replaces else (None, new)), (self.kind, number, after)
        if code and number != signal.SIGKILL:
            assert said.count("nothing half-written was left") == 1, said
            assert self.passing() <= before  # where it was killed before, and told to end before it could see that


def kills(kind: str, rounds: int, at: Path) -> Counter[str]:
    """Each round: a kill, a word to end, an interrupt, then the command's end; all equal to one that was left alone."""
    at.mkdir()
    one = Range(kind, at, random.Random(kind))
    one.clear()
    old, started = one.found(), time.perf_counter()
    new = one.ends_well()
    took = time.perf_counter() - started
    for _ in range(rounds):
        one.clear()
        for number in one.draw.sample(SIGNALS, len(SIGNALS)):
            one.cut_off(number, one.draw.random() * took, old, new)
            if one.found() == new and not one.replaces:
                one.clear()
        if not one.replaces and one.found() is not None:
            one.clear()
        assert one.ends_well() == new, kind
    return one.counts


@pytest.fixture(autouse=True)
def _no_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another interpreter, whose imports would be what nearly every kill meets."""
    monkeypatch.setattr(check, "check", lambda *_: {"client": "transformers", "version": "not run"})
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))


SAMPLE = ("fasp, streamed, in place of another", "slicegpt, streamed", "export")


@pytest.mark.parametrize(
    "kind", [SAMPLE[0], *(pytest.param(kind, marks=pytest.mark.whole) for kind in (SAMPLE[1], *GATED)), SAMPLE[2]]
)
def test_cut_off_at_some_moments(kind: str, tmp_path: Path) -> None:
    assert kills(kind, 1, tmp_path / "here").total() == len(SIGNALS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_cut_off_at_thirty_moments(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = kills(kind, 10, tmp_path / "here")
    with capsys.disabled():
        sys.stdout.write(f"\n{kind}: {counts.total()} times cut off: {dict(counts)}\n")
    assert counts["had ended"] < counts.total() / 2
