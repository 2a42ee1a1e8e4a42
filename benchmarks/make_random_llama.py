"""A LLaMA of random weights, as large as asked for, written layer by layer: python benchmarks/make_random_llama.py OUT

The default is 1.5 billion parameters in bfloat16, 3 GB; its tokenizer is the demo model's.  What streaming is measured
on: no number of it says anything about quality.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from billhook.checkpoints import load

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("out", type=Path)
parser.add_argument("--layers", type=int, default=50)
parser.add_argument("--hidden", type=int, default=1536)
parser.add_argument("--width", type=int, default=4096)
parser.add_argument("--heads", type=int, default=16)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(load.demo_folder())
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=args.hidden,
    intermediate_size=args.width,
    num_hidden_layers=args.layers,
    num_attention_heads=args.heads,
    num_key_value_heads=args.heads,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    architectures=["LlamaForCausalLM"],
    dtype="bfloat16",
)
draw = torch.Generator().manual_seed(args.seed)
args.out.mkdir(parents=True)


def random(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, generator=draw) * 0.02).bfloat16()


def layer(n: int) -> dict[str, torch.Tensor]:
    h, w, within = args.hidden, args.width, f"model.layers.{n}"
    shapes = {f"self_attn.{role}_proj": (h, h) for role in "qkvo"}
    shapes |= {"mlp.gate_proj": (w, h), "mlp.up_proj": (w, h), "mlp.down_proj": (h, w)}
    found = {f"{within}.{name}.weight": random(*shape) for name, shape in shapes.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    return found | {f"{within}.{name}.weight": torch.ones(h, dtype=torch.bfloat16) for name in norms}


ends = {"model.embed_tokens.weight": random(config.vocab_size, args.hidden)}
ends["model.norm.weight"] = torch.ones(args.hidden, dtype=torch.bfloat16)
placed, total = {}, 0
for n in range(args.layers + 1):
    tensors = layer(n) if n < args.layers else ends
    name = f"model-{n + 1:05}-of-{args.layers + 1:05}.safetensors"
    save_file(tensors, args.out / name, {"format": "pt"})
    placed |= dict.fromkeys(tensors, name)
    total += sum(one.numel() * 2 for one in tensors.values())
index = {"metadata": {"total_size": total}, "weight_map": placed}
(args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
config.save_pretrained(args.out)
tokenizer.save_pretrained(args.out)
print(f"{args.out}: {total // 2:,} parameters, {total:,} bytes")
