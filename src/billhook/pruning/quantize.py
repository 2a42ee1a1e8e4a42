"""Quantise a model: open, choose bits, walk, write both containers, read them back."""

import hashlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from billhook import data
from billhook.checkpoints import belongings, compressed, load, save, shards, tensor_names
from billhook.checkpoints.clients import check
from billhook.checkpoints.gguf import read
from billhook.checkpoints.gguf.imatrix import write_imatrix
from billhook.checkpoints.gguf.write import choose, shape_of, write_gguf
from billhook.checkpoints.load import Opened
from billhook.checkpoints.resume import FinishedLayers
from billhook.choices import BY_LAYER_TYPES, TERNARY
from billhook.cuts.quantizing import Found, Quantizing, off_levels, paths, quantise, sparse
from billhook.errors import ModelError, SettingsError
from billhook.math import grids
from billhook.math.grids import GRIDS
from billhook.models import layout
from billhook.models.experts import Experts, unfuse
from billhook.models.families import weight_of
from billhook.models.multimodal import within
from billhook.planning.bits import Limit, bits_by_layer, bounds, by_information, smaller_uniform, stored_as
from billhook.planning.few_bits import KEPT, MIXED, Wanted
from billhook.planning.sensitivity import Probe
from billhook.pruning.bits_search import searched
from billhook.reports import card, commands, page, records
from billhook.runtime import atomic, cache, run_folder
from billhook.runtime.progress import Tick, quiet
from billhook.runtime.run import Run
from billhook.tensors import Tokens

FILE = "model.gguf"
ALLOCATIONS = {"sensitivity": bits_by_layer, "mi": by_information, "search": searched}


@dataclass
class Quantized:
    """A quantised model, with the codes that its weights are the values of."""

    model: Any
    tokenizer: Any
    codes: Mapping[str, grids.Quantised]
    record: dict[str, Any]  # the content of billhook.json
    wanted: Wanted
    source: Path | None
    found: Found = field(default_factory=Found)

    def write(self, work: Path, tick: Tick = quiet) -> None:
        """Fill the existing folder `work`, and read every container back.

        Raises:
            BillhookError: what was written does not come back equal.
        """
        parts: dict[str, Any] = {}
        if self.wanted.folder:
            tick("saving", 0, 1)
            unfuse(self.model)  # codes are of experts one by one, whom `save` joins
            on_disk, experts = tensor_names.stored_as(self.model), _experts(self.model)
            stored = {path: on_disk[f"{path}.weight"].removesuffix(".weight") for path in self.codes}
            save.save(self.model, self.tokenizer, work, self.source)
            codes = {stored[path]: one for path, one in self.codes.items()}
            compressed.compress(work, codes, {stored[path] for path in experts & stored.keys()})
            self._same(load.load(work, dtype="float32"), work)
            self.record["loads"] = [check.check(work, "transformers")]
            parts["compressed-tensors"] = {"bytes": save.stored_bytes(work)}
            tick("saving", 1, 1)
        if self.wanted.file:
            written = write_gguf(self.model, self.tokenizer, work / FILE, "F16", tick, codes=self.codes)
            self._same(read.open_gguf(work / FILE)[0], work / FILE)
            parts["gguf"] = {key: written[key] for key in ("arch", "types", "bytes")}
        self.record["quantized"]["containers"] = parts
        atomic.write_text(work / atomic.MARK, records.to_json(self.record))
        atomic.write_text(work / "README.md", card.model_card(self.record))
        page.save(work / "report.html", self.page())

    def page(self) -> dict[str, Any]:
        """The content of report.json."""
        said, cut = self.record["quantized"], self.record if "cuts" in self.record else None
        where = records.conditions(self.model, commands.quantize_command(said, said["parent"], "OUT"), said["seconds"])
        return records.assemble("quantize", f"{said['parent']}, quantised", where, cut=cut, quantized=said)

    def write_imatrix(self, path: Path) -> None:
        """Write what enters each weight, as llama.cpp's llama-quantize reads it."""
        write_imatrix(self.model, path, self.found.energies, self.found.tokens, self.wanted.calibration)

    def _same(self, again: Any, where: Path) -> None:
        """Refuse a container whose weights or logits differ by a bit from what was measured in memory."""
        now = self.model.state_dict()
        differing = [name for name, tensor in again.state_dict().items() if not torch.equal(tensor, now[name])]
        if differing:
            raise ModelError(
                f"{where} did not survive reloading: {len(differing)} tensors differ, first {differing[0]}"
            )


def quantize(model: str, wanted: Wanted, run: Run) -> Quantized:
    """Quantise a model that is on this machine or the hub.

    Raises:
        BillhookError: anything that cannot work; nothing was written.
    """
    opened, started = _opened(model, run), time.perf_counter()
    wanted = _check(opened, wanted)
    with run_folder.locked(run.folder):
        text = _windows(opened, wanted, run)
        chosen, why = _chosen(opened, wanted, text, run)
        how = Quantizing(wanted.method, chosen, wanted.stream)
        calibration = text[: wanted.samples]
        seen = Probe(opened.model, text[wanted.samples + wanted.probes :]) if wanted.mixed else None
        found = quantise(opened.model, calibration, how, _kept(opened, wanted, chosen, run))
        tables = _tables(opened.model, wanted, set(found.codes))
        if seen is not None:
            opened, found, tables, why = _accepted(opened, wanted, (found, tables, why), (calibration, seen), run)
    record = _record(opened, wanted, found, why, text)
    record["quantized"]["seconds"] = time.perf_counter() - started
    return Quantized(opened.model, opened.tokenizer, {**found.codes, **tables}, record, wanted, opened.folder, found)


