"""How alike the attention maps of a layer's heads are, summed while the layer runs.

    alike = Alike("groups")
    with watched(attention_module(model, n), alike):
        run_layer(layers(model)[n], state, call)
    alike.mean  # for every two KV groups

No map of a whole window is ever there: attention goes through its queries block by block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from billhook.math.divergence import jensen_shannon
from billhook.models.families import row_of
from billhook.tensors import Pairs

NAME = "billhook_maps"  # of the attention function, while a layer is watched
QUERIES = 64  # rows of a map at a time


class Alike:
    """Jensen-Shannon divergences of attention maps, summed over windows and queries.

    The first query of a window is left out: it has one key, and all maps are equal there.

    Args:
        kind: `heads` compares query heads of one KV group, as blocks; `groups` compares KV groups, head by head.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.total, self.rows = kind, torch.zeros(()), 0

    @property
    def mean(self) -> Pairs:
        """D, in nats."""
        return self.total / self.rows

    def add(self, maps: Tensor) -> None:
        """Maps (windows, KV heads, heads of one, queries, keys)."""
        by_head = maps.permute(1, 2, 0, 3, 4)
        of_units = by_head.flatten(2, 3) if self.kind == "heads" else by_head.flatten(1, 3).unsqueeze(0)
        self.total, self.rows = jensen_shannon(of_units) + self.total.to(of_units.device), self.rows + of_units.shape[2]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attention as transformers asks for it: (windows, queries, heads, value channels), without dropout."""
        length, scale = query.shape[2], query.shape[-1] ** -0.5 if scaling is None else scaling
        queries, keys = query.unflatten(1, (key.shape[1], -1)).float(), key.float().mT.unsqueeze(2)
        outputs = []
        for rows in torch.arange(length, device=query.device).split(QUERIES):
            logits = queries[..., rows, :] @ keys * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            maps = _masked(logits, attention_mask, rows).softmax(-1)
            outputs.append(maps.to(value.dtype) @ value.unsqueeze(2))
            self.add(maps[..., int(rows[0] == 0) :, :])
        return torch.cat(outputs, -2).flatten(1, 2).transpose(1, 2).contiguous(), None


def _masked(logits: Tensor, mask: Tensor | None, rows: Tensor) -> Tensor:
    """Logits of the queries `rows` (windows, KV heads, heads of one, queries, keys), and what they may not see."""
    if mask is None:  # as every function of transformers has it: causal
        return logits.masked_fill(torch.arange(logits.shape[-1], device=rows.device) > rows.unsqueeze(1), -torch.inf)
    mask = mask.unsqueeze(2)[..., rows, : logits.shape[-1]]
    return logits.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else logits + mask


@contextmanager
def watched(attention: nn.Module, alike: Alike) -> Iterator[None]:
    """While open, the maps of an attention module are added to `alike`; of the layers, only its own may run."""
    config: Any = attention.config
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = alike.attend
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[NAME]


def why_unseen(model: PreTrainedModel) -> str:
    """Why the attention of a family cannot be watched, or ''."""
    if row_of(model).sinks:
        return f"{model.config.model_type} has attention sinks, which take a part of every map: use --method fasp"
    if getattr(model, "_supports_attention_backend", False):
        return ""
    return (
        f"{model.config.model_type} computes attention in its own way, so that no maps of its heads can be compared: use "
        "--axes ffn, or --method fasp"
    )
