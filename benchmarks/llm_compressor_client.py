"""Sparsify a model by llm-compressor, in an environment of its own: python llm_compressor_client.py MODEL TOKENS METHOD
BUDGET OUT

MODEL: a folder with a float32 checkpoint; TOKENS: a .safetensors with `tokens` (windows, length); METHOD: sparsegpt,
wanda; BUDGET: 0.5 or 2:4.  Prints one line of JSON: seconds of the call itself, versions.
"""

import json
import sys
import time

import datasets
import llmcompressor
import torch
import transformers
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file

source, tokens, method, budget, out = sys.argv[1:]
windows = load_file(tokens)["tokens"]
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
rows = {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
share, groups = (0.5, budget) if ":" in budget else (float(budget), "0:0")
kinds = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
how = kinds[method](sparsity=share, mask_structure=groups, targets=["Linear"], ignore=["re:.*lm_head"])
began = time.perf_counter()
oneshot(
    model=model,
    dataset=datasets.Dataset.from_dict(rows),
    recipe=[how],
    tokenizer=transformers.AutoTokenizer.from_pretrained(source),
    max_seq_length=windows.shape[1],
    num_calibration_samples=len(windows),
    shuffle_calibration_samples=False,
    pipeline="sequential",
)
seconds = time.perf_counter() - began
model.save_pretrained(out, save_compressed=False)
versions = {one.__name__: one.__version__ for one in (llmcompressor, transformers, torch)}
print(json.dumps({"seconds": seconds, "versions": versions}))
