"""Thousands of damaged files of every kind that billhook reads, and its commands on some of them: none ends in a
traceback, takes a minute, or a gigabyte.  Prints its counts."""

import json
import resource
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import tiny
from folders import pruned
from fuzzing import Command, Damage, Tally, file_damages, fuzz, json_damages, safetensors_damages, sample
from kept_files import KEPT
from test_damaged import record, shown
from test_export import built
from test_gguf_damaged import mutations
from test_textfile import FILES

from billhook import data, demo
from billhook.checkpoints import load
from billhook.checkpoints.gguf.write import write_gguf

EACH = 90  # damages of a file that what reads it meets, where it has more
LATER = ("model-00003", "model-00004", "model-00005", "model-00006")  # shards: two of them tell as much
IN_COMMANDS = 2  # of those of a model's folder


def opened(folder: Path, stream: bool) -> Callable[[], object]:
    def opens() -> object:
        return load.open_model(str(folder), device="cpu", stream=stream)

    return opens


def damages_of(path: Path, most: int, seed: int = 0) -> list[Damage]:
    content, damages = path.read_bytes(), list[Damage]()
    if path.suffix == ".json":
        damages = list(json_damages(content, most=most, seed=seed))
    elif path.suffix == ".safetensors":
        damages = list(safetensors_damages(content, most=most, seed=seed))
    return sample([*damages, *file_damages(content, 12)], most, seed)


def commands(folder: Path, text: Path, out: Path) -> Iterable[Command]:
    given = ["--seq-len", 32, "--samples", 4, "--multiple-of", 2, "--calibration", text, "--device", "cpu"]
    uneven = ["--layout", "per_layer"] if (folder / "modeling_per_layer.py").exists() else []
    for streamed in ([], ["--stream-weights"]):
        yield ["prune", folder, "-o", out, "--method=fasp", "--ratio", 0.1, *given, *uneven, *streamed]
    yield ["inspect", folder]
    yield ["export", folder, "-o", out]
    yield ["evaluate", folder, "--text", text, "--parts", "", "--seq-len", 32, "--device", "cpu"]


def folders(root: Path, text: Path) -> dict[str, Path]:
    """Of one file, of several with their index, and one whose layers differ."""
    made = {name: root / name for name in ("whole", "sharded", "uneven")}
    for name, size in (("whole", "5GB"), ("sharded", "20KB")):
        tiny.model("llama").save_pretrained(made[name], max_shard_size=size)
        tiny.tokenizer().save_pretrained(made[name])
    pruned(made["whole"], text, made["uneven"], ratio=0.2, layout="per_layer", allocation="standardised")
    return made


@pytest.mark.slow
def test_thousands_of_damaged_files(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "TEXT", demo.TEXT)
    tallies = {name: Tally() for name in ("kept", "records", "texts", "models", "GGUF", "commands")}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, make in KEPT.items():
        kept = make(tmp_path / f"kept {name}")
        fuzz(kept.path, kept.damages(EACH), [kept.read], tallies["kept"])
    place = tmp_path / "record" / "billhook.json"
    place.parent.mkdir()
    place.write_bytes(json.dumps(record()).encode())
    fuzz(place, damages_of(place, 4 * EACH), [shown(place.parent)], tallies["records"])
    for name, content in FILES.items():
        path = tmp_path / name
        path.write_bytes(content)
        reads = [lambda path=path: data.texts(str(path))]
        fuzz(path, sample(file_damages(content), EACH), reads, tallies["texts"])
    for name, folder in folders(tmp_path, text_file).items():
        for n, path in enumerate(sorted(folder.iterdir())):
            if path.suffix not in (".json", ".safetensors", ".py", ".jinja") or path.name.startswith(LATER):
                continue
            fuzz(path, damages_of(path, EACH // 2), [opened(folder, False), opened(folder, True)], tallies["models"])
            out = tmp_path / f"out {name}"
            some, given = damages_of(path, IN_COMMANDS, n + 1), list(commands(folder, text_file, out))
            fuzz(path, some, given, tallies["commands"], out=out)
            with capsys.disabled():
                sys.stdout.write(f"{name}/{path.name}: {tallies['models']}; {tallies['commands']}\n")
    whole = tmp_path / "model.gguf"
    write_gguf(built("llama"), tiny.tokenizer(), whole, "F32")
    cut = [Damage(f"GGUF {n}", one) for n, one in enumerate(mutations(whole.read_bytes(), 1, 2 * EACH))]
    fuzz(whole, cut, [lambda: load.open_model(str(whole), device="cpu")], tallies["GGUF"])
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    with capsys.disabled():
        for name, tally in tallies.items():
            sys.stdout.write("\n  ".join([f"\n{name}: {tally}", *tally.faults[:40]]))
        inputs = sum(tally.inputs for tally in tallies.values())
        sys.stdout.write(f"\nin all {inputs:,} inputs, {more:.0f} MB more than before at most\n")
    assert not any(tally.faults for tally in tallies.values()) and more < 1024
    assert inputs >= 2000
