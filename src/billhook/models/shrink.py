"""A small config of the same class: the sizes shrunk, the structure kept.

A row that is derived is proved on a random model of such a config, in seconds (billhook.models.proof).
"""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from billhook.models import patterns

TOP_K = (  # config keys that say how many experts each token goes to
    *("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "num_experts_per_token"),
)
LAYERS = 4  # where all are of one kind; else two of each kind, and at least so many
HEADS = 4
HIDDEN, WIDTH, EXPERT_WIDTH, EXPERTS = 64, 112, 40, 8
SMALL: Mapping[str, int] = {  # config key -> its value; keys that a config lacks are left out
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "ngram_vocab_size"), 258),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "d_head", "kv_channels", "query_pre_attn_scalar"), 16),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "d_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"), WIDTH
    ),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "expert_dim"), EXPERT_WIDTH),
    **dict.fromkeys(
        ("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"), 48
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(TOP_K, 2),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    "topk_group": 1,
    **dict.fromkeys(patterns.DENSE_FIRST, 1),
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "rotary_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,  # more than the proof's text: among equal scores a choice would be of chance
    "attention_hidden_size": 2 * HIDDEN,
    "attention_head_dim": 2 * HIDDEN // HEADS,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "layer_group_size": 2,
    "expand": 1,
    "n_groups": 2,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_state": 8,
    "mamba_num_heads": 8,
    "mamba_n_heads": 8,
    "n_mamba_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_dt_rank": 4,
    "ssm_state_size": 8,
    "lru_width": HIDDEN,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "block_auto_adjust_ff_dim": False,
}
AT_MOST = (*TOP_K, *patterns.DENSE_FIRST, "n_group", "num_expert_group")  # never more than the model has
UNSAID = (
    "n_inner",
    "head_dim",
    "num_key_value_heads",
    "intermediate_size",
)  # sizes that a config may leave to its class
COUNT = ("n_layer", "n_layers", "num_layers")  # what some classes call the number of layers
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the same class whose model has a few hundred thousand parameters."""
    values = config.to_dict()
    small = {key: size for key, size in SMALL.items() if type(values.get(key)) is int}
    small |= {key: min(SMALL[key], values[key]) for key in AT_MOST if key in small}
    small |= {key: SMALL[key] for key in UNSAID if key in values and values[key] is None}
    if "num_key_value_heads" in small and values["num_key_value_heads"] == getattr(config, "num_attention_heads", None):
        small["num_key_value_heads"] = HEADS
    if "qk_rope_head_dim" in small and "head_dim" in small and values["head_dim"] == values["qk_rope_head_dim"]:
        small["head_dim"] = small["qk_rope_head_dim"]
    numbers = _sample(patterns.kinds(config))
    count = next((key for key in COUNT if key in values), "num_hidden_layers")
    small |= {count: len(numbers)}
    small |= {
        key: [_list_size(key.removesuffix("_per_layer"), value) for value in kept]
        for key, kept in patterns.kept(config, numbers).items()
    }
    small |= dict.fromkeys((key for key in TOKENS if key in values), 0)
    plain = {key: value for key, value in values.items() if key not in ("quantization_config", "auto_map", "dtype")}
    return type(config).from_dict(plain | small)


def _list_size(key: str, value: Any) -> Any:
    return SMALL.get(key, value) if isinstance(value, int) and value > LAYERS else value


def _sample(kinds: list[Any]) -> list[int]:
    """Numbers of layers, ascending: two of each kind, as far as there are two, and LAYERS at least."""
    seen: dict[str, int] = {}
    chosen: list[int] = []
    for n, kind in enumerate(kinds):
        seen[str(kind)] = seen.get(str(kind), 0) + 1
        if seen[str(kind)] <= 2:
            chosen.append(n)
    others = [n for n in range(len(kinds)) if n not in chosen]
    return sorted(chosen + others[: max(0, LAYERS - len(chosen))])


def default(model_type: str, **settings: Any) -> PreTrainedConfig:
    """The default config of a model type, but for some settings."""
    return AutoConfig.for_model(model_type, **settings)
