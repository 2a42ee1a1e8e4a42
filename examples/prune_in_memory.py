"""Prune a model in memory, ask it for a sentence, save it: python examples/prune_in_memory.py MODEL TEXT OUT"""

import sys

import billhook

model, text, out = sys.argv[1:]
result = billhook.prune(model, ratio=0.2, calibration=text, samples=8, seq_len=64, multiple_of=4)

sizes = result.report["sizes"]
print(f"{sizes['before']['parameters']:,} parameters became {sizes['after']['parameters']:,}")

inputs = result.tokenizer("Once upon a time", return_tensors="pt")
ids = result.model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(result.tokenizer.decode(ids[0], skip_special_tokens=True))

result.save(out)
print(f"saved to {out}, reloaded with stock transformers, logits equal")
