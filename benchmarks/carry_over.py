"""The same function as another family: python benchmarks/carry_over.py MODEL FAMILY OUT

Writes a llama checkpoint as FAMILY (granite, mistral, phi3, qwen2) without changing what it computes: projections are
joined, biases are zero, multipliers are what llama has built in.  So a method can be judged on families of which no
trained model is at hand.  Prints the largest difference between logits.
"""

import argparse
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from billhook.checkpoints import load

SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters"),
)
OWN: dict[str, Any] = {
    "granite": lambda config: {"attention_multiplier": config.head_dim**-0.5},
    "mistral": lambda config: {"sliding_window": None, "head_dim": config.head_dim},
    "phi3": lambda config: {"pad_token_id": config.pad_token_id or 0},
    "qwen2": lambda config: {},
}
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def carried(model: Any, family: str) -> Any:
    """A llama model as another family."""
    config = {name: getattr(model.config, name) for name in SHARED} | OWN[family](model.config)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config), dtype=model.dtype).eval()
    own, weights = model.state_dict(), made.state_dict()
    for name in weights:
        parts = name.split(".")
        if parts[-2] in JOINED:
            weights[name] = torch.cat([own[".".join((*parts[:-2], one, parts[-1]))] for one in JOINED[parts[-2]]])
        elif parts[-1] == "bias" and name not in own:
            weights[name] = torch.zeros_like(weights[name])
        else:
            weights[name] = own[name]
    made.load_state_dict(weights)
    made.generation_config = model.generation_config
    return made


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("family", choices=sorted(OWN))
    parser.add_argument("out")
    args = parser.parse_args()
    opened = load.open_model(args.model, device="cpu", dtype="float32")
    made = carried(opened.model, args.family)
    ids = torch.arange(64)[None] * 97 % opened.model.config.vocab_size
    off = (made(ids).logits - opened.model(ids).logits).abs().max()
    if not off < 1e-2:
        raise SystemExit(f"{args.family} computes something else: logits differ by {off:.1e}")
    made.save_pretrained(args.out)
    opened.tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {args.family}, logits differ by at most {off:.1e}")


if __name__ == "__main__":
    main()
