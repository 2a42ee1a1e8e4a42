"""From a share of the decoder to unit counts that a stock config can hold: the `uniform` layout."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from billhook.axes import Axis
from billhook.choose import Candidates, solve
from billhook.errors import BillhookError, one_of
from billhook.families import KINDS, axes, family_of, layers, sizes


def decoder_parameters(model: PreTrainedModel) -> int:
    """Parameters of the decoder layers: embeddings, final norm and head excluded."""
    return sum(p.numel() for p in layers(model).parameters())


def total_parameters(model: PreTrainedModel) -> int:
    """Parameters of the whole model, a tied head counted once: what the checkpoint holds."""
    return sum(p.numel() for p in model.parameters())


def anatomy(model: PreTrainedModel) -> dict[str, Any]:
    """What a model is made of and what each kind of axis could give up; weights are not needed."""
    decoder, rows = decoder_parameters(model), []
    for kind in KINDS:
        row: dict[str, Any] = {"axis": kind, "units": None, "parameters_per_unit": None, "share_of_decoder": None}
        try:
            check_kinds(model.config.model_type, (kind,))
            found = axes(model, (kind,))
            price = found[0].price(model)
            share = sum(axis.units for axis in found) * price / decoder
            row |= {"units": found[0].units, "parameters_per_unit": price, "share_of_decoder": share, "refused": None}
        except BillhookError as error:
            row["refused"] = str(error)
        rows.append(row)
    return {
        "model_type": model.config.model_type,
        "layers": len(layers(model)),
        "hidden_size": model.config.hidden_size,
        "tied_embeddings": bool(model.config.tie_word_embeddings),
        "parameters": total_parameters(model),
        "decoder_parameters": decoder,
        "axes": rows,
    }


def check_kinds(model_type: str, kinds: tuple[str, ...]) -> None:
    """Raise BillhookError unless the family can give up every one of `kinds` in the uniform layout."""
    check_names(kinds)
    row = family_of(model_type)
    if row.fixed_heads and {"heads", "groups"} & set(kinds):
        raise BillhookError(f"{model_type} cannot lose heads in a stock checkpoint: {row.fixed_heads}; use --axes ffn")


def check_names(kinds: tuple[str, ...]) -> None:
    """Raise BillhookError for axes that no family can give up together in the uniform layout."""
    if not kinds:
        raise BillhookError(f"no axis named: valid: {', '.join(KINDS)}")
    for kind in kinds:
        one_of("axis", kind, KINDS)
    if "value" in kinds:
        raise BillhookError(
            "axis 'value' (FASP's V/O channels) needs another attention shape than stock classes have, and comes with the "
            "per-layer layout: name others of ffn, heads, groups"
        )
    if {"heads", "groups"} <= set(kinds):
        raise BillhookError("axes 'heads' and 'groups' cut the same columns: name one of them")


def uniform_drops(model: PreTrainedModel, kinds: tuple[str, ...], ratio: float, multiple_of: int) -> dict[str, int]:
    """Units of each kind that every layer drops so that about `ratio` of the decoder's parameters go.

    Raises:
        BillhookError: an axis the family cannot hold, a ratio too large or too small, a width no multiple fits.
    """
    check_kinds(model.config.model_type, kinds)
    by_kind: dict[str, list[Axis]] = {kind: axes(model, (kind,)) for kind in kinds}
    candidates = [
        Candidates(
            kind, found[0].units, sum(axis.price(model) for axis in found), _allowed(model, found[0], multiple_of)
        )
        for kind, found in by_kind.items()
    ]
    return solve(candidates, ratio * decoder_parameters(model))


def _allowed(model: PreTrainedModel, axis: Axis, multiple_of: int) -> list[int]:
    """Counts that may go from every layer, ascending; 0 is always one, all units never."""
    if axis.kind == "ffn":
        drops = [0] + [d for d in range(1, axis.units) if (axis.units - d) % multiple_of == 0]
        if len(drops) == 1:
            raise BillhookError(
                f"--multiple-of {multiple_of}: no width below {axis.units} is a multiple of it: lower it"
            )
        return drops
    if axis.units == axis.blocks:
        raise BillhookError(f"each KV group of this model has one query head ({axis.units} in all): use --axes groups")
    return [d for d in range(0, axis.units, axis.blocks) if d == 0 or _holds(model, _heads_after(model, axis, d))]


def _heads_after(model: PreTrainedModel, axis: Axis, drop: int) -> dict[str, int]:
    keys, now = family_of(model.config.model_type).keys, sizes(model, 0)
    heads, kv_heads = now[keys["heads"]], now[keys["kv_heads"]]
    if axis.kind == "heads":
        return now | {keys["heads"]: heads - drop}
    return now | {keys["heads"]: heads - drop * (heads // kv_heads), keys["kv_heads"]: kv_heads - drop}


def _holds(model: PreTrainedModel, changes: Mapping[str, Any]) -> bool:
    """Whether the stock config class accepts these sizes (LlamaConfig wants hidden_size % heads == 0 since 5.4)."""
    try:
        type(model.config).from_dict({**model.config.to_dict(), **changes})
    except Exception:  # each transformers release raises its own validation errors
        return False
    return True
