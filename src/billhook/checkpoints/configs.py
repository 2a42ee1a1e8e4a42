"""Checks of config.json that transformers does not make: impossible values, and layers that have no tensors.

A class of transformers checks the types of what it declares.  But it builds any number of layers, and takes sizes below
zero, and settings of other families, which its code reads all the same.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from billhook.errors import ModelError
from billhook.models.families import family_of
from billhook.runtime.documents import typed

Size = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
LAYERS = ("num_hidden_layers", "n_layer")
KINDS: dict[Any, tuple[str, ...]] = {  # types, and the keys that have them where they are given
    Size: (
        *("hidden_size", "n_embd", "vocab_size", "max_position_embeddings", "n_positions", "word_embed_proj_dim"),
        *("num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads", "head_dim"),
        *("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
        *("moe_intermediate_size", "shared_expert_intermediate_size", "num_experts", "num_local_experts"),
        *("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "decoder_sparse_step"),
        *("no_rope_layer_interval", "original_max_position_embeddings"),
    ),
    Count: (*LAYERS, "sliding_window", "max_window_layers", "first_k_dense_replace", "n_shared_experts"),
    Positive: (
        *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "query_pre_attn_scalar"),
        *("logits_scaling", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"),
    ),
    Finite: ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "routed_scaling_factor"),
    Share: ("partial_rotary_factor", "rotary_pct"),
    list[str] | str: ("architectures",),
    str: ("dtype", "torch_dtype"),
    dict[str, Any]: ("auto_map",),
}
KNOWN: dict[str, Any] = {key: (kind | None, None) for kind, keys in KINDS.items() for key in keys}
Config: type[BaseModel] = create_model("Config", __config__=ConfigDict(strict=True), **KNOWN)
Rotary = create_model(
    "Rotary", __config__=ConfigDict(strict=True), partial_rotary_factor=KNOWN["partial_rotary_factor"]
)
MEND = "correct it, or fetch or copy the model again"


def check_values(config: dict[str, Any], name: str) -> None:
    """Refuse a value that no model could have.

    Args:
        config: what config.json holds.
        name: the model's name, for messages.

    Raises:
        BillhookError: names the key.
    """
    what = f"{name}: config.json"
    typed(Config, config, what, MEND)
    for key in ("rope_parameters", "rope_scaling"):
        value, groups = config.get(key), {}
        if isinstance(value, dict):  # one group for all layers, or one for each kind of layer
            groups = {key: value} | {f"{key}.{kind}": group for kind, group in value.items()}
        for place, group in groups.items():
            if isinstance(group, dict):
                typed(Rotary, group, f"{what}: {place}", MEND)


def check_layers(config: dict[str, Any], stored: Iterable[str], name: str) -> None:
    """Refuse a config with more layers than the tensors have, which would take long to build.

    Args:
        stored: names of the tensors.

    Raises:
        BillhookError: names the key.
    """
    prefix = family_of(config.get("model_type")).layers.rpartition(".")[2]
    numbered = re.compile(rf"(?:^|\.){prefix}\.(\d{{1,9}})\.")
    count = 1 + max((int(match[1]) for key in stored if (match := numbered.search(key))), default=-1)
    for key in LAYERS:
        if (claimed := config.get(key) or 0) > count:
            raise ModelError(
                f"{name}: config.json: {key} is {claimed:,}, and the weights are of {count:,} layers: {MEND}"
            )
