"""Budgets, allocations, layouts and clients that cannot be: one line each, exit code 2, nothing written."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import test_bad_input
import tiny
import torch
from test_bad_input import Bench, in_order, write
from transformers import PreTrainedModel

from billhook.checkpoints import save
from billhook.models.axes import axes
from billhook.models.surgery import remove
from billhook.planning import axis_plan, latency

bench = test_bad_input.bench

PER_LAYER = "--layout per_layer --allocation"
COMMANDS = {  # PRUNE works but for a budget and what follows
    # budgets
    "PRUNE": "no budget: give --ratio 0.2, --params 100M, --memory 250MB or --speedup 1.3",
    "PRUNE --ratio 0.2 --params 20K": "--ratio and --params are two budgets: give one",
    "PRUNE --params 20K --memory 1MB": "--params and --memory are two budgets: give one",
    "PRUNE --ratio 0.2 --params 20K --memory 1MB --speedup 2": "--ratio and --params and --memory and --speedup",
    "PRUNE --params 1K": "1,000 parameters is below the smallest possible here, 18,848 parameters: .*name more axes",
    "PRUNE --params 10M": "10,000,000 parameters is no less than the model's own 31,520 parameters: nothing is left to",
    "PRUNE --memory 1KB": r"1,000 bytes is below the smallest possible here, 861,824 bytes: .*name more axes",
    "PRUNE --memory 1GiB": r"1,073,741,824 bytes is no less than the model's own [\d,]+ bytes: nothing is left to cut",
    "PRUNE --memory 1GiB --context 0": "context 0: .*greater than or equal to 1",
    "PRUNE --memory 1GiB --batch 0": "batch 0: .*greater than or equal to 1",
    "PRUNE --speedup 1": "speedup 1.0: .*greater than 1",
    "PRUNE --speedup inf": "speedup inf: .*finite",
    "PRUNE --speedup 1000": r"s for a prefill.* is below the smallest possible here, [23]\.\d+ s for a prefill.*name more axes",
    "PRUNE --params 0": "params 0: .*greater than or equal to 1",
    "PRUNE --params many": "--params 'many' is no amount: write a number, with one of k, m, b",
    "PRUNE --memory 250M": "--memory '250M' is no amount: write a number, with one of b, kb, mb, gb, kib, mib, gib",
    f"PRUNE --ratio 0.8 {PER_LAYER} global": "save 18,586, but the axes can save at most 9,216 here, in steps of 384: ",
    f"PRUNE --ratio 0.3 {PER_LAYER} global --floor 1": "the axes can save at most 0 here",
    "PRUNE --ratio 0.2 --floor 0": "floor 0.0: .*greater than 0",
    "PRUNE --ratio 0.2 --floor 1.1": "floor 1.1: .*less than or equal to 1",
    # axes and layouts
    "PRUNE --ratio 0.2 --layout per_layre": "unknown layout 'per_layre': did you mean 'per_layer'.*uniform",
    "PRUNE --ratio 0.2 --axes value": "axis 'value' .*use --layout per_layer, or name others of ffn, heads, groups",
    "PRUNE --ratio 0.2 --layout per_layer --axes ffn,heads,groups": "'heads' and 'groups' cut the same columns: name",
    "PRUNE --ratio 0.2 --layout per_layer --axes heads,value": "'heads' and 'value' cut the same columns: name one",
    "PRUNE --ratio 0.2 --layout per_layer --axes value,groups": "'groups' and 'value' cut the same columns: name one",
    "PRUNE --ratio 0.2 --axes layers": "axis 'layers' is weighed against the others: use --layout per_layer --alloc.* or --method auto",
    f"PRUNE --ratio 0.2 {PER_LAYER} global --axes ffn,layers": "axis 'layers' is weighed .*--allocation sensitivity",
    "PRUNE --ratio 0.2 --axes layer": "unknown axis 'layer': did you mean 'layers'",
    "PRUNE --ratio 0.2 --allocation global": "global makes layers differ.*uniform layout cannot hold: use --layout per_l",
    "PRUNE --ratio 0.2 --allocation sensitivity": "sensitivity makes layers differ.*use --layout per_layer",
    "PRUNE --ratio 0.2 --allocation skip:1,1": "skip:1,1 makes layers differ.*use --layout per_layer",
    "PRUNE --allocation {tmp}/good.yaml": "good.yaml makes layers differ.*use --layout per_layer",
    "PRUNE --ratio 0.2 --allocation auto": "allocation auto is a method of its own: leave it out, and use --method auto",
    "PRUNE {uneven} --ratio 0.2": "the layers of this model differ already: use --layout per_layer",
    # allocations
    "PRUNE --ratio 0.2 --allocation globl": "unknown allocation 'globl': did you mean 'global'.*skip:4,2, FILE.yaml",
    "PRUNE --ratio 0.2 --allocation nonsense": "unknown allocation 'nonsense': .*valid: equal, global, standardised, sensitivity, skip:4,2, FILE.yaml",
    f"PRUNE --ratio 0.2 {PER_LAYER} skip:4": "allocation 'skip:4': write skip:4,2 to spare the first four and last two",
    f"PRUNE --ratio 0.2 {PER_LAYER} skip:2,1": "allocation skip:2,1 spares all 3 layers: nothing is left to cut",
    f"PRUNE --ratio 0.5 {PER_LAYER} skip:1,1": "ffn can give up at most 4,224 .*lower the ratio or name more axes",
    f"PRUNE --ratio 0.2 {PER_LAYER} good.yaml": "--ratio and an allocation file both say how much goes: give one",
    f"PRUNE --ratio 0.2 {PER_LAYER} sensitivity --probes 0": "probes 0: .*greater than or equal to 1",
    f"PRUNE --ratio 0.2 {PER_LAYER} sensitivity --probes 999": "has 93 windows of 32 tokens, fewer than the 1007 asked",
    # who will load it
    "PRUNE --ratio 0.2 --for vlm": "unknown client 'vlm': did you mean 'vllm'.*transformers, vllm, llama.cpp",
    "PRUNE --ratio 0.2 --for transformers,onnx": "unknown client 'onnx': valid: transformers, vllm, llama.cpp",
    f"PRUNE --ratio 0.2 --multiple-of 48 {PER_LAYER} global": "--multiple-of 48: no width below 48 is a multiple.*lower",
    "check {model} --client lama.cpp": "unknown client 'lama.cpp': did you mean 'llama.cpp'.*transformers, vllm, .*all",
    "check {tmp}/nowhere": "nowhere is not a model folder",
    "check {tmp}/nowhere --client all": "nowhere is not a model folder",
    "check {tmp}": "has no config.json: give a folder that holds a whole model",
    "check {text}": "words.txt is not a model folder",
    # export
    "export {model}": "Missing option.*--output",
    "export {opt} -o {tmp}/new/a.gguf": "billhook writes no GGUF of opt: keep the folder, which transformers loads",
    "export {uneven} -o {tmp}/new/a.gguf": "qwen3 wants equal layers; openelm has no place for output.weight; prune all "
    "layers alike, or keep the folder",
    "export {narrow} -o {tmp}/new/a.gguf": "layer 1 has value heads of 4 channels beside key heads of 8.*or prune heads or "
    "groups instead, or keep the folder",
    "export {model} -o {text}": "words.txt exists: choose another file, or --overwrite",
    "export {model} -o {text} --quantize Q8": "words.txt exists: choose another file, or --overwrite",
    "export {model} -o {text}/a.gguf": "cannot write .*words.txt/a.gguf",
    "export {model} -o {tmp} --overwrite": "cannot write .*: Is a directory",
    "export {model} -o {tmp}/new/a.gguf --quantize Q8": "unknown quantize 'Q8': did you mean 'Q8_0'.*F16, BF16, Q8_0",
    "export {model} -o {tmp}/new/a.gguf --quantize Q4_K_M": "K-quants are made by llama.cpp's llama-quantize, which is not "
    "on PATH: put it there, or choose one of F32, F16, BF16, Q8_0",
    "export {model} -o {tmp}/new/a.gguf --format onnx": "unknown format 'onnx': valid: gguf, folder",
    # quantize
    "quantize {opt} --method rtn -o {tmp}/new": "billhook writes no GGUF of opt: keep the folder",
    "quantize {model} --bits 3 -o {tmp}/new": "unknown bits '3'.*4, 5, 8, T2, TQ2_0, Q4_0",
    "quantize {model} --memory 1kB -o {tmp}/new": "--memory 1,000: its weights take from .* to .* bytes",
    "quantize {model} --bits 4 --memory 90MB -o {tmp}/new": "--bits mixed wants --memory",
    "export {tmp}/nowhere -o {tmp}/new/a.gguf": "model .*nowhere does not exist",
}


def saved(model: PreTrainedModel, folder: Path) -> Path:
    folder.mkdir()
    save.save(model, tiny.tokenizer(), folder, None)
    return folder


def cut(family: str, kind: str, drop: Callable[[int], torch.Tensor]) -> PreTrainedModel:
    """Without the units that `drop` names for each layer."""
    model = tiny.model(family)
    for axis in axes(model, (kind,)):
        remove(model, axis, drop(axis.layer))
    return model


def without_budget(arguments: list[object]) -> list[object]:
    at = arguments.index("--ratio")
    return arguments[:at] + arguments[at + 2 :]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """OPT, Qwen3 of uneven widths with a head of its own, LLaMA with half of its value channels from the second layer
    on."""
    root = tmp_path_factory.mktemp("models")
    halves = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    return {
        "opt": saved(tiny.model("opt"), root / "opt"),
        "uneven": saved(cut("qwen3", "ffn", torch.arange), root / "uneven"),
        "narrow": saved(cut("llama", "value", lambda n: halves if n else halves[:0]), root / "narrow"),
    }


@pytest.mark.parametrize(("command", "words"), COMMANDS.items(), ids=list(COMMANDS))
def test_an_impossible_command(command: str, words: str, bench: Bench, models: dict[str, Path]) -> None:
    in_order(write("good.yaml", "0: {ffn: 48}\n1: {ffn: 32}\n2: {ffn: 16}\n"))(bench.tmp)
    bench.patch.setenv("PATH", "")  # where llama-quantize is not
    bench.patch.chdir(bench.tmp)
    bench.patch.setattr(latency, "_in_turns", lambda tasks, *_: [4.0, *(1 - 0.1 * n for n in range(len(tasks) - 1))])
    places = {
        name: shutil.copytree(path, bench.tmp / name) for name, path in models.items() if f"{{{name}}}" in command
    }
    places |= {"tmp": bench.tmp, "model": bench.model, "text": bench.text}
    arguments: list[object] = [word.format(**places) for word in command.split()]
    if arguments[0] == "PRUNE":
        named = "{" in command.split()[1] if " " in command else False
        arguments[:1] = without_budget(bench.prune(model=arguments.pop(1) if named else None))
    bench.refuses(words, *arguments)


FILES: dict[str, tuple[str | None, str]] = {
    "missing file": (None, "allocation file .*a.yaml cannot be read: .*No such file"),
    "not YAML": ("0: {ffn: [", "allocation file .*a.yaml cannot be read: "),
    "a list": ("- ffn", "allocation file .*a.yaml: write it as {0: {ffn: 1536}, 1: {ffn: 960}, …}"),
    "empty": ("", "allocation file .*a.yaml: write it as {0: {ffn"),
    "a layer without axes": ("0:\n1:\n2:", "allocation file .*a.yaml: write it as {0: {ffn"),
    "a name for a layer": ("first: {ffn: 32}", "allocation file .*a.yaml: write it as .*'first'"),
    "half a channel": ("{0: {ffn: 32.5}, 1: {}, 2: {}}", "write it as .*32.5 is no number of units"),
    "a share": ("{0: {ffn: 70%}, 1: {}, 2: {}}", "write it as .*'70%' is no number of units"),
    "yes": ("{0: {ffn: yes}, 1: {}, 2: {}}", "write it as .*True is no number of units"),
    "missing layer": ("{0: {ffn: 32}, 2: {ffn: 32}}", "layer 1 is missing; name all 3, whole ones too"),
    "unknown layer": ("{0: {}, 1: {}, 2: {}, 3: {ffn: 8}}", "there is no layer 3; the model has 3, numbered from 0"),
    "layer before the first": ("{-1: {}, 0: {}, 1: {}, 2: {}}", "there is no layer -1; the model has 3"),
    "too wide": ("{0: {ffn: 49}, 1: {}, 2: {}}", "layer 0: ffn cannot keep 49; it has 48 and keeps 1 or more"),
    "no channel": ("{0: {}, 1: {ffn: 0}, 2: {}}", "layer 1: ffn cannot keep 0; it has 48 and keeps 1 or more"),
    "below nothing": ("{0: {}, 1: {}, 2: {ffn: -4}}", "layer 2: ffn cannot keep -4; it has 48"),
    "uneven heads": (
        "{0: {heads: 3}, 1: {}, 2: {}}",
        "layer 0: heads cannot keep 3; it has 4 .* or more in steps of 2",
    ),
    "wrong kind": (
        "{0: {groups: 1}, 1: {}, 2: {}}",
        r"layer 0: 'groups' is not among the axes to prune \(heads, ffn\)",
    ),
    "unknown kind": ("{0: {}, 1: {fnn: 32}, 2: {}}", r"layer 1: 'fnn' is not among the axes to prune \(heads, ffn\)"),
}


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=list(FILES))
def test_an_allocation_file_that_cannot_be_followed(content: str | None, words: str, bench: Bench) -> None:
    file = bench.tmp / "a.yaml"
    if content is not None:
        file.write_text(content)
    arguments = bench.prune("--layout", "per_layer", "--axes", "heads,ffn", "--allocation", file)
    bench.refuses(words, *without_budget(arguments))


def test_an_allocation_file_may_be_json_and_is_followed(bench: Bench) -> None:
    """The same command works once the file is right."""
    file = bench.tmp / "a.json"
    file.write_text(json.dumps({"0": {"ffn": 48}, "1": {"ffn": 31, "heads": 2}, "2": {}}))
    arguments = bench.prune("--layout", "per_layer", "--axes", "heads,ffn", "--allocation", file, "--json")
    code, out, err = bench.run(*without_budget(arguments))
    assert (code, err) == (0, "")
    gone = {(cut["layer"], cut["kind"]): cut["dropped"] for cut in json.loads(out)["cuts"] if cut["dropped"]}
    assert gone == {(1, "ffn"): 17, (1, "heads"): 2}


SENSITIVITY = ["--layout", "per_layer", "--allocation", "sensitivity"]


def test_statistics_that_cannot_be_kept_are_refused(bench: Bench) -> None:
    bench.refuses("words.txt is not a folder", *bench.prune(*SENSITIVITY, "--statistics", bench.text))


def test_damaged_statistics_are_refused_by_name(bench: Bench) -> None:
    keep = [*SENSITIVITY, "--statistics", bench.tmp / "kept"]
    assert bench.run(*bench.prune(*keep, out=bench.tmp / "first"))[0] == 0
    (file,) = (bench.tmp / "kept").iterdir()
    file.write_text(file.read_text()[:-20])
    bench.refuses(f"{file.name} .*(delete|remove) it", *bench.prune(*keep))


@pytest.mark.parametrize(
    "more",
    [
        [*SENSITIVITY, "--multiple-of", 64],
        [*SENSITIVITY, "--ratio", 0.8],
        [*SENSITIVITY, "--params", "1K"],
    ],
    ids=lambda more: " ".join(map(str, more[-4:])),
)
def test_what_cannot_be_had_is_refused_before_it_is_measured(more: list[object], bench: Bench) -> None:
    measured: list[str] = []
    measure = axis_plan.curves
    bench.patch.setattr(
        axis_plan, "curves", lambda *given, **named: (measured.append("!"), measure(*given, **named))[1]
    )
    arguments = bench.prune(*more)
    bench.refuses(".", *(without_budget(arguments) if "--params" in more else arguments))
    assert not measured


# clients that are not there


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """An interpreter without packages."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    return python


