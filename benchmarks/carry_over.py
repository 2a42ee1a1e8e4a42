"""The same function as another family: python benchmarks/carry_over.py MODEL FAMILY OUT

Writes a llama checkpoint as FAMILY (granite, mistral, phi3, qwen2) without changing what it computes: projections are
joined, biases are zero, multipliers are what llama has built in.  So a method can be judged on families of which no
trained model is at hand.  Prints the largest difference between logits.

FAMILY `shuffled` is the model's own family, its channels in another order: those of the residual stream, of each FFN
and of each head's values.  A model that was unpacked from few bits lies on their grid, block by block, and quantising
it again costs next to nothing; shuffled, a block holds weights of many, and costs what it costs any model.
"""

import argparse
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from billhook.checkpoints import load
from billhook.models import residual
from billhook.models.axes import axes

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
def shuffled(model: Any) -> Any:
    """The model in place, its channels in another order."""
    draw = torch.Generator().manual_seed(0)
    residual.cut(model, torch.randperm(model.config.hidden_size, generator=draw))
    for axis in axes(model, ("ffn", "value")):
        each = axis.units // axis.blocks
        order = torch.cat([block * each + torch.randperm(each, generator=draw) for block in range(axis.blocks)])
        for slot in axis.slots:
            weight = model.get_parameter(slot.param).data
            moved = weight.index_select(slot.dim, slot.index[order].flatten())
            weight.index_copy_(slot.dim, slot.index.flatten(), moved)
    return model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("family", choices=(*sorted(OWN), "shuffled"))
    parser.add_argument("out")
    args = parser.parse_args()
    opened = load.open_model(args.model, device="cpu", dtype="float32")
    ids = torch.arange(64)[None] * 97 % opened.model.config.vocab_size
    before = opened.model(ids).logits
    made = shuffled(opened.model) if args.family == "shuffled" else carried(opened.model, args.family)
    off = (made(ids).logits - before).abs().max()
    if not off < 1e-2:
        raise SystemExit(f"{args.family} computes something else: logits differ by {off:.1e}")
    made.save_pretrained(args.out)
    opened.tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {args.family}, logits differ by at most {off:.1e}")


if __name__ == "__main__":
    main()
