"""Prune a model by OptiPFair, in an environment of its own: python optipfair_client.py MODEL TOKENS WAY AMOUNT OUT

MODEL: a folder with a float32 checkpoint; TOKENS: a .safetensors with `tokens` (windows, length); WAY: widths (its
score by weights alone), widths-data (its hybrid score, with the norms of activations) or layers (the last ones);
AMOUNT: the FFN's new width, or how many layers go.  Prints one line of JSON: seconds of the call itself, versions.
"""

import json
import sys
import time

import optipfair
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def main(folder: str, tokens: str, way: str, amount: int, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    began = time.perf_counter()
    if way == "layers":
        how = {"pruning_type": "DEPTH", "num_layers_to_remove": amount, "layer_selection_method": "last"}
    else:
        share = 100 * (1 - amount / model.config.intermediate_size) + 1e-6  # which they round down
        how = {"pruning_type": "MLP_GLU", "neuron_selection_method": "MAW", "pruning_percentage": share}
    if way == "widths-data":
        windows = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in load_file(tokens)["tokens"]]
        how["dataloader"] = DataLoader(windows, batch_size=4)  # pyright: ignore[reportArgumentType]
    pruned = optipfair.prune_model(model, show_progress=False, **how)
    seconds = time.perf_counter() - began
    pruned.save_pretrained(out)
    versions = {"optipfair": optipfair.__version__, "transformers": transformers.__version__}
    print(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), sys.argv[5])  # type: ignore[arg-type]
