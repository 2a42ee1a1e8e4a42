"""Proof of a derived row, on a small random model of the same config class: only what holds is offered.

For every kind: removing units equals zeroing what reads them, and dropping a layer equals skipping it; the saved model,
loaded by the stock class, has the same logits; generation with a cache equals generation without; of the config only
the expected keys changed.  Of whole experts the first is not asked: without one, a router chooses among the others.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from billhook.errors import BillhookError, ModelError, first_line
from billhook.models import families, given, layout, patterns, surgery
from billhook.models.axes import axes
from billhook.models.derive import built, derived
from billhook.models.experts import fuse, unfuse
from billhook.models.modeling_per_layer import Family, Refusal
from billhook.models.shrink import shrunk
from billhook.runtime.quiet import quiet_transformers

WIDTHS = ("ffn", "expert_ffn", "shared")
KINDS = (*WIDTHS, "experts", "layers")
KEYS = {"ffn": "width", "expert_ffn": "expert_width", "shared": "shared_width", "experts": "experts"}
LAWS = (
    "removing units equals silencing them (not asked of whole experts), the saved model loads in its stock class with "
    "equal logits, generation with a cache equals generation without, only the expected config keys change"
)
CLOSE = 1e-4  # relative, and absolute
PLAIN = (surgery.PLAIN_LAYERS, *patterns.DENSE_FIRST, surgery.PLAIN_STEP, "num_hidden_layers")
_proved: dict[str, Family | str] = {}  # by config: the row, or why there is none


class Unproved(Exception):
    """A law does not hold."""


def ensure(content: dict[str, Any]) -> None:
    """Derive and prove the row of a config.json's model type, unless it has one by hand; kept for the process.

    Raises:
        BillhookError: nothing can be cut, and why; or a model of that type with another structure is open already.
    """
    kind = content.get("model_type")
    if not isinstance(kind, str) or families.stock_type(kind) in families.KNOWN or kind not in CONFIG_MAPPING:
        return
    if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    key = f"{given.ROWS.get(kind)} {json.dumps(content, sort_keys=True, default=str)}"
    if key not in _proved:
        try:
            with quiet_transformers(), torch.random.fork_rng(devices=[]):
                _proved[key] = proved(CONFIG_MAPPING[kind].from_dict(content))
        except BillhookError as error:
            _proved[key] = str(error)
        except Exception as error:  # what a class of transformers raises on a small config
            _proved[key] = f"no small model of it can be tried ({type(error).__name__}: {first_line(error)})"
    row = _proved[key]
    if isinstance(row, str):
        if kind in given.ROWS:
            raise ModelError(f"the row given for {kind!r} cannot be used: {row} (docs/adding-a-family.md)")
        raise ModelError(f"model family {kind!r} has no row, and none can be derived: {row} (docs/adding-a-family.md)")
    if kind in given.ROWS:
        families.DERIVED[kind] = row
    elif families.DERIVED.setdefault(kind, row) != row:
        raise ModelError(
            f"a model of type {kind!r} with another structure is open: use a process of its own for this one"
        )


def proved(config: PreTrainedConfig) -> Family:
    """The row of a config, derived or given, with a refusal for all that does not hold.

    Raises:
        BillhookError: the type is no plain decoder, or nothing holds.
    """
    if "is_decoder" in config.to_dict() and not config.is_decoder:
        raise ModelError("it is an encoder, which generates nothing unless its config says is_decoder")
    small, kind = shrunk(config), config.model_type
    before = families.DERIVED.get(kind)
    try:
        row = _given(small) if kind in given.ROWS else _tried(small, derived(small))
    except Unproved:  # its experts compute otherwise than two gated matrices and one that reads them
        row = _tried(small, derived(small, fused=False))
    finally:
        families.DERIVED.pop(kind, None)
        if before is not None:
            families.DERIVED[kind] = before
    if not offered(row):
        raise ModelError("; ".join(f"{', '.join(refusal.kinds)}: {refusal.why}" for refusal in row.refusals[1:]))
    return row


def _given(small: PreTrainedConfig) -> Family:
    try:
        return _tried(small, given.family(given.ROWS[small.model_type], small))
    except Unproved:
        raise ModelError("its experts compute otherwise than two gated matrices and one that reads them") from None


def _tried(config: PreTrainedConfig, row: Family) -> Family:
    """The row with a refusal for every kind whose laws do not hold."""
    families.DERIVED[config.model_type] = row
    torch.manual_seed(0)
    model = _random(config)
    whole = _logits(model)
    row = replace(row, tuples=_returns_tuples(model, row))
    families.DERIVED[config.model_type] = row
    if not torch.isfinite(whole).all():
        raise ModelError("a small random model of it has no finite logits")
    try:
        unfuse(model)
        changed = _far(_logits(model), whole)
    except Exception as error:  # of the class's own code, where it calls its experts in another way
        raise Unproved from error
    if changed:
        raise Unproved
    for law in KINDS:
        if any(law in refusal.kinds for refusal in row.refusals) or (law != "layers" and not axes(model, (law,))):
            continue
        if why := _why_not(model, law):
            row = replace(row, refusals=(*row.refusals, Refusal((law,), why)))
    return row


def offered(row: Family) -> tuple[str, ...]:
    """Kinds that a derived row was proved on."""
    refused = {kind for refusal in row.refusals for kind in refusal.kinds}
    has = {"ffn": "width", "experts": "experts", "expert_ffn": "expert_width", "shared": "shared_width"}
    return tuple(kind for kind in KINDS if kind not in refused and (kind == "layers" or has[kind] in row.keys))


def told(row: Family, model_type: str) -> dict[str, Any]:
    """A row as plain data: whose it is, the places and keys that it names, what was proved, and why not the rest."""
    if not row.derived:
        return {"by": "hand"}
    places = ("layers", "up", "down", "experts", "router", "shared", "bias")
    return {
        "by": "file" if model_type in given.ROWS else "derivation",
        "places": {name: value for name in places if (value := getattr(row, name))},
        "keys": dict(row.keys),
        "proved": list(offered(row)),
        "laws": LAWS,
        "refused": {", ".join(refusal.kinds): refusal.why for refusal in row.refusals},
    }


def _random(config: PreTrainedConfig) -> PreTrainedModel:
    """A model far from linear, whose biases and norms are random, too, so that a forgotten one shows."""
    model = built(config, "cpu").float()
    for name, param in model.named_parameters():
        if param.ndim == 1:
            noise = torch.randn_like(param) * 0.1
            param.data = param.data + noise
        elif "norm" not in name:
            param.data = torch.randn_like(param) * 1.5 / param.shape[-1] ** 0.5
    if model.generation_config is not None:
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
    return model


def _ids() -> torch.Tensor:
    return torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    return model(_ids(), use_cache=False).logits


def _far(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape != other.shape or not torch.allclose(one, other, rtol=CLOSE, atol=CLOSE)


def _returns_tuples(model: PreTrainedModel, row: Family) -> bool:
    seen: list[bool] = []
    hook = model.get_submodule(row.layers)[0].register_forward_hook(  # type: ignore[index]
        lambda module, args, output: seen.append(isinstance(output, tuple))
    )
    _logits(model)
    hook.remove()
    return bool(seen and seen[0])


def _why_not(model: PreTrainedModel, kind: str) -> str:
    """The law that does not hold for a kind, or ''."""
    trials: list[Callable[[PreTrainedModel], torch.Tensor | None]]
    if kind == "layers":
        types = getattr(model.config, "layer_types", None) or [""] * len(families.layers(model))
        numbers = [n for n, kind in enumerate(types) if types.count(kind) > 1]  # one of each kind has to stay
        trials = [lambda cut, n=n: _drop_layer(cut, n) for n in numbers]
    else:
        trials = [lambda cut: _cut(cut, kind)]
    for trial in trials:
        cut = copy.deepcopy(model)
        try:
            expected = trial(cut)
            _holds_as_stock(cut, kind, expected, model)
        except Unproved as broken:
            return str(broken)
        except BillhookError as error:
            return str(error)
        except Exception as error:  # of the model's own code, on sizes that it does not take
            return f"its class does not run once they are cut ({type(error).__name__}: {first_line(error)})"
    return ""


def _cut(cut: PreTrainedModel, kind: str) -> torch.Tensor | None:
    """Remove units in place; the logits to be expected, where zeros can say them."""
    silent, drops = copy.deepcopy(cut), {}
    for axis in axes(cut, (kind,)):
        if kind == "experts":
            per_block = axis.units // axis.blocks
            drops[axis] = torch.arange(axis.blocks) * per_block + 1
            if per_block < 3:
                raise Unproved("its router needs all the experts of a group")
        else:
            drops[axis] = torch.arange(STEP_OF[kind]) * 2 + 1
    for axis, drop in drops.items():
        if kind != "experts":
            surgery.zero(silent, axis, drop)
        surgery.remove(cut, axis, drop)
    expected = None if kind == "experts" else _logits(silent)
    got = _logits(cut)
    if expected is not None and _far(got, expected):
        raise Unproved("a model without them computes otherwise than one in which they are silent")
    layout.update_config(cut)
    return got


STEP_OF = {"ffn": 16, "expert_ffn": 8, "shared": 8}  # units that the proof removes from each FFN


def _drop_layer(cut: PreTrainedModel, number: int) -> torch.Tensor:
    with surgery.without(cut, [], [number]):
        skipped = _logits(cut)
    surgery.drop_layers(cut, [number])
    if _far(_logits(cut), skipped):
        raise Unproved(f"a model without layer {number} computes otherwise than one that skips it")
    return skipped


def _holds_as_stock(cut: PreTrainedModel, kind: str, expected: torch.Tensor | None, whole: PreTrainedModel) -> None:
    row = families.row_of(cut)
    fuse(cut)
    allowed = {row.keys[KEYS[kind]]} if kind in KEYS else {*PLAIN, *patterns.kept(whole.config, [])}
    allowed |= {cut.config.attribute_map.get(key, key) for key in allowed}
    before, after = whole.config.to_dict(), cut.config.to_dict()
    if changed := sorted(key for key in after if after[key] != before.get(key) and key not in allowed):
        raise Unproved(f"its config changes otherwise than in what was cut ({changed[0]})")
    with tempfile.TemporaryDirectory() as folder:
        cut.save_pretrained(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    stock, report = loaded
    if wrong := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise Unproved(f"the config cannot say it: the stock class then finds other tensors ({wrong[0]})")
    stock.eval()
    if expected is not None and _far(_logits(stock), expected):
        raise Unproved("the config cannot say it: the stock class then computes otherwise")
    if stock.can_generate():
        one, other = (_generated(stock, cache) for cache in (True, False))
        if not torch.equal(one, other):
            raise Unproved("generation with a cache differs from generation without")


@torch.no_grad()
def _generated(model: PreTrainedModel, cache: bool) -> torch.Tensor:
    return model.generate(_ids(), max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0)  # type: ignore[operator]
