"""Sizes of a model: parameters, operations, entries of the KV cache."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.models import rotary
from billhook.models.axes import axes
from billhook.models.families import attention, experts_per_token, layers, linear, mixture, row_of, shape
from billhook.models.plan import Plan
from billhook.models.residual import parameters_saved


def decoder_parameters(model: PreTrainedModel) -> int:
    """Parameters of the decoder layers: embeddings, final norm and head excluded."""
    return sum(p.numel() for p in layers(model).parameters())


def parameters(model: PreTrainedModel) -> dict[str, int]:
    """All parameters, those of the decoder layers, and those of embeddings and head (a tied one counted once)."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    counts = {id(p): p.numel() for end in ends for p in end.parameters()}
    return {
        "parameters": total_parameters(model),
        "decoder_parameters": decoder_parameters(model),
        "embedding_parameters": sum(counts.values()),
    }


def macs_per_token(model: PreTrainedModel, context: int) -> int:
    """Multiply-accumulates of one token that attends to `context` others: every linear weight once, scores, values.

    Scores and values are left out where a derived row says nothing of attention.
    """
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    for axis in axes(model, ("experts",)):  # a token uses a few experts, but all rows of the router
        rows, hidden = model.get_parameter(axis.reader.param).shape
        experts: Any = mixture(model, axis.layer)
        weights = sum(p.numel() for name, p in experts.named_parameters() if "bias" not in name)
        counted = weights if isinstance(experts, nn.ModuleList) else 0  # fused experts are no linear modules
        linear += rows * hidden + experts_per_token(model) * weights // rows - counted
    heads = [attention(model, n) for n in range(len(layers(model)))] if row_of(model).attention else []
    return linear + context * sum(2 * layer.heads * layer.head_dim for layer in heads)


def total_parameters(model: PreTrainedModel) -> int:
    """Parameters of the whole model, a tied head counted once: as many as the checkpoint holds."""
    return sum(p.numel() for p in model.parameters())


def saved_by(model: PreTrainedModel, plan: Plan) -> int:
    """Parameters that a plan removes."""
    if plan.residual:
        return parameters_saved(model, plan.residual, plan.rotate)  # no method combines it with other cuts
    units = sum(plan.drops.get((axis.layer, axis.kind), 0) * axis.price(model) for axis in axes(model, plan.kinds))
    whole = sum(layer_parameters(model, n) for n in plan.layers)
    thin = sum(saved_by_rank(linear(model, path), rank) for path, rank in plan.ranks.items())
    return units + whole + thin + sum(rotary.saved(model, n, pairs) for n, pairs in plan.pairs.items())


def saved_by_rank(module: nn.Linear | Conv1D, rank: int) -> int:
    """Parameters that two thin modules of a rank, of which the second has a bias, save of a linear one."""
    outputs, inputs = shape(module)
    return sum(param.numel() for param in module.parameters()) - rank * (outputs + inputs) - outputs


def layer_parameters(model: PreTrainedModel, number: int) -> int:
    """Parameters of one decoder layer, norms included."""
    return sum(p.numel() for p in layers(model)[number].parameters())


def kv_cache_entries(model: PreTrainedModel, plan: Plan, context: int, batch: int) -> int:
    """Numbers in the KV cache after `plan`: keys and values of every position in every layer that stays.

    0 where a derived row says nothing of attention.
    """
    if not row_of(model).attention:
        return 0
    total, window = 0, getattr(model.config, "sliding_window", None)
    types = getattr(model.config, "layer_types", None) or ["sliding_attention"] * len(layers(model))
    for n in range(len(layers(model))):
        if n not in plan.layers:
            heads, positions = attention(model, n), context
            if window and types[n] == "sliding_attention":
                positions = min(context, window - 1)
            kv_heads = heads.kv_heads - plan.drops.get((n, "groups"), 0)
            entries = kv_heads * (heads.key_dim + heads.value_dim) - plan.drops.get((n, "value"), 0)
            entries -= rotary.gone(model, n, plan.pairs[n]) if n in plan.pairs else 0
            total += entries * positions * batch
    return total


def sizes(before: dict[str, int], after: dict[str, int], budget: str) -> dict[str, Any]:
    """Sizes before and after a cut, the budget asked for, and the two achieved ratios."""
    return {
        "before": before,
        "after": after,
        "budget": budget,
        "achieved_ratio": 1 - after["decoder_parameters"] / before["decoder_parameters"],
        "achieved_ratio_of_all": 1 - after["parameters"] / before["parameters"],
    }
