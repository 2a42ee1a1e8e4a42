"""Digests of what billhook makes of tiny models: python benchmarks/golden.py [--only TEXT] > digests.txt

One line a case: its name and a SHA-256 of every tensor and of the config (of the file, for GGUF).  A change that is to
change no behaviour leaves every line as it was on the same machine; other processors give other bits.  A case that
billhook refuses prints "refused".  Run before and after a change, and compare with diff.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", PYTHONHASHSEED="0", TRANSFORMERS_VERBOSITY="error")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

import billhook
from billhook.__main__ import main
from billhook.errors import BillhookError

FAMILIES = ("llama", "gpt2", "gemma2", "qwen2_moe")
WRITTEN = ("llama", "qwen2_moe")  # families for which commands run, which verify what they write
SMALL: dict[str, Any] = dict(samples=6, seq_len=32)
STREAMS = ("dense", "sequential", "dense_target")
MASK_STREAMS = ("dense", "sequential", "true_sequential", "layer_target", "dense_target")
SCORES = (
    *("obs", "wanda", "energy", "taylor1_vector", "taylor1_element", "taylor1_window"),
    *("taylor2_element", "taylor2_vector", "gate_fisher", "gate_sensitivity"),
)
PRESETS = ("contiguous", "greedy", "block-influence", "angular", "perplexity", "input", "max-gap", "random")
SEARCH = ("--trials", 4, "--pool", 8, "--pool-len", 16, "--clusters", 2, "--samples", 6, "--seq-len", 32)
RECOVER = ("--tokens", 512, "--seq-len", 32, "--batch-tokens", 64, "--lr", "1e-3")


def pruned() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and settings of prunes in memory, for every family."""
    for stream in STREAMS:
        yield f"fasp {stream}", dict(ratio=0.2, multiple_of=2, stream=stream)
    for score in SCORES:
        yield f"fasp by {score}", dict(ratio=0.2, multiple_of=2, score=score)
    for allocation in ("global", "sensitivity", "skip:1,1"):
        yield f"fasp {allocation}", dict(ratio=0.1, multiple_of=2, layout="per_layer", allocation=allocation, probes=2)
    for axis in ("heads", "groups", "value", "ffn,groups"):
        how = dict(layout="per_layer") if axis in ("value", "groups") else {}
        yield f"fasp axes {axis}", dict(ratio=0.15, multiple_of=2, axes=tuple(axis.split(",")), **how)
    yield "fasp without restoration", dict(ratio=0.2, multiple_of=2, restoration=False)
    for rotate in (True, False):
        yield f"slicegpt rotate {rotate}", dict(method="slicegpt", ratio=0.2, multiple_of=2, rotate=rotate)
    for preset in PRESETS:
        yield f"layerchop {preset}", dict(method="layerchop", layers=2, preset=preset)
    yield "layerchop patched", dict(method="layerchop", drop="1", patch="linear")
    for method in ("magnitude", "wanda", "sparsegpt", "fistapruner", "admm"):
        for stream in MASK_STREAMS:
            yield f"{method} {stream}", dict(method=method, sparsity=0.5, stream=stream)
        yield f"{method} 2:4", dict(method=method, pattern="2:4")
        yield f"{method} refit", dict(method=method, sparsity=0.5, refit=True)
    yield "optishear", dict(method="optishear", sparsity=0.5, metric="row,identity,none,sqrt")


def of_mixtures() -> Iterator[tuple[str, dict[str, Any]]]:
    """The same, for families with experts."""
    for axis in ("expert_ffn", "shared"):
        yield f"fasp axes {axis}", dict(ratio=0.05, multiple_of=2, axes=(axis,))
    for stream in ("dense", "sequential"):
        for experts in ("reap", "uncurl", "frequency"):
            yield f"experts {experts} {stream}", dict(method="experts", ratio=0.2, experts=experts, stream=stream)


