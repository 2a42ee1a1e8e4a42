"""Random models of known shapes, made on the device, and what they read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from floors import Shape
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from billhook.runtime.quiet import quiet_transformers

LLAMA_7B = Shape("LLaMA-7B", 32, 4096, 11008, 32, 32000)
LLAMA_30B = Shape("LLaMA-30B", 60, 6656, 17920, 52, 32000)
LLAMA_1B = Shape("a LLaMA of 1.3 billion", 24, 2048, 5504, 16, 32000)
OPT_125M = Shape("OPT-125M", 12, 768, 3072, 12, 50272, "opt")
SMALL = Shape("a LLaMA of 30 million", 6, 512, 1408, 8, 4096)
POSITIONS = 2048


@dataclass(frozen=True)
class Sizes:
    """What is measured on: the models, and how much text."""

    large: Shape
    huge: Shape
    trained: Shape
    opt: Shape
    small: Shape
    windows: int  # of calibration
    length: int
    short: int  # tokens of shorter windows, and of prompts
    probes: int  # short windows, of sensitivity
    few: int  # layers that stand for all of a model
    trials: int
    steps: int  # of training
    paced: float  # seconds that the bare loop trains for
    batch: int  # windows in a step, of at most 1,024 tokens
    repeats: int  # of prefill and decode
    multiple_of: int
    product: int  # rows of the square matrices that rates are measured by
    copied: int  # bytes


FULL = Sizes(
    large=LLAMA_7B,
    huge=LLAMA_30B,
    trained=LLAMA_1B,
    opt=OPT_125M,
    small=SMALL,
    windows=64,
    length=POSITIONS,
    short=512,
    probes=8,
    few=2,
    trials=64,
    steps=24,
    paced=2.0,
    batch=8,
    repeats=3,
    multiple_of=32,
    product=8192,
    copied=2**32,
)
TINY_LLAMA = Shape("a tiny LLaMA", 2, 32, 64, 4, 512)
TINY_OPT = Shape("a tiny OPT", 2, 32, 64, 4, 512, "opt")
TINY = replace(
    FULL,
    large=TINY_LLAMA,
    huge=TINY_LLAMA,
    trained=TINY_LLAMA,
    opt=TINY_OPT,
    small=TINY_LLAMA,
    windows=10,
    length=32,
    short=16,
    probes=2,
    few=1,
    trials=2,
    steps=3,
    paced=0.01,
    batch=2,
    repeats=1,
    multiple_of=2,
    product=64,
    copied=2**16,
)


def first(shape: Shape, count: int) -> Shape:
    """The same with so many layers."""
    return replace(shape, name=f"{count} layers of {shape.name}", layers=count)


def made(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A random model."""
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
    }
    sizes |= {"num_attention_heads": shape.heads, "max_position_embeddings": POSITIONS}
    if shape.family == "opt":
        config: Any = transformers.OPTConfig(**sizes, ffn_dim=shape.width, word_embed_proj_dim=shape.hidden)
    else:
        config = transformers.LlamaConfig(**sizes, intermediate_size=shape.width, num_key_value_heads=shape.heads)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def written(shape: Shape, folder: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random model's checkpoint, with a tokenizer."""
    with quiet_transformers():
        made(shape, device, dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokens(shape: Shape, windows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random windows, on the CPU, where a text's are."""
    return torch.randint(shape.vocabulary, (windows, length), generator=torch.Generator().manual_seed(seed))


def tokenizer() -> Any:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: n for n, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def prose(folder: Path) -> Path:
    """The pages of this repository, as one text."""
    pages = sorted((Path(__file__).parents[2] / "docs").rglob("*.md"))
    text = folder / "prose.txt"
    text.write_text("\n\n".join(page.read_text(encoding="utf-8") for page in pages), encoding="utf-8")
    return text
