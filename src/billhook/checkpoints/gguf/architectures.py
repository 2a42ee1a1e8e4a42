"""Tables of llama.cpp: its architectures, its tensor names, its names for pre-tokenizers.

They are taken from llama.cpp's loaders, graphs and tokenizer (src/models/*.cpp, src/llama-vocab.cpp) as vendored by
llama-cpp-python 0.3.36, and proven by tests/checkpoints/test_export.py, which runs every row in llama.cpp itself.  The
names are those of architectures of the file format, not of families of models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

CLIENT_PACKAGE = "llama-cpp-python"
HEAD_NORMS = frozenset({"attn_q_norm.weight", "attn_k_norm.weight"})
QKV_BIASES = frozenset({"attn_q.bias", "attn_k.bias", "attn_v.bias"})
MLP_BIASES = frozenset({"ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"})
ALL_BIASES = QKV_BIASES | MLP_BIASES | {"attn_output.bias"}
OWN_HEAD = frozenset({"output.weight"})
FACTORED = ("llama3", "factors")  # types of RoPE that a tensor of factors says, one for each frequency


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.  All of them need value heads as long as key heads, which their graphs assert."""

    name: str
    optional: frozenset[str]  # tensors that it reads beyond COMMON; llama.cpp loads no file with any other
    ropes: frozenset[str] = frozenset({"default", "linear"})  # types of RoPE that it computes
    interleaved: bool = False  # RoPE rotates rows 2i and 2i+1 together, where transformers rotates i and i + head_dim/2
    uneven: bool = False  # FFN width, query heads and KV heads may differ by layer
    square: bool = False  # q must be hidden x hidden
    fused: bool = False  # q, k and v are one tensor


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        arch.name: arch
        for arch in (
            Architecture("llama", ALL_BIASES | OWN_HEAD, frozenset({"default", "linear", *FACTORED}), interleaved=True),
            Architecture(
                "deci",
                ALL_BIASES | OWN_HEAD,
                frozenset({"default", "linear", *FACTORED}),
                interleaved=True,
                uneven=True,
            ),
            Architecture("qwen2", QKV_BIASES | OWN_HEAD, square=True),
            Architecture("qwen3", HEAD_NORMS | QKV_BIASES | OWN_HEAD),
            Architecture("openelm", HEAD_NORMS, uneven=True, fused=True),
        )
    }
)
CHOICES: Mapping[str, tuple[str, ...]] = (
    MappingProxyType(  # model_type -> architectures, of which the first that fits is taken
        {
            "llama": ("llama", "deci"),
            "mistral": ("llama", "deci"),
            "qwen2": ("qwen2", "deci"),
            "qwen3": ("qwen3", "openelm"),
        }
    )
)
TOP: Mapping[str, str] = MappingProxyType(
    {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
)
IN_LAYER: Mapping[str, str] = MappingProxyType(
    {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
)
COMMON = frozenset(f"{name}.weight" for name in (*TOP.values(), *IN_LAYER.values())) - OWN_HEAD - HEAD_NORMS
NAMES = {**TOP, **IN_LAYER}
BIASES = {"attention_bias": QKV_BIASES | {"attn_output.bias"}, "mlp_bias": MLP_BIASES}


@dataclass(frozen=True)
class Source:
    """The tensors that a module's weight and bias come from, and the conversion (a name in gguf.read.CONVERSIONS)."""

    tensors: tuple[str, ...]
    conversion: str = "none"


@dataclass(frozen=True)
class Reading:
    """How a file of an architecture becomes a model; what is neither here nor in the tables below is refused."""

    family: str
    sources: Mapping[str, Source]  # path of a module, in its layer or in the model -> tensors
    biases: Mapping[str, frozenset[str]]  # config key -> tensors, any of which sets it
    factors: bool = False  # whether it knows a factor for each rotary frequency


def _sources(**other: Source) -> Mapping[str, Source]:
    """The tensor that export writes each module to, except for `other`, by names in the file."""
    return MappingProxyType({path: other.get(name, Source((name,))) for path, name in NAMES.items()})


FUSED_QKV = {f"attn_{part}": Source(("attn_qkv",), f"rows of {part}") for part in "qkv"}
INTERLEAVED = {f"attn_{part}": Source((f"attn_{part}",), f"interleaved {part}") for part in "qk"}
READINGS: Mapping[str, Reading] = MappingProxyType(
    {
        "llama": Reading("llama", _sources(**INTERLEAVED), BIASES, factors=True),
        "deci": Reading("llama", _sources(**INTERLEAVED), BIASES, factors=True),
        "qwen2": Reading("qwen2", _sources(), {}),
        "qwen3": Reading("qwen3", _sources(), {"attention_bias": QKV_BIASES}),
        "openelm": Reading("qwen3", _sources(**FUSED_QKV), {}),
    }
)
ALWAYS: Mapping[str, object] = (
    MappingProxyType(  # fields under the architecture's name, and the only value that is read
        {
            "attention.causal": True,
            "expert_count": 0,
            "expert_used_count": 0,
            "leading_dense_block_count": 0,
            "attention.max_alibi_bias": 0.0,
            "attention.clamp_kqv": 0.0,
            "attention.scale": 0.0,  # stands for the usual scale
            "attn_logit_softcapping": 0.0,
            "final_logit_softcapping": 0.0,
            "logit_scale": 1.0,
            "residual_scale": 1.0,
            "embedding_scale": 1.0,
            "nextn_predict_layers": 0,
        }
    )
)
NOTHING = frozenset(  # fields that do not change what the model computes
    {"tensor_data_layout", "rope.scaling.finetuned", "use_parallel_residual"}
)
BYTE_LEVEL = "gpt2"  # tokenizer.ggml.model of byte-level BPE, for all ways to split text
SENTENCEPIECE = "llama"  # tokenizer.ggml.model of SentencePiece BPE
NO_SPLITS = "default"  # tokenizer.ggml.pre of SentencePiece, which does not split text
DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_TAIL}"
QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_TAIL}"
TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}{_TAIL_SLASH}"
GPT4O = rf"{_CASED[0]}{_CONTRACTION}?|{_CASED[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}{_TAIL_SLASH}"


@dataclass(frozen=True)
class Splits:
    """How text is split before BPE: by regular expressions in turn, each match of which is a piece of its own."""

    regexes: tuple[str, ...]
    ignore_merges: bool = False  # whether a piece that is a token is taken whole


PRE_TOKENIZERS: Mapping[str, Splits] = MappingProxyType(  # tokenizer.ggml.pre; no two rows are equal
    {  # in tekken and gpt-4o llama.cpp does not count combining marks, as in Khmer, as parts of words
        "gpt-2": Splits((GPT2,)),
        "smollm": Splits((DIGIT, GPT2)),
        "llama-bpe": Splits((LLAMA3,), ignore_merges=True),
        "smaug-bpe": Splits((LLAMA3,)),
        "qwen2": Splits((QWEN2,)),
        "tekken": Splits((TEKKEN,), ignore_merges=True),
        "gpt-4o": Splits((GPT4O,)),
    }
)
ALIASES: Mapping[str, str] = MappingProxyType(  # other names for the same splits in llama.cpp
    {
        other: name
        for name, others in {
            "gpt-2": "phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat mpt olmo jais trillion granite-docling "
            "a.x-4.0 mellum",
            "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
            "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
            "smaug-bpe": "dbrx",
            "qwen2": "deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open megrez",
            "gpt-4o": "llama4 kanana2 talkie",
        }.items()
        for other in others.split()
    }
)
