"""Families whose layers cannot differ: mixtures of experts, and hybrids of attention and something else.

Their checkpoints are stock ones alone, so that these rows do not travel with any (billhook.models.modeling_per_layer).
"""

from dataclasses import replace
from typing import Any

from billhook.models.modeling_per_layer import ALL_HEADS, JOINT_NORM, MIXED, Family, Refusal, named

ONE_WIDTH = Refusal(
    ("expert_ffn", "shared"), "its config has one width for the experts and the one that every token goes to"
)
LATENT = Refusal(
    (*ALL_HEADS, "value"),
    "its keys and values come from one latent (MLA), of which no row speaks: no axis is of it yet",
)
MIXERS = (  # what Nemotron-H's layers of attention and of Mamba multiply by, and its mixtures before and after
    *("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "conv1d", "out_proj"),
    *("fc1_latent_proj", "fc2_latent_proj"),
)
BESIDE_EXPERTS = Refusal(MIXED, "its experts stand beside an FFN that every token goes to, and only that is an axis")

SIZES_BY_LAYER = Refusal(
    (*ALL_HEADS, "value"), "its attention has other sizes in some of its layers: no axis is of it yet"
)
DOUBLE = Refusal(
    ("ffn",), "its FFNs are twice as wide where keys and values are shared, which one key says", "use_double_wide_mlp"
)


def _hybrid(beside: str, what: str, *others: Refusal) -> dict[str, Any]:
    """Attention in some layers, in the others the module `beside`, which is `what` the user is told."""
    why = f"attention in some of its layers, {what} in the others: no axis is of either yet"
    refusals = (Refusal((*ALL_HEADS, "value"), why), *others)
    return {"attention": "", "beside": ("self_attn", beside), "counters": {}, "refusals": refusals}


DELTA_NET = _hybrid("linear_attn", "a gated delta net")


def _mixture(
    name: str,
    experts: str,
    width: str,
    *,
    dense: bool = False,
    shared: bool = False,
    grouped: bool = False,
    **other: Any,
) -> Family:
    """A mixture of experts, under the config keys `experts` and `width`.

    `dense`: with layers that have a plain FFN; `shared`: with an expert for every token, of a width of its own;
    `grouped`: whose router chooses groups of experts first.
    """
    keys = {
        "experts": experts,
        "expert_width": width,
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
    }
    keys |= {"head_dim": "head_dim", "top_k": "num_experts_per_tok"} | ({"width": "intermediate_size"} if dense else {})
    keys |= {"shared_width": "shared_expert_intermediate_size"} if shared else {}
    keys |= {"groups": "n_group", "top_groups": "topk_group"} if grouped else {}
    own: dict[str, Any] = {
        "experts": "mlp.experts",
        "router": "mlp.gate",
        "shared": "mlp.shared_expert" if shared else "",
    }
    return Family(named(name), keys=keys, **(own | other))


def _latent(name: str, bias: str = "e_score_correction_bias") -> Family:
    """A mixture of experts beside attention whose keys and values come from one latent."""
    mixture = _mixture(name, "n_routed_experts", "moe_intermediate_size", dense=True, grouped=True, bias=bias)
    attention: dict[str, Any] = {"attention": "", "beside": ("self_attn",), "refusals": (ONE_WIDTH, LATENT)}
    return replace(mixture, shared="mlp.shared_experts", **attention)


STOCK_FAMILIES: dict[str, Family] = {
    "mixtral": _mixture("Mixtral", "num_local_experts", "intermediate_size"),
    "qwen2_moe": _mixture("Qwen2Moe", "num_experts", "moe_intermediate_size", dense=True, shared=True),
    "qwen3_moe": _mixture("Qwen3Moe", "num_experts", "moe_intermediate_size", dense=True),
    "glm4_moe": replace(
        _mixture(
            "Glm4Moe", "n_routed_experts", "moe_intermediate_size", dense=True, grouped=True, refusals=(ONE_WIDTH,)
        ),
        shared="mlp.shared_experts",
        bias="e_score_correction_bias",
    ),
    "olmoe": _mixture("Olmoe", "num_experts", "intermediate_size", refusals=(JOINT_NORM,)),
    "deepseek_v2": _latent("DeepseekV2", bias=""),
    "deepseek_v3": _latent("DeepseekV3"),
    "glm4_moe_lite": _latent("Glm4MoeLite"),
    "gpt_oss": _mixture(
        "GptOss", "num_local_experts", "intermediate_size", router="mlp.router", bias="bias", sinks="sinks"
    ),
    "qwen3_next": _mixture("Qwen3Next", "num_experts", "moe_intermediate_size", dense=True, shared=True, **DELTA_NET),
    "qwen3_5_moe_text": replace(
        _mixture("Qwen3_5Moe", "num_experts", "moe_intermediate_size", shared=True, **DELTA_NET),
        classes=("Qwen3_5MoeTextConfig", "Qwen3_5MoeTextModel", "Qwen3_5MoeForCausalLM"),
    ),
    "qwen3_5_text": Family(
        ("Qwen3_5TextConfig", "Qwen3_5TextModel", "Qwen3_5ForCausalLM"),
        keys={"width": "intermediate_size"},
        **DELTA_NET,
    ),
    "gemma4_text": Family(
        ("Gemma4TextConfig", "Gemma4TextModel", "Gemma4ForCausalLM"),
        attention="",
        beside=("self_attn", "per_layer_input_gate", "per_layer_projection", "router", "experts"),
        keys={"width": "intermediate_size"},
        counters={},
        as_is=False,
        by_layer=(("model.embed_tokens_per_layer.weight", 1), ("model.per_layer_model_projection.weight", 0)),
        uneven=True,
        refusals=(SIZES_BY_LAYER, DOUBLE, replace(BESIDE_EXPERTS, key="enable_moe_block")),
    ),
    "lfm2": Family(
        named("Lfm2"),
        up=("feed_forward.w1", "feed_forward.w3"),
        down="feed_forward.w2",
        keys={"width": "intermediate_size"},
        settled={"block_auto_adjust_ff_dim": False},
        **_hybrid("conv", "a short convolution"),
    ),
    "nemotron_h": replace(
        Family(
            named("NemotronH"),
            up=("mixer.up_proj",),
            down="mixer.down_proj",
            experts="mixer.experts",
            router="mixer.gate",
            shared="mixer.shared_experts",
            expert=("up_proj", "down_proj"),
            bare=True,
            bias="e_score_correction_bias",
            keys={
                **{"width": "intermediate_size", "experts": "n_routed_experts"},
                **{"expert_width": "moe_intermediate_size", "shared_width": "moe_shared_expert_intermediate_size"},
                **{"top_k": "num_experts_per_tok", "groups": "n_group", "top_groups": "topk_group"},
            },
            **_hybrid("mixer", "Mamba or an FFN"),
        ),
        beside=tuple(f"mixer.{name}" for name in MIXERS),
    ),
    "granitemoehybrid": replace(
        Family(
            named("GraniteMoeHybrid"),
            up=("shared_mlp.input_linear",),
            stacked=True,
            down="shared_mlp.output_linear",
            keys={"width": "shared_intermediate_size"},
            as_is=("residual_multiplier", 1.0),
            **_hybrid("mamba", "Mamba", BESIDE_EXPERTS),
        ),
        beside=("self_attn", "mamba", "block_sparse_moe"),
    ),
}
