"""Prune a model in memory, look at it, save it.

    python examples/prune_in_memory.py [MODEL] [OUT]

MODEL (demo unless given) is a Hugging Face folder, a hub id, a .gguf file, or demo: SmolLM2-135M-Instruct, fetched
once. Nothing is written before OUT; what is there then was reloaded with stock transformers and compared.
"""

import sys
from typing import Any

import billhook


def main(model: str = "demo", out: str = "smaller", **settings: Any) -> None:
    """Settings are those of `billhook prune`: method, calibration, samples, layout, …"""
    result = billhook.prune(model, **{"ratio": 0.2, **settings})
    if sizes := result.report.sizes:
        print(f"{sizes.before.parameters:,} parameters became {sizes.after.parameters:,}")

    inputs = result.tokenizer("Once upon a time", return_tensors="pt")
    ids = result.model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(result.tokenizer.decode(ids[0], skip_special_tokens=True))

    result.save(out)
    print(f"saved to {out}, reloaded with stock transformers, logits equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