def commands(family: str, text: Path, valid: Path) -> Iterator[tuple[str, list[Any]]]:
    """Names and command lines, of which each writes what it is called and later ones read what earlier ones wrote."""
    given = ("--calibration", text, "--samples", 6, "--seq-len", 32)
    axes = ("--axes", "expert_ffn", "--multiple-of", 8) if family in tiny.MIXTURES else ()
    yield "written", ["prune", family, "--method=fasp", "--ratio", 0.2, "--multiple-of", 2, *axes, *given]
    yield (
        "streamed",
        ["prune", family, "--method=fasp", "--ratio", 0.2, "--multiple-of", 2, *axes, *given, "--stream-weights"],
    )
    yield (
        "per layer",
        ["prune", family, "--method=fasp", "--ratio", 0.2, "--multiple-of", 2, *axes, "--layout", "per_layer", *given],
    )
    yield (
        "vocabulary",
        ["prune", family, "--method=fasp", "--ratio", 0.2, "--multiple-of", 2, *axes, "--vocab-from", text, *given],
    )
    yield "masks", ["prune", family, "--method", "sparsegpt", "--sparsity", 0.5, *given]
    yield "masks streamed", ["prune", family, "--method", "wanda", "--sparsity", 0.5, *given, "--stream-weights"]
    yield (
        "search",
        ["search", family, "--ratio", 0.2, "--multiple-of", 2, "--validation", valid, "--calibration", text, *SEARCH],
    )
    yield "optishear search", ["search", family, "--method", "optishear", "--sparsity", 0.5, "--trials", 4, *given]
    healed = ["recover", "written", "--teacher", family, "--text", text, "--held-out", valid, *RECOVER]
    yield "distilled", healed
    yield "distilled by states", [*healed, "--states", "on"]
    yield "continued", [*healed, "--objective", "ce", "--trainable", "all"]
    yield "adapted", [*healed, "--trainable", "lora"]
    yield (
        "zeros kept",
        ["recover", "masks", "--keep-zeros", "--teacher", family, "--text", text, "--held-out", valid, *RECOVER],
    )
    yield "exported.gguf", ["export", "written", "--quantize", "F16"]
    yield "quantized.gguf", ["export", "written", "--quantize", "Q8_0"]


def digest(tensors: dict[str, Tensor], config: dict[str, Any]) -> str:
    """SHA-256 of tensors by name and of a config, without what says where and with what it was made."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    stable = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    total.update(json.dumps(stable, sort_keys=True, default=str).encode())
    return total.hexdigest()


def of_folder(folder: Path) -> str:
    tensors = {key: one for file in folder.glob("*.safetensors") for key, one in load_file(file).items()}
    return digest(tensors, json.loads((folder / "config.json").read_text()))


def in_memory(family: str, text: Path, how: dict[str, Any]) -> str:
    if family in tiny.MIXTURES and "method" not in how:
        how = {"axes": ("expert_ffn",), **how, "multiple_of": 8}
    model = billhook.prune(
        tiny.model(family),
        tokenizer=tiny.tokenizer(),
        calibration=str(text),
        look=False,
        **{"method": "fasp", **SMALL, **how},
    ).model
    return digest(model.state_dict(), model.config.to_dict())


def by_command(arguments: list[Any], out: Path) -> str:
    sys.argv = ["billhook", *map(str, arguments), "-o", str(out)]
    try:
        main()
    except SystemExit as left:
        if left.code:
            raise BillhookError(f"exit code {left.code}") from None
    return hashlib.sha256(out.read_bytes()).hexdigest() if out.is_file() else of_folder(out)


def cases(family: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Every case of one family, in a working folder that is current; in the order in which they must run."""
    text, valid = Path("text.txt"), Path("valid.txt")
    text.write_text(tiny.text(1200))
    valid.write_text(tiny.text(900, lexicon=25))
    tiny.model(family).save_pretrained(family)
    tiny.tokenizer().save_pretrained(family)
    for name, how in [*pruned(), *(of_mixtures() if family in tiny.MIXTURES else ())]:
        yield f"{family}: {name}", lambda how=how: in_memory(family, text, how)
    for name, arguments in commands(family, text, valid) if family in WRITTEN else ():
        yield f"{family}: {name}", lambda arguments=arguments, name=name: by_command(arguments, Path(name))


def run(family: str, only: str) -> None:
    out = sys.stdout
    for name, case in cases(family):
        if only not in name:
            continue
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                found = case()
        except BillhookError as error:
            found = "refused"
            print(f"{name}: {error} {said.getvalue()[-300:]}", file=sys.stderr)
        print(f"{found}  {name}", file=out, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        default="",
        help="cases whose names hold this; commands read what earlier ones wrote, and are refused without",
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            run(family, asked.only)
