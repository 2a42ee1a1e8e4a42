"""Serve a pruned model with stock transformers: billhook is not imported, and need not be installed.

    billhook prune demo --ratio 0.2 -o smaller
    python examples/serve_with_transformers.py [FOLDER] [PROMPT]

A folder with `--layout per_layer` brings one small modelling file: read it, then pass trust_remote_code=True.
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str = "smaller", prompt: str = "Why is the sky blue?", new_tokens: int = 64) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    started = time.perf_counter()
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    made = ids[0, inputs["input_ids"].shape[1] :]
    print(tokenizer.decode(made, skip_special_tokens=True))
    print(f"{len(made)} tokens, {len(made) / (time.perf_counter() - started):.0f} a second")


if __name__ == "__main__":
    main(*sys.argv[1:])