def _opened(model: str, run: Run) -> Opened:
    """The model in float32, in memory."""
    return load.open_model(model, device="cpu", dtype="float32", tick=run.tick)


def _check(opened: Opened, wanted: Wanted) -> Wanted:
    """Refuse what no container could hold, before anything is computed.

    Returns:
        what is wanted; the codes are kept where the weights have some already, and no text need be read.
    """
    model = opened.model
    if stands := within(model):
        raise ModelError(f"{opened.name} is multimodal ({stands.model_type}): billhook quantises models of text alone")
    linear = dict(model.named_modules())
    other = next((path for _, _, path in paths(model) if not isinstance(linear[path], torch.nn.Linear)), "")
    if other:
        raise ModelError(
            f"{opened.name}: {other} is a {type(linear[other]).__name__}, which holds its weight the other way: "
            f"compressed-tensors packs Linear alone, and billhook writes no GGUF of {model.config.model_type}"
        )
    _check_experts(opened, wanted)
    if wanted.file or wanted.imatrix:
        choose(shape_of(model))
    if not wanted.mixed and GRIDS[wanted.grid].offset and sparse(model):
        raise ModelError(
            f"{opened.name} is sparse, and {wanted.grid} has no level at zero: use --bits 4, 5 or 8, whose zeros stay"
        )
    if not _divided(opened, wanted):
        raise ModelError(f"{opened.name}: no weight has inputs in whole blocks of {_block(wanted)}")
    if wanted.mixed:
        low, high = bounds(model, _offered(opened, wanted), wanted.tables)
        if not low <= (wanted.memory or 0):
            raise SettingsError(f"--memory {wanted.memory:,}: its weights take from {low:,} to {high:,} bytes")
        return wanted
    off = off_levels(model, GRIDS[wanted.grid])
    if off and wanted.method == KEPT:
        raise ModelError(
            f"{opened.name}: {off} does not lie on the levels of {wanted.grid}, as `recover --bits` leaves weights: "
            "leave out --method kept"
        )
    if off and wanted.grid == TERNARY and not off_levels(model, GRIDS["T2"]):
        raise ModelError(
            f"{opened.name} was trained on three levels in blocks of {GRIDS['T2'].block}, and ggml has blocks of "
            f"{GRIDS[TERNARY].block} alone: use --format compressed-tensors, or train it with --scales module"
        )
    return wanted if off or wanted.imatrix else replace(wanted, method=KEPT)


def _check_experts(opened: Opened, wanted: Wanted) -> None:
    """Refuse a mixture that stock transformers would not unpack: it takes all experts to have one type."""
    experts = sorted(_experts(opened.model))
    if not experts:
        return
    what = f"{opened.name} is a mixture of experts"
    if wanted.file or wanted.imatrix:
        raise ModelError(
            f"{what}, of which billhook writes no GGUF: use --format compressed-tensors, without --imatrix"
        )
    if wanted.mixed:
        raise ModelError(f"{what}, which transformers unpacks as of one type: give --bits instead of --memory")
    names, divided = tensor_names.stored_as(opened.model), _divided(opened, wanted)
    if joined := next((path for path in experts if f"{path}.weight" not in names), ""):
        raise ModelError(f"{what} that lie in one tensor on disk, {joined} among them, which no client unpacks")
    if short := next((path for path in experts if path not in divided), ""):
        raise ModelError(
            f"{what}, and the inputs of {short} are no whole blocks of {_block(wanted)}, as all experts need in "
            f"compressed-tensors: prune with --multiple-of {_block(wanted)}"
        )


def _experts(model: Any) -> set[str]:
    """Paths of the linear modules of experts, each a module of its own; none once they are joined."""
    places = [f"{path}." for path, module in model.named_modules() if isinstance(module, Experts)]
    return {path for _, _, path in paths(model) if path.startswith(tuple(places))}


def _block(wanted: Wanted) -> int:
    """Inputs that share a scale."""
    return grids.BLOCK if wanted.mixed else GRIDS[wanted.grid].block


def _divided(opened: Opened, wanted: Wanted) -> dict[str, int]:
    """The layer of every module whose inputs are whole blocks, by path; all others keep float16."""
    every = ((path, n, weight_of(opened.model, path).shape[1]) for n, _, path in paths(opened.model))
    return {path: n for path, n, inputs in every if grids.divides(inputs, _block(wanted))}


def _offered(opened: Opened, wanted: Wanted) -> tuple[str, ...]:
    """The types that layers may have."""
    plain = wanted.folder or sparse(opened.model)
    return tuple(name for name in BY_LAYER_TYPES if not (plain and GRIDS[name].offset))