@pytest.mark.usefixtures("stock_client")
@pytest.mark.parametrize(
    ("client", "words"),
    {
        "transformers": r"has no transformers \(ModuleNotFoundError: .*torch.*\): install it there, or .*--python",
        "vllm": r"has no vllm \(ModuleNotFoundError: .*vllm.*\): install it there, or name another with --python",
        "llama.cpp": r"has no llama-cpp-python \(ModuleNotFoundError: .*llama_cpp.*\): install it there, or name",
    }.items(),
)
def test_a_client_that_is_not_installed_is_named(client: str, words: str, bare: Path, bench: Bench) -> None:
    bench.refuses(f"^billhook: error: {bare} {words}", "check", bench.model, "--client", client, "--python", bare)
    nowhere = bench.tmp / "no-python"
    bench.refuses(
        f"cannot run {nowhere}: No such file.*: name a Python that has",
        *["check", bench.model, "--client"],
        client,
        "--python",
        nowhere,
    )


@pytest.mark.usefixtures("stock_client")
def test_all_clients_are_asked_and_every_refusal_is_said(bare: Path, bench: Bench) -> None:
    code, out, err = bench.run("check", bench.model, "--client", "all", "--python", bare, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["loads"] == []
    assert [one["client"] for one in found["fails"]] == ["transformers", "vllm", "llama.cpp"]
    assert all("ModuleNotFoundError" in one["error"] for one in found["fails"])
