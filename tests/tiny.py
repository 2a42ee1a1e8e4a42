"""Tiny random models of every family, built from configs, and a byte tokenizer: nothing is fetched."""

import copy
import string
from functools import cache
from typing import Any

import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from billhook.methods import METHODS
from billhook.models.families import FAMILIES

ZEROS = tuple(name for name, method in METHODS.items() if method.zeros)  # methods that make zeros
SHAPE = dict(
    vocab_size=258, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, bos_token_id=256, eos_token_id=257
)
GATED = dict(intermediate_size=48, num_key_value_heads=2, max_position_embeddings=128)
MIXED = dict(num_experts_per_tok=2)
QWEN_MOE = dict(num_experts=6, moe_intermediate_size=16)
DELTA = dict(
    layer_types=["linear_attention", "full_attention", "full_attention"],
    head_dim=16,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA4 = dict(
    head_dim=8,
    global_head_dim=16,
    sliding_window=8,
    hidden_size_per_layer_input=4,
    vocab_size_per_layer_input=258,
    pad_token_id=0,
)
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LATENT = dict(
    **{**GATED, "num_key_value_heads": 4},
    **MIXED,
    moe_intermediate_size=16,
    n_shared_experts=2,
    first_k_dense_replace=1,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    pad_token_id=0,
)
NEMOTRON = dict(
    **MIXED,
    head_dim=8,
    n_routed_experts=8,
    n_group=2,
    topk_group=1,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=24,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    chunk_size=8,
    pad_token_id=0,
)
WIDE = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}  # GPT-2's words
CONFIGS: dict[str, Any] = {
    "llama": lambda **other: T.LlamaConfig(**{**SHAPE, **GATED, **other}, tie_word_embeddings=True),
    "llama_bias": lambda: T.LlamaConfig(**SHAPE, **GATED, attention_bias=True, mlp_bias=True),
    "mistral": lambda: T.MistralConfig(**SHAPE, **GATED, sliding_window=None),
    "mistral_sliding": lambda: T.MistralConfig(**SHAPE, **GATED, sliding_window=8),
    "qwen2": lambda: T.Qwen2Config(**SHAPE, **GATED, tie_word_embeddings=True),
    "qwen2_sliding": lambda: T.Qwen2Config(
        **SHAPE, **GATED, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": lambda: T.Qwen3Config(**SHAPE, **GATED, head_dim=16),
    "gemma2": lambda: T.Gemma2Config(**SHAPE, **GATED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3_text": lambda: T.Gemma3TextConfig(
        **SHAPE, **GATED, head_dim=16, sliding_window=8, sliding_window_pattern=2, query_pre_attn_scalar=16
    ),
    "phi3": lambda: T.Phi3Config(**SHAPE, **GATED, pad_token_id=0),
    "olmo2": lambda: T.Olmo2Config(**SHAPE, **GATED),
    "granite": lambda: T.GraniteConfig(**SHAPE, **GATED, residual_multiplier=0.5, attention_multiplier=0.3),
    "smollm3": lambda: T.SmolLM3Config(**SHAPE, **GATED, no_rope_layers=[1, 0, 1], pad_token_id=0),
    "seed_oss": lambda: T.SeedOssConfig(**SHAPE, **GATED, head_dim=8, attention_out_bias=True, pad_token_id=0),
    "mixtral": lambda: T.MixtralConfig(**SHAPE, **{**GATED, **MIXED, "intermediate_size": 16}, num_local_experts=6),
    "qwen2_moe": lambda: T.Qwen2MoeConfig(
        **SHAPE, **GATED, **MIXED, **QWEN_MOE, shared_expert_intermediate_size=24, mlp_only_layers=[0]
    ),
    "qwen3_moe": lambda: T.Qwen3MoeConfig(
        **SHAPE, **GATED, **MIXED, **QWEN_MOE, head_dim=16, decoder_sparse_step=2, norm_topk_prob=True
    ),
    "olmoe": lambda: T.OlmoeConfig(**SHAPE, **{**GATED, **MIXED, "intermediate_size": 16}, num_experts=6),
    "glm4_moe": lambda: T.Glm4MoeConfig(
        **SHAPE,
        **GATED,
        **MIXED,
        head_dim=8,
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        pad_token_id=0,
    ),
    "deepseek_v2": lambda: T.DeepseekV2Config(**SHAPE, **LATENT, n_routed_experts=6, n_group=None),
    "deepseek_v3": lambda: T.DeepseekV3Config(**SHAPE, **LATENT, n_routed_experts=8, n_group=2, topk_group=1),
    "glm4_moe_lite": lambda: T.Glm4MoeLiteConfig(**SHAPE, **LATENT, n_routed_experts=6, head_dim=8),
    "gpt_oss": lambda: T.GptOssConfig(
        **SHAPE,
        **{**GATED, **MIXED, "intermediate_size": 16},
        head_dim=8,
        num_local_experts=6,
        sliding_window=8,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
    ),
    "qwen3_next": lambda: T.Qwen3NextConfig(
        **SHAPE,
        **GATED,
        **MIXED,
        **QWEN_MOE,
        **DELTA,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[0],
    ),
    "qwen3_5_moe_text": lambda: T.Qwen3_5MoeTextConfig(
        **SHAPE,
        **{key: value for key, value in GATED.items() if key != "intermediate_size"},
        **MIXED,
        **QWEN_MOE,
        **DELTA,
        shared_expert_intermediate_size=24,
    ),
    "qwen3_5_text": lambda: T.Qwen3_5TextConfig(**SHAPE, **GATED, **DELTA),
    "gemma4_text": lambda kinds=(SLIDING, FULL, FULL), **other: T.Gemma4TextConfig(
        **{**SHAPE, **GATED, **GEMMA4, **other}, layer_types=[*kinds]
    ),
    "lfm2": lambda: T.Lfm2Config(  # its class makes of 72 channels 48: two thirds, in steps of 16
        **SHAPE,
        **{**GATED, "intermediate_size": 72},
        layer_types=["conv", "full_attention", "full_attention"],
        block_multiple_of=16,
    ),
    "granitemoehybrid": lambda: T.GraniteMoeHybridConfig(
        **SHAPE,
        **GATED,
        layer_types=["linear_attention", "full_attention", "full_attention"],
        num_local_experts=4,
        shared_intermediate_size=48,
        mamba_n_heads=4,
        mamba_d_state=8,
        mamba_chunk_size=8,
        residual_multiplier=0.5,
    ),
    "nemotron_h": lambda kinds=("linear_attention", "moe", "full_attention"), **other: T.NemotronHConfig(
        **{**{key: value for key, value in SHAPE.items() if key != "num_hidden_layers"}, **GATED, **NEMOTRON, **other},
        layers_block_type=[*kinds],
    ),
    "gpt2": lambda: T.GPT2Config(
        **{WIDE.get(key, key): value for key, value in SHAPE.items()}, n_inner=48, n_positions=128
    ),
    "gpt_neox": lambda: T.GPTNeoXConfig(**SHAPE, intermediate_size=48, max_position_embeddings=128),
    "gpt_neox_serial": lambda: T.GPTNeoXConfig(
        **SHAPE,
        intermediate_size=48,
        max_position_embeddings=128,
        use_parallel_residual=False,
        tie_word_embeddings=True,
    ),
    "falcon": lambda: T.FalconConfig(**SHAPE, ffn_hidden_size=48),
    "falcon_new": lambda: T.FalconConfig(
        **SHAPE, ffn_hidden_size=48, new_decoder_architecture=True, num_kv_heads=2, bias=True
    ),
    "falcon_alibi": lambda: T.FalconConfig(
        **SHAPE, ffn_hidden_size=48, alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
    "bloom": lambda: T.BloomConfig(
        **{k: v for k, v in SHAPE.items() if k not in ("num_hidden_layers", "num_attention_heads")}, n_layer=3, n_head=4
    ),
    "opt": lambda: T.OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=128, dropout=0.0),
    "opt_350m": lambda: T.OPTConfig(
        **SHAPE, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=128, do_layer_norm_before=False
    ),
}

ONE_EACH = [  # of every family
    name
    for name in CONFIGS
    if name
    not in (
        "llama_bias",
        "mistral_sliding",
        "qwen2_sliding",
        "gpt_neox_serial",
        "falcon_new",
        "falcon_alibi",
        "opt_350m",
    )
]
STRUCTURES = ("llama", "phi3", "gpt2", "bloom", "qwen2_moe")  # apart, fused, transposed, by group, in experts
LATENTS = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")  # keys and values from one latent
HYBRIDS = (
    "qwen3_next",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "lfm2",
    "granitemoehybrid",
    "gemma4_text",
    "nemotron_h",
)  # attention in some layers alone
ONLY_FFNS = (*LATENTS, *HYBRIDS)  # their rows say nothing of attention
MIXTURES = tuple(name for name, row in FAMILIES.items() if row.experts)
DENSE = [name for name in CONFIGS if name not in MIXTURES + ONLY_FFNS]
LAYER_NORM = ("gpt2", "gpt_neox", "gpt_neox_serial", "falcon", "falcon_new", "falcon_alibi", "bloom", "opt", "opt_350m")
NO_GROUPS = (
    "olmo2",
    "olmoe",
    "falcon",
    "falcon_alibi",
    "bloom",
)  # a norm over all heads, one group, or heads in one matrix
NO_HEADS = ("olmo2", "olmoe", "falcon_alibi", "bloom", "gpt2", "gpt_neox", "gpt_neox_serial", "opt", "opt_350m")
NO_VALUE = ("phi3", "gpt2", "gpt_neox", "gpt_neox_serial", "falcon", "falcon_new", "falcon_alibi", "bloom")
POST_NORM = ("opt_350m", "gemma2", "gemma3_text", "gemma4_text", "olmo2")  # norms, or a factor, after the FFN


def has(family: str, kind: str) -> bool:
    """Whether a tiny model has units of a kind to give; where it has none, a law says so and little more."""
    return {
        "ffn": family not in ("mixtral", "olmoe", "gpt_oss", "qwen3_5_moe_text", "nemotron_h"),
        "heads": family not in (*NO_HEADS, *ONLY_FFNS),
        "groups": family not in (*NO_GROUPS, *ONLY_FFNS),
        "value": family not in (*NO_VALUE, *ONLY_FFNS),
        "expert_ffn": family in MIXTURES and family not in ("glm4_moe", *LATENTS),
        "shared": family in ("qwen2_moe", "qwen3_next", "qwen3_5_moe_text", "nemotron_h"),
        "experts": family in MIXTURES,
    }[kind]


def model(name: str, seed: int = 0, **other: Any) -> T.PreTrainedModel:
    """A random model; its biases and norms are random too, so that a forgotten one shows.  A copy of one built once."""
    built, drawn = _built(name, seed, tuple(other.items()))
    torch.set_rng_state(drawn)  # as building it again would leave it
    return copy.deepcopy(built)


def uneven() -> T.PreTrainedModel:
    """A model of whose layers one matters far more than the others, which scores within layers do not show."""
    found = model("llama")
    for n, factor in enumerate((0.01, 8, 0.01)):
        found.model.layers[n].mlp.down_proj.weight.data *= factor
    return found


@cache
def _built(name: str, seed: int, other: tuple[tuple[str, Any], ...]) -> tuple[T.PreTrainedModel, torch.Tensor]:
    """The model, and where its making leaves the generator of random numbers."""
    torch.manual_seed(seed)
    built = T.AutoModelForCausalLM.from_config(CONFIGS[name](**dict(other))).eval().requires_grad_(False)
    for key, param in built.named_parameters():
        if param.ndim == 1:
            param.data = torch.randn_like(param) * 0.2 + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
        else:
            param.data *= 4  # far from linear, so that a wrong cut is a large error
    for key, buffer in built.named_buffers():
        if key.endswith("bias"):
            buffer.data = torch.randn_like(buffer) * 0.2
    built.generation_config.pad_token_id = 0
    return built, torch.get_rng_state()


def tokens(windows: int = 2, length: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randint(256, (windows, length), generator=torch.Generator().manual_seed(seed))


def tokenizer(around: str = "$A") -> T.PreTrainedTokenizerFast:
    """One token a byte; `around` says what it puts around a text, "<s> $A </s>" both."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: n for n, symbol in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if around != "$A":
        backend.post_processor = processors.TemplateProcessing(around, special_tokens=[("<s>", 256), ("</s>", 257)])
    return T.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def text(words: int = 600, lexicon: int = 20) -> str:
    """Words of random letters, some far more frequent than others."""
    draw = torch.Generator().manual_seed(3)
    known = [
        "".join(string.ascii_lowercase[i] for i in torch.randint(26, (4,), generator=draw).tolist())
        for _ in range(lexicon)
    ]
    chosen = torch.multinomial(torch.arange(1.0, lexicon + 1.0), words, replacement=True, generator=draw).tolist()
    return " ".join(known[i] for i in chosen)