def _limit(opened: Opened, wanted: Wanted) -> Limit:
    return Limit(wanted.memory or 0, _offered(opened, wanted), wanted.tables)


def _windows(opened: Opened, wanted: Wanted, run: Run) -> Tokens:
    """Windows to calibrate on, and where bits are chosen as many again to choose by, and to accept by."""
    if not wanted.reads:
        return torch.zeros(0, wanted.seq_len, dtype=torch.long)
    load.check_positions(opened, wanted.seq_len)
    count = wanted.samples + (wanted.probes * 2 if wanted.mixed else 0)
    text = data.calibration_text(wanted.calibration, run.tick)
    windows = data.windows(text, opened.tokenizer, wanted.seq_len, count, wanted.seed)
    data.check_vocabulary(windows, opened.model, opened.name)
    return windows.tokens


def _chosen(opened: Opened, wanted: Wanted, text: Tokens, run: Run) -> tuple[dict[str, str], dict[str, Any]]:
    """The type of every module, by path, and how it was chosen."""
    every = _divided(opened, wanted)
    if not wanted.mixed:
        return dict.fromkeys(every, wanted.grid), {}
    seen = text[wanted.samples : wanted.samples + wanted.probes]
    types, why = ALLOCATIONS[wanted.allocation or "sensitivity"](opened.model, seen, _limit(opened, wanted), run)
    return {path: types[n] for path, n in every.items()}, why


def _kept(opened: Opened, wanted: Wanted, chosen: Mapping[str, str], run: Run) -> Run:
    """The run with the layers that were finished of this very work."""
    if run.folder is None or opened.folder is None or wanted.method != "gptq" or wanted.mixed:
        return run
    key = {
        "settings": asdict(wanted),
        "model": shards.digest(opened.folder),
        "version of billhook": cache.code_sha256(),
    }
    run_folder.claim(run.folder, key | {"types": repr(sorted(chosen.items()))}, run.fresh)
    return replace(run, finished=FinishedLayers(run.folder, opened.model))


def _tables(model: Any, wanted: Wanted, done: set[str]) -> dict[str, grids.Quantised]:
    """Codes of embedding and head; whatever else is a matrix becomes float16.  The model gets their values."""
    codes, modules = {}, dict(model.named_modules())
    for path, module in modules.items():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim < 2 or path in done:
            continue
        if stored_as(model, path, wanted.tables) == "Q8_0":
            codes[path] = grids.nearest(weight.data, GRIDS["Q8_0"])
            weight.data.copy_(codes[path].values())
        elif id(weight) not in {id(modules[other].weight) for other in codes}:
            weight.data.copy_(weight.data.half())
    return codes


def _accepted(opened: Opened, wanted: Wanted, mixed: Any, by: tuple[Tokens, Probe], run: Run) -> Any:
    """The mixed model, where it is nearer to the dense one than the best single type of no more bytes, on windows that
    nothing has seen; else that one."""
    found, tables, why = mixed
    calibration, probe = by
    name = smaller_uniform(opened.model, _limit(opened, wanted))
    own = probe.divergences_of(opened.model)
    why |= {"kl": sum(own) / len(own), "uniform": name, "uniform_kl": None, "taken": MIXED}
    if name is None:
        return opened, found, tables, why
    again = _opened(opened.name, run)
    every = {path: name for _, _, path in paths(again.model) if path in found.codes}
    plain = quantise(again.model, calibration, Quantizing(wanted.method, every, wanted.stream), run)
    plain_tables = _tables(again.model, wanted, set(plain.codes))
    theirs = probe.divergences_of(again.model)
    why["uniform_kl"] = sum(theirs) / len(theirs)
    if why["kl"] < why["uniform_kl"]:
        return opened, found, tables, why
    return again, plain, plain_tables, why | {"taken": name}


def _record(opened: Opened, wanted: Wanted, found: Found, why: Mapping[str, Any], text: Tokens) -> dict[str, Any]:
    """What billhook.json says."""
    before = (records.stored_cut(opened.folder) if opened.folder else None) or {}
    before = {key: value for key, value in before.items() if key != "loads"}  # that was the model before
    bits = sum(8 * one.bytes for one in found.codes.values())
    bits += sum(
        16 * found.codes[path].scales.numel() for path in _experts(opened.model) & found.codes.keys()
    )  # float32
    said = {
        **{key: value for key, value in asdict(wanted).items() if value not in ("", None)},
        "embedding": wanted.tables,
        "bits_per_weight": bits / sum(one.codes.numel() for one in found.codes.values()),
        "types": dict(Counter(one.grid.name for one in found.codes.values())),
        "tokens_sha256": hashlib.sha256(text.numpy().tobytes()).hexdigest(),
        "parent": opened.name,
        "choice": dict(why),
        "operators": [asdict(one) for one in found.records],
    }
    return {
        **before,
        "parent": before.get("parent") or opened.name,
        "model_type": opened.model.config.model_type,
        "layout": layout.layout_of(opened.model),
        "license": belongings.said_of(opened.folder, "license"),
        "quantized": said,
        "versions": records.versions(),
    }
