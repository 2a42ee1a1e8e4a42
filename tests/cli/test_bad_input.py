"""Bad input ends in one line that says what, where and what to do, and exit code 2: nothing is written, nothing
lost."""

import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch
import transformers as T
from processes import Child
from safetensors.torch import load_file, save_file

from billhook import __main__ as command_line
from billhook import cli
from billhook.checkpoints import load, verify
from billhook.errors import BillhookError
from billhook.runtime import atomic, run_folder

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Path], object]
Captured = pytest.CaptureFixture[str]


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Every path below `root`, with the bytes of a file. Finished layers, which are kept to go on from, apart."""
    return {
        str(p.relative_to(root)): p.read_bytes() if p.is_file() else None
        for p in root.rglob("*")
        if ".unfinished" not in str(p) and (p.is_file() or not list(p.glob("*.unfinished")))
    }


@dataclass
class Bench:
    """A tiny model, a text, and the command line in this process."""

    model: Path
    text: Path
    patch: pytest.MonkeyPatch
    captured: Captured

    @property
    def tmp(self) -> Path:
        return self.model.parent

    def prune(self, *more: object, model: object = None, out: object = None) -> list[object]:
        """Arguments of a prune that works, into a folder whose parent does not exist; an option given again wins."""
        settings = ["--ratio", 0.2, "--calibration", self.text, "--samples", 8, "--seq-len", 32, "--multiple-of", 4]
        out = out or self.tmp / "new" / "out"
        return ["prune", model or self.model, "-o", out, "--method=fasp", *settings, *more]

    def run(self, *arguments: object) -> tuple[Any, str, str]:
        """Exit code, standard output, standard error."""
        for name in ("transformers", "huggingface_hub", "datasets"):  # what they log counts as said
            for handler in logging.getLogger(name).handlers:
                if type(handler) is logging.StreamHandler:
                    self.patch.setattr(handler, "stream", sys.stderr)
        self.captured.readouterr()
        self.patch.setattr(sys, "argv", ["billhook", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *self.captured.readouterr()

    def refuses(self, words: str, *arguments: object) -> None:
        """The command must end in one line that matches `words`, every file and folder as it was."""
        before = snapshot(self.tmp)
        code, out, err = self.run(*arguments)
        assert code == 2 and out == "" and err.startswith("billhook: error: "), (code, out, err)
        assert err.count("\n") == 1 and len(err) < 600, err
        assert re.search(words, err), err
        assert snapshot(self.tmp) == before


@pytest.fixture
def bench(folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> Bench:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # it read the environment on import
    return Bench(folder, text_file, monkeypatch, capsys)


COMMANDS = {  # PRUNE and EVALUATE work, but for the MODEL or the option that follows
    "PRUNE --ratio 0": "ratio 0.0: .*greater than 0",
    "PRUNE --ratio 1": "ratio 1.0: .*less than 1",
    "PRUNE --ratio nan": "ratio nan: .*finite",
    "PRUNE --ratio 0.95": "ffn can give up at most .* before a layer loses all units: lower the ratio",
    "PRUNE --ratio 1e-7": "less than half of the smallest step .*raise the ratio",
    "PRUNE --ratio much": "'--ratio'.*number",
    "PRUNE --samples x": "'--samples'.*integer",
    "PRUNE --samples 0": "samples 0: .*greater than or equal to 1",
    "PRUNE --samples 9999": "has 93 windows of 32 tokens, fewer than the 9999 asked for: lower --samples",
    "PRUNE --seq-len 1": "seq-len 1: .*equal to 2",
    "PRUNE --seq-len 256": "seq-len 256 is beyond the 128 positions of .*tiny-llama: lower --seq-len",
    "PRUNE --seed 99999999999999999999": "seed 9{20}: .*less than",
    "PRUNE --multiple-of 64": "--multiple-of 64: no width below 48 is a multiple.*lower",
    "PRUNE --method fsap": "unknown method 'fsap': did you mean 'fasp'",
    "PRUNE --axes fnn": "unknown axis 'fnn': did you mean 'ffn'.*heads, groups",
    "PRUNE --axes value": "axis 'value' .*name others of ffn, heads, groups",
    "PRUNE --axes heads,groups": "'heads' and 'groups' cut the same columns: name one",
    "PRUNE --score wnada": "unknown score 'wnada': did you mean 'wanda'",
    "PRUNE --method goa --axes ffn,value --layout per_layer": "goa does not prune 'value': .*ffn, heads, groups",
    "PRUNE --method goa --share 1.5": "share 1.5: .*less than or equal to 1",
    "PRUNE --method goa --share 0.3 --no-recovery": "--share is a share of the recovery: leave out",
    "PRUNE --method goa --score wanda": "unknown score 'wanda'.*analytic, measured",
    "PRUNE --method goa --jobs 2": "--jobs: in goa a module sees what became of those before: leave it out",
    "PRUNE --stream sequental": "unknown stream 'sequental': did you mean 'sequential'",
    "PRUNE --dtype bf16": "unknown dtype 'bf16': did you mean 'bfloat16'",
    "PRUNE --device quantum": "device 'quantum' cannot be used here: .*--device auto",
    "PRUNE --device cuda:99": "device 'cuda:99' cannot be used here: .*--device auto",
    "PRUNE --device mps": "device 'mps' cannot be used here: .*--device auto",
    "PRUNE --device meta": "device 'meta' cannot be used here: .*--device auto",
    "PRUNE --sampels 8": "No such option.* --sampels .*--samples",
    "PRUNE --calibration no-such-text": "'no-such-text' is no file here, and no hub data set",
    "PRUNE --calibration {long}.txt": "name too long|does not exist",
    "PRUNE --calibration=": "no text named|does not exist",  # Path("") would be the working folder
    "prune {model} --ratio 0.2": "Missing option.*--output",
    "prune {model} -o {tmp}/out": "no budget: give --ratio 0.2, --params 100M, --memory 250MB or --speedup 1.3",
    "prune --ratio 0.2 -o {tmp}/out": "Missing argument.*MODEL",
    "pruen {model}": "No such command 'pruen'.*prune",
    "inspect {tmp}/nowhere": "model .*nowhere does not exist: give a folder, a hub id",
    "PRUNE {model}/config.json": "config.json is a file: give the model's folder, .* a .gguf file",
    "PRUNE {tmp}/junk.gguf": "junk.gguf is no GGUF file: it does not begin with GGUF",
    "PRUNE {tmp}/empty.gguf": "empty.gguf is no GGUF file: it does not begin with GGUF",
    "PRUNE nobody/no-such-model": "model nobody/no-such-model .*could not be fetched from the hub",
    "PRUNE no-such-model": "model no-such-model does not exist: give a folder",
    "PRUNE ~nosuchuser/model": "~nosuchuser",
    "PRUNE {long}": "name too long|does not exist",
    "evaluate {tmp}/nowhere --text {text}": "model .*nowhere does not exist",
    "EVALUATE --seq-len 1": "seq-len 1: a window needs at least 2 tokens",
    "EVALUATE --seq-len 256": "256 is beyond the 128 positions of .*tiny-llama: lower --seq-len",
    "EVALUATE --windows 0": "'--windows'.*greater than or equal to 1",
    "EVALUATE --text {tmp}/no.txt": "text .*no.txt does not exist",
    "EVALUATE --against {tmp}/nowhere": "model .*nowhere does not exist",
    "EVALUATE --against {model}": "tiny-llama is named twice",
    "EVALUATE --batch-sizes 1,0": "--batch-sizes '1,0': write whole numbers",
    "EVALUATE --context-lengths a": "--context-lengths 'a': write whole numbers",
    "EVALUATE --context-lengths 100": "context 100: .*tiny-llama has 128 positions, .*at most 64",
    "EVALUATE --prompts {tmp}/no.txt": "text .*no.txt cannot be read",
    "EVALUATE --report {text}/page.html": "cannot write .*words.txt/page",
    "EVALUATE --report {tmp}/page.txt": "page.txt: name a file that ends in .html",
    "EVALUATE --tasks {tmp}/no.yaml": "no.yaml",
    "EVALUATE --tasks {tmp}": "--tasks .*: the folder holds no .yaml file",
    "EVALUATE --json {text}/a.json": "cannot write .*words.txt/a.json",
    "EVALUATE --json {tmp}/other": "cannot write .*other: Is a directory",
    "EVALUATE --json /proc/billhook/a.json": "cannot write /proc/billhook/a.json: No such file",
}


@pytest.mark.parametrize(("command", "words"), COMMANDS.items(), ids=list(COMMANDS))
def test_an_impossible_command(command: str, words: str, bench: Bench) -> None:
    in_order(write("junk.gguf", "junk"), write("empty.gguf", ""))(bench.tmp)
    shutil.copytree(bench.model, bench.tmp / "other")
    config(model_max_length=1, extra_special_tokens=["<z>"], file="tokenizer_config.json")(bench.tmp / "other")
    places = {"tmp": bench.tmp, "model": bench.model, "text": bench.text, "long": "x" * 300}
    arguments: list[object] = [word.format(**places) for word in command.split()]
    if command.startswith(("PRUNE", "EVALUATE")):
        model = bench.model if str(arguments[1]).startswith("-") else arguments.pop(1)
        evaluate = ["evaluate", model, "--text", bench.text, "--seq-len", 32]
        arguments[:1] = bench.prune(model=model) if command.startswith("PRUNE") else evaluate
    bench.refuses(words, *arguments)


def test_heads_that_a_stock_checkpoint_cannot_lose(bench: Bench) -> None:
    one_each = T.LlamaConfig(**tiny.SHAPE, **{**tiny.GATED, "num_key_value_heads": tiny.SHAPE["num_attention_heads"]})
    for name, model in (("opt", tiny.model("opt")), ("mha", T.AutoModelForCausalLM.from_config(one_each))):
        model.save_pretrained(bench.tmp / name)
        tiny.tokenizer().save_pretrained(bench.tmp / name)
    for kind in ("heads", "groups"):
        bench.refuses(
            f"opt cannot give up '{kind}' in a stock checkpoint: .*name other --axes, or use --layout per_layer",
            *bench.prune("--axes", kind, model=bench.tmp / "opt"),
        )
    bench.refuses(
        r"one query head \(4 in all\): use.* groups", *bench.prune("--axes", "heads", model=bench.tmp / "mha")
    )


def write(name: str, content: str) -> Damage:
    return lambda d: (d / name).write_text(content)


def delete(pattern: str) -> Damage:
    return lambda d: [file.unlink() for file in d.glob(pattern)]


def config(file: str = "config.json", **values: object) -> Damage:
    return lambda d: write(file, json.dumps(json.loads((d / file).read_text()) | values))(d)


def config_of(kind: type[T.PreTrainedConfig], architecture: str) -> Damage:
    return lambda d: kind(architectures=[architecture]).save_pretrained(d)


def weights(change: Callable[[Tensors], Tensors]) -> Damage:
    def damage(d: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(d / "model.safetensors").items()}
        save_file(change(tensors), d / "model.safetensors", {"format": "pt"})

    return damage


def second_of_three_shards(harm: Damage) -> Damage:
    def damage(d: Path) -> None:
        (d / "model.safetensors").unlink()
        tiny.model("llama").save_pretrained(d, max_shard_size="60KB")
        harm(d / "model-00002-of-00003.safetensors")

    return damage


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def shorter(tensors: Tensors) -> Tensors:
    return {name: tensor[:100] for name, tensor in tensors.items()}


def in_order(*damages: Damage) -> Damage:
    return lambda d: [damage(d) for damage in damages]


UP = "model.layers.1.mlp.up_proj.weight"
PICKLE = "pickled weights .pytorch_model.bin.*convert.*save_pretrained.*safetensors"
AGAIN = ".*(fetch|copy|download).* again"
MODELS: dict[str, tuple[Damage, str]] = {
    "gone": (shutil.rmtree, "model .*tiny-llama does not exist: give a folder, a hub id"),
    "empty": (in_order(shutil.rmtree, Path.mkdir), "tiny-llama is an empty folder: expected config.json and"),
    "no config": (delete("config.json"), "tiny-llama has no config.json"),
    "broken config": (write("config.json", '{"a":'), "tiny-llama: config.json cannot be read .*line 1"),
    "config is a list": (write("config.json", "[]"), "tiny-llama: config.json holds a list, not a JSON object"),
    "config without family": (write("config.json", "{}"), "family None is not supported: billhook knows llama"),
    "config with two families": (config(model_type=["llama"]), "family .*llama.* is not supported"),
    "config without layers": (config(num_hidden_layers=0), "tiny-llama.* no (decoder )?layers"),
    "config of another width": (config(intermediate_size=44), "tensors are missing or of another shape.*mlp"),
    "truncated": (lambda d: cut_short(d / "model.safetensors"), "model.safetensors is damaged or truncated" + AGAIN),
    "no weights": (delete("*.safetensors"), "tiny-llama holds no .*safetensors"),
    "shard truncated": (second_of_three_shards(cut_short), "model-00002-of-00003.safetensors is damaged" + AGAIN),
    "shard missing": (second_of_three_shards(Path.unlink), "model-00002-of-00003.safetensors is missing" + AGAIN),
    "index without map": (
        in_order(delete("*.safetensors"), write("model.safetensors.index.json", '{"weight_map": []}')),
        "index.json.*weight_map",
    ),
    "tensor missing": (weights(lambda t: {k: t[k] for k in t if k != UP}), f"1 tensor.* missing.*first {UP}"),
    "NaN": (weights(lambda t: t | {UP: t[UP] * torch.nan}), f"tensor {UP} holds NaN"),
    "integers": (weights(lambda t: {k: t[k].to(torch.int8) for k in t}), "stores weights as I8: dequantise"),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\): .*full-precision"),
    "multimodal": (
        config_of(T.Idefics3Config, "Idefics3ForConditionalGeneration"),
        r"multimodal \(idefics3\): .* qwen3_vl where it stands; save its language model by itself first.* llama",
    ),
    "packed": (
        config(quantization_config={"quant_method": "mxfp4"}),
        r"Mxfp4Config\(dequantize=True\), and save_pretr",
    ),
    "packed in groups": (
        config(quantization_config={"quant_method": "compressed-tensors"}),
        r"CompressedTensorsConfig\(dequantize=True\), and save_pretr",
    ),
    "quantised oddly": (config(quantization_config="gptq"), "is quantised .*full-precision"),
    "encoder": (config_of(T.BertConfig, "BertForMaskedLM"), "is a BertForMaskedLM, not a causal LM"),
    "classifier": (config(architectures=["LlamaForSequenceClassification"]), "not a causal LM"),
    "encoder-decoder": (config_of(T.T5Config, "T5ForConditionalGeneration"), r"encoder-decoder \(t5\).*decoder-only"),
    "encoder with a head": (config_of(T.BertConfig, "BertLMHeadModel"), "'bert' has no row, .*it is an encoder"),
    "adapter": (in_order(delete("*"), write("adapter_config.json", "{}")), "PEFT adapter: merge it .*merge_and_unload"),
    "no tokenizer": (delete("tokenizer*"), "no tokenizer could be loaded.*copy"),
    "broken tokenizer": (write("tokenizer.json", "{"), "no tokenizer could be loaded .*line 1"),
    "larger tokenizer": (in_order(config(vocab_size=100), weights(shorter)), "tokenizer.* vocabulary"),
    "pickle": (in_order(delete("*.safetensors"), write("pytorch_model.bin", "garbage")), PICKLE),
}


@pytest.mark.parametrize(("damage", "words"), MODELS.values(), ids=list(MODELS))
def test_a_model_that_cannot_be_pruned(damage: Damage, words: str, bench: Bench) -> None:
    bench.patch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened a pickle"))
    damage(bench.model)
    bench.refuses(words, *bench.prune())


TEXTS: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("no.txt", None, "text .*no.txt does not exist: give a text file"),
    "empty": ("a.txt", b"", "text .*a.txt is empty"),
    "Latin-1": ("a.txt", b"caf\xe9 " * 99, r"text .*a.txt is not UTF-8 \(byte 3\): convert it"),
    "malformed .jsonl": ("a.jsonl", b'{"text": "a"}\n{"text":', "text .*a.jsonl, line 2: not JSON"),
    ".jsonl without text": ("a.jsonl", b'{"body": "a"}', "a.jsonl, line 1: no field 'text'"),
    "half a character": ("a.jsonl", b'{"text": "\\ud800 and more"}', "a.jsonl, line 1: .*surrogate"),
    "folder without text": ("", None, "text folder .*texts holds no .txt"),
    "short": ("a.txt", b"abc", "text 'a' has 3 tokens, less than one window of 32: use more text"),
    "few windows": ("a.txt", b"abcd" * 20, "has 2 windows of 32 tokens, fewer than the 8 asked for: lower --samples"),
}


@pytest.mark.parametrize(("name", "content", "words"), TEXTS.values(), ids=list(TEXTS))
def test_a_text_that_cannot_be_read(name: str, content: bytes | None, words: str, bench: Bench) -> None:
    (bench.tmp / "texts").mkdir()
    if content is not None:
        (bench.tmp / "texts" / name).write_bytes(content)
    bench.refuses(words, *bench.prune("--calibration", bench.tmp / "texts" / name))


def test_lines_of_jsonl_end_only_at_newlines(bench: Bench) -> None:
    line = json.dumps({"text": "a\u2028b\x85c" + tiny.text()}, ensure_ascii=False)
    write("a.jsonl", line)(bench.tmp)
    assert bench.run(*bench.prune("--calibration", bench.tmp / "a.jsonl"))[0] == 0


def holding(path: Path, name: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / name).write_text("{}")
    return path


def linked(path: Path, to: str = "") -> Path:
    path.symlink_to(to or path.name)
    return path


OUTPUTS: dict[str, tuple[Callable[[Bench], Path], list[str], str]] = {
    "taken": (lambda b: holding(b.tmp / "taken", "x"), [], "taken .*not empty: .*--overwrite"),
    "not ours": (lambda b: holding(b.tmp / "taken", "x"), ["--overwrite"], "taken was not written by billhook"),
    "a file": (lambda b: b.text, [], "words.txt exists and is not a folder: choose another"),
    "inside MODEL": (lambda b: b.model / "a" / "b", [], "inside the model's own folder .*: choose another"),
    "MODEL": (lambda b: b.model, [], "the model's own folder .*: choose another"),
    "MODEL, ours": (lambda b: holding(b.model, "billhook.json"), ["--overwrite"], "model's own folder .*: choose"),
    "around MODEL": (lambda b: holding(b.tmp, "billhook.json"), ["--overwrite"], "holds the model's own folder"),
    "below a file": (lambda b: b.text / "a" / "b", [], "cannot write .*words.txt/a/b: Not a directory"),
    "under /proc": (lambda _: Path("/proc/billhook/out"), [], "cannot write /proc/billhook/out: No such file"),
    "too long a name": (lambda b: b.tmp / "new" / ("y" * 300), [], "name too long"),
    "no room for its siblings": (lambda b: b.tmp / "new" / ("y" * 245), [], "cannot write .*yyy: File name too long"),
    "too deep": (lambda b: b.tmp.joinpath(*["y" * 200] * 20), [], "name too long"),
    "here": (lambda _: Path("."), [], "output '.' is no name of its own"),
    "above": (lambda b: b.tmp / "..", [], r"output .*\.\.' is no name of its own"),
    "all": (lambda _: Path("/"), [], "output '/' is no name of its own"),
    "not UTF-8": (lambda b: b.tmp / os.fsdecode(b"\xff\xfe"), [], r"cannot write .*\\udcff.*not UTF-8"),
    "a link to itself": (
        lambda b: linked(b.tmp / "loop"),
        [],
        "cannot write .*loop: Too many levels of symbolic links",
    ),
    "a link to nothing": (lambda b: linked(b.tmp / "link", "gone"), [], "link exists and is not a folder"),
}


@pytest.mark.parametrize("case", OUTPUTS.values(), ids=list(OUTPUTS))
def test_an_output_that_cannot_be_written(case: tuple[Callable[[Bench], Path], list[str], str], bench: Bench) -> None:
    place, flags, words = case
    bench.refuses(words, *bench.prune(*flags, out=place(bench)))


def test_an_output_inside_a_model_named_by_a_tilde(bench: Bench) -> None:
    bench.patch.setenv("HOME", str(bench.tmp))
    bench.refuses("inside the model's own folder", *bench.prune(model="~/tiny-llama", out=bench.model / "out"))


def test_an_output_behind_a_link_is_written_there(bench: Bench) -> None:
    real, link = bench.tmp / "real", bench.tmp / "link"
    real.mkdir()
    link.symlink_to(real)
    assert bench.run(*bench.prune(out=link))[0] == 0
    assert link.is_symlink() and (real / "model.safetensors").exists() and not list(bench.tmp.glob(".*"))


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failing_replacement_loses_nothing(failing: int, bench: Bench) -> None:
    rename, calls = Path.rename, 0

    def busy(path: Path, *_: object) -> Path:
        raise OSError(16, "Device or resource busy", str(path))  # what a mount point answers

    def fail_once(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        return busy(path) if calls == failing else rename(path, target)

    bench.patch.setattr(atomic, "exchanged", lambda *_: False if failing else busy(*_))
    bench.patch.setattr(Path, "rename", fail_once)
    bench.refuses("out.*busy", *bench.prune("--overwrite", out=holding(bench.tmp / "out", "billhook.json")))


RECIPES: dict[str, tuple[str | None, str]] = {
    "missing": (None, "recipe .*r.yaml cannot be read: .*No such file"),
    "a bomb": ("model: &a [x, x]\naxes: [*a, *a]", "recipe .*r.yaml cannot be read: it has an alias"),
    "a date that is none": ("model: 2001-99-99", "recipe .*r.yaml cannot be read: month must be"),
    "deep": ("model: " + "[" * 2000, "recipe .*r.yaml cannot be read .nested too deeply"),
    "a list": ("- model", "recipe .*r.yaml is not a mapping"),
    "broken": ("model: [x", "recipe .*r.yaml cannot be read"),
    "empty": ("", "recipe .*r.yaml is not a mapping"),
    "no model": ("ratio: 0.2", "recipe .*r.yaml .*'model'"),
    "no ratio": ("model: x", "recipe .*r.yaml: no budget: give --ratio"),
    "unknown key": ("model: x\nratio: 0.2\nmetod: fasp", "r.yaml: unknown setting 'metod': did you mean 'method'"),
    "a number for a key": ("model: x\nratio: 0.2\n3: fasp", "r.yaml: unknown setting .?3.?: .*valid: method"),
    "unknown value": ("model: x\nratio: 0.2\nmethod: fsap", "r.yaml: unknown method 'fsap': did you mean 'fasp'"),
    "axes no list": ("model: x\nratio: 0.2\naxes: 3", "r.yaml: axes 3: .*list"),
    "expect no mapping": ("model: x\nratio: 0.2\nexpect: 3", "r.yaml: .*expect.* mapping"),
    "missing model": ("model: /no/model\nratio: 0.2", "model /no/model does not exist"),
}


@pytest.mark.parametrize(("content", "words"), RECIPES.values(), ids=list(RECIPES))
def test_a_recipe_that_cannot_be_run(content: str | None, words: str, bench: Bench) -> None:
    if content is not None:
        write("r.yaml", content)(bench.tmp)
    bench.refuses(words, "run", bench.tmp / "r.yaml", "-o", bench.tmp / "new" / "out")


INTERRUPTED = "billhook: interrupted; nothing half-written was left\n"
ENDS = {
    signal.SIGINT: (130, "", INTERRUPTED),
    signal.SIGTERM: (143, "", INTERRUPTED.replace("interrupted", "terminated")),
}


def started(arguments: list[object], bench: Bench) -> Child:
    """The command line in a process of its own."""
    bench.patch.setattr(sys, "argv", ["billhook", *map(str, arguments)])
    return Child(command_line.main)


@pytest.mark.parametrize("limit", [500, 2**16], ids=["config", "weights"])
def test_a_full_disk(limit: int, bench: Bench) -> None:
    before = snapshot(bench.tmp)
    bench.patch.setattr(sys, "argv", ["billhook", *map(str, bench.prune())])
    process = Child(lambda: (resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), cli.main()))
    code, out, err = process.ended()  # Python ignores SIGXFSZ: the write fails as on a full disk
    assert code == 2 and out == "", err
    assert re.fullmatch(
        "billhook: error: cannot write .*new/out.*: File too large; nothing half-written was left\n", err
    ), err
    assert snapshot(bench.tmp) == before


MOMENTS = [
    (load, "open_model", signal.SIGINT),
    (verify, "verify", signal.SIGINT),
    (verify, "verify", signal.SIGTERM),
]


@pytest.mark.parametrize(("where", "stage", "sent"), MOMENTS, ids=lambda one: getattr(one, "name", one))
def test_a_signal_leaves_nothing_half_written(where: Any, stage: str, sent: signal.Signals, bench: Bench) -> None:
    arguments = bench.prune("--overwrite", out=holding(bench.tmp / "out", "billhook.json"))
    before, (there, here) = snapshot(bench.tmp), os.pipe()
    bench.patch.setattr(where, stage, lambda *_, **__: (os.write(here, b"!"), time.sleep(60)))
    process = started(arguments, bench)
    os.close(here)
    with open(there, "rb") as signs:
        assert signs.read(1) == b"!", process.ended()
    assert list(bench.tmp.glob(".out.*.partial/*.safetensors" if stage == "verify" else ".out.*.partial"))
    process.send(sent)
    code, said, why = ENDS[sent]
    if stage == "verify":
        why = f"{why[:-1]}; what was done is in {bench.tmp}/out.unfinished: the same command goes on, --fresh starts over\n"
    assert process.ended() == (code, said, why)
    assert snapshot(bench.tmp) == before


def test_an_interrupt_as_the_folder_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Path.mkdir

    def interrupted(path: Path, *args: Any, **how: Any) -> None:
        made(path, *args, **how)
        if path.suffix == ".partial":
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic.folder(tmp_path / "new" / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_of_others_is_no_run_s(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(BillhookError, match="is not a run's folder"):
        run_folder.claim(tmp_path, {}, fresh=False)
    half = tmp_path / "work" / ".run.json.billhook.partial"
    half.mkdir(parents=True)
    run_folder.claim(half.parent, {"settings": {}}, fresh=False)
    assert [one.name for one in half.parent.iterdir()] == [run_folder.NAME]


def await_that(what: Callable[[], object], runs: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not what():
        assert runs() and time.monotonic() < until
        time.sleep(0.002)


@pytest.mark.parametrize("later", [0.0, 0.5], ids=["at the start", "amid the work"])
def test_ctrl_c(later: float, bench: Bench) -> None:
    bench.text.write_text(tiny.text() * 180)
    before = snapshot(bench.tmp)
    process = started(bench.prune("--samples", 4000, "--seq-len", 128), bench)
    await_that(lambda: list(bench.tmp.glob("new/.out.*.partial")), lambda: process.runs)
    time.sleep(later)
    process.send(signal.SIGINT)
    assert process.ended() == ENDS[signal.SIGINT]
    assert snapshot(bench.tmp) == before


def test_ctrl_c_while_libraries_load(bench: Bench) -> None:
    """The command itself, in an interpreter that has imported nothing yet."""
    bench.text.write_text(tiny.text() * 180)
    before = snapshot(bench.tmp)
    process = subprocess.Popen(
        [Path(sys.executable).with_name("billhook"), *map(str, bench.prune("--samples", 4000, "--seq-len", 128))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite run with & in a script ignores it
    )
    maps = Path(f"/proc/{process.pid}/maps")
    loading = (
        (lambda: "libtorch" in maps.read_text()) if maps.exists() else (lambda: list(bench.tmp.glob("new/.out.*")))
    )
    await_that(loading, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == ENDS[signal.SIGINT]
    assert snapshot(bench.tmp) == before


def test_overwrite_replaces_what_billhook_wrote(bench: Bench) -> None:
    out = bench.tmp / "out"
    assert bench.run(*bench.prune(out=out))[0] == 0
    first = snapshot(out)
    bench.refuses("not empty: .*--overwrite", *bench.prune(out=out))
    bench.refuses("does not exist", *bench.prune("--overwrite", "--calibration", bench.tmp / "no.txt", out=out))
    (out / "left-over").touch()
    assert bench.run(*bench.prune("--overwrite", "--ratio", 0.4, out=out))[0] == 0
    assert snapshot(out).keys() == first.keys()
    assert (out / "model.safetensors").stat().st_size < len(first["model.safetensors"] or b"")
    assert not list(bench.tmp.glob(".*"))


def test_equal_commands_give_equal_weights_and_only_json_is_printed(bench: Bench) -> None:
    found: list[dict[str, Any]] = []
    for name in "ab":
        code, out, err = bench.run(*bench.prune("--json", out=bench.tmp / name))
        assert (code, err) == (0, "")
        found.append(json.loads(out))
    one, other = ((bench.tmp / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == other and found[0]["cuts"] == found[1]["cuts"]
    code, out, err = bench.run("inspect", bench.tmp / "a", "--json")
    assert (code, err) == (0, "")
    seen, cut = json.loads(out), found[0]["cuts"][0]
    assert {
        key: found[0]["sizes"]["after"][key] for key in ("parameters", "decoder_parameters")
    }.items() <= seen.items()
    assert seen["axes"][0]["axis"] == "ffn" and seen["axes"][0]["units"] == cut["units"] - cut["dropped"] < 48


def test_models_of_different_tokenizers_are_compared_by_the_byte(bench: Bench) -> None:
    shutil.copytree(bench.model, bench.tmp / "other")
    config(model_max_length=1, extra_special_tokens=["<z>"], file="tokenizer_config.json")(bench.tmp / "other")
    given = ["--text", bench.text, "--seq-len", 32, "--windows", 2, "--new-tokens", 1]
    code, out, err = bench.run("evaluate", bench.model, "--against", bench.tmp / "other", *given)
    assert code == 0 and "perplexities per token do not compare, bits per byte do" in " ".join(err.split())
    assert "bits a byte" in " ".join(out.split())


@pytest.mark.parametrize(("positions", "options"), [(128, ["--windows", "1"]), (48, [])])
def test_a_small_evaluation_is_json_all_the_same(positions: int, options: list[str], bench: Bench) -> None:
    config(max_position_embeddings=positions)(bench.model)
    measure = ["evaluate", bench.model, "--text", bench.text, "--seq-len", 32, "--json", "-", *options]
    code, out, err = bench.run(*measure)
    assert (code, err) == (0, "")
    assert json.loads(out)["models"][0]["perplexities"][0]["perplexity"] > 1


def test_version(bench: Bench) -> None:
    code, out, err = bench.run("--version")
    assert code == 0 and re.fullmatch(r"billhook \d+\.\d+\.\d+\S*\n", out) and err == ""
