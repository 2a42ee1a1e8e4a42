"""The pruned checkpoint that a recovery trains: what must be known of it, what is refused, the model ready to train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from billhook.checkpoints import compressed, load
from billhook.choices import BITS
from billhook.errors import BillhookError
from billhook.math import sparsity
from billhook.math.grids import GRIDS
from billhook.math.pattern import parse
from billhook.models.families import layers, mixture, narrow_heads
from billhook.models.modes import noise
from billhook.models.multimodal import within
from billhook.recovery.settings import Recovery
from billhook.reports import records
from billhook.runtime import cache
from billhook.runtime.precision import autocast_dtype, computing
from billhook.tensors import Tokens
from billhook.training import keep_zeros, moving_masks, on_levels
from billhook.training.trainables import KEEPING_ZEROS, TRAINERS, Seam, begin_at

UNMASKED = {"lora", "spp"}  # trainable sets whose form fills no zero; for all others the steps are masked
LEVELS_SHARE = 0.25  # share of zeros from which a model of packed integers is sparse: four bits alone make a tenth


@dataclass(frozen=True)
class Student:
    """What must be known of the pruned checkpoint, with no model in it."""

    name: str
    folder: Path | None
    tokenizer: Any
    dtype: torch.dtype  # of what is written
    vocabulary: int  # how many tokens it predicts
    sha256: str  # digest of its weights and config
    record: dict[str, Any] | None  # its billhook.json
    census: keep_zeros.Census  # how many of its weights are zero
    noise: dict[str, float]  # dropout and other noise that its config asks for
    packed: bool = False  # whether its folder holds packed integers

    @property
    def seam(self) -> Seam | None:
        """Where layers were dropped, if any were and the record says so."""
        record = self.record or {}
        if not record.get("dropped_layers"):
            return None
        return Seam(record["kept_layers"], len(record["kept_layers"]) + len(record["dropped_layers"]))


def known(opened: load.Opened, chosen: Recovery) -> Student:
    """What must be known of a checkpoint.

    Raises:
        BillhookError: it cannot be trained as `chosen` says.
    """
    student = Student(
        name=opened.name,
        folder=opened.folder,
        tokenizer=opened.tokenizer,
        dtype=torch.float32 if chosen.bits else opened.dtype,  # no half precision holds a level times its scale
        vocabulary=opened.model.config.vocab_size,
        sha256=cache.model_sha256(opened.model),
        record=records.stored_cut(opened.folder),
        census=keep_zeros.census(opened.model),
        noise=noise(opened.model.config),
        packed=opened.folder is not None and compressed.is_compressed(opened.folder),
    )
    if chosen.masks:
        moving_masks.check(opened.model, parse(chosen.pattern))
    if chosen.merge:
        _check_zeros(student, chosen)
    else:
        _check_base(opened, chosen)
    if chosen.bits:
        on_levels.check(opened.model)
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            raise BillhookError("--bits scales whole weights, which FSDP cuts up: launch without --use_fsdp")
    if chosen.states == "on" and (student.record or {}).get("residual"):
        raise BillhookError(
            f"--states on compares hidden states channel by channel, and {opened.name} has other channels than what it "
            "was cut from: leave it out"
        )
    if chosen.trainable in ("seam", "lora"):
        _makers(chosen)[chosen.trainable](opened.model, student.seam, chosen.rank)  # refuses now what cannot be trained
    return student


def input_norms(student: Student, chosen: Recovery, windows: Tokens, device: torch.device) -> dict[str, torch.Tensor]:
    """The norms of what enters the student's linear weights on `windows`, as it was pruned."""
    model = load.open_model(student.name, device=str(device), dtype="float32").model
    with computing(device, autocast_dtype(chosen.precision, device)):
        return moving_masks.input_norms(model, windows)


def trainable(student: Student, chosen: Recovery, norms: dict[str, torch.Tensor] | None = None) -> Any:
    """The student as it was pruned, ready to train.

    Args:
        norms: of `input_norms`, where masks are scored by them.
    """
    model = load.open_model(student.name, device="cpu", dtype="float32", packed=chosen.opens_packed).model
    with torch.random.fork_rng():  # adapters are drawn alike in every process, and when a run goes on
        torch.manual_seed(chosen.seed)
        made = _makers(chosen)[chosen.trainable](model, student.seam, chosen.rank)
        if chosen.loftq:
            begin_at(made, load.open_model(chosen.loftq, device="cpu", dtype="float32").model)
        if chosen.bits:
            on_levels.train_on_levels(made, GRIDS[BITS[chosen.bits]], chosen.scales == "module")
        if chosen.masks:
            moving_masks.train_with_moving_masks(made, parse(chosen.pattern), norms)
        if chosen.contrast:
            on_levels.add_projection(made)
        return made


def _makers(chosen: Recovery) -> dict[str, Any]:
    return KEEPING_ZEROS if chosen.keep_zeros else TRAINERS


def _check_base(opened: load.Opened, chosen: Recovery) -> None:
    """Refuse a base that no adapter could name, or whose adapters are not peft's."""
    if opened.folder is None:
        raise BillhookError(f"--no-merge: {opened.name} is no folder, which an adapter names as its base: merge them")
    if within(opened.model):
        raise BillhookError(
            f"--no-merge: {opened.name} is multimodal, and its layers have other names there: merge them"
        )
    if any(mixture(opened.model, n) is not None for n in range(len(layers(opened.model)))):
        raise BillhookError(
            f"--no-merge: {opened.name} is a mixture of experts, whose adapters are not peft's: merge them"
        )
    if narrow := narrow_heads(opened.model):
        raise BillhookError(
            f"--no-merge: layer {narrow[0]} of {opened.name} has narrower heads, whose adapters are not peft's: merge them"
        )
    if chosen.loftq:
        given = {name: param.shape for name, param in load.open_skeleton(chosen.loftq).named_parameters()}
        own = opened.model.named_parameters()
        if off := next((name for name, param in own if given.get(name) != param.shape), ""):
            raise BillhookError(f"--loftq {chosen.loftq}: {off} has another shape: name the model that was quantised")


def _check_zeros(student: Student, chosen: Recovery) -> None:
    """Refuse to fill the zeros of a sparse model unasked, and to keep those of a dense one."""
    census = student.census
    if chosen.keep_zeros and not census.total:
        raise BillhookError(
            f"--keep-zeros: {student.name} has no exact zero in the linear weights of its decoder layers, nothing to "
            "keep: leave it out"
        )
    if (chosen.keeps_zeros or chosen.masks) and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise BillhookError("zeros are kept in whole weights, which FSDP cuts up: launch without --use_fsdp")
    least = LEVELS_SHARE if student.packed else sparsity.SPARSE_SHARE
    if chosen.keep_zeros is None and not (chosen.keeps_zeros or chosen.masks) and census.share >= least:
        raise BillhookError(
            f"{census.share:.0%} of the decoder's linear weights of {student.name} are exactly zero, and training "
            "would fill them: give --keep-zeros to keep every one, or --no-keep-zeros to let them go"
        )
