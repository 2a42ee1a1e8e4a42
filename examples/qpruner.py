"""QPruner's whole road (arXiv:2412.11629): a cut, few bits by layer, adapters on the weights that stay packed.

    python examples/qpruner.py [MODEL] [TEXT] [OUT]

OUT/cut is the pruned model.  OUT/packed has its weights in as many bits by layer as MEMORY holds, searched from mutual
information, for llama.cpp and for transformers (extras: quantize, search).  OUT/adapter is trained from MODEL's
predictions on top of them and starts at what few bits took (extra: lora); adapter.gguf in it is for llama.cpp.
"""

import sys
from pathlib import Path
from typing import Any

import billhook


def main(
    model: str = "demo",
    text: str = "mixed",
    out: str = "qpruned",
    *,
    memory: str = "110MB",
    tokens: int | str = "200k",
    training: dict[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Settings are those of `billhook prune`, and `training` has those of `billhook recover`."""
    cut, packed, adapter = (Path(out) / name for name in ("cut", "packed", "adapter"))
    windows = {key: settings[key] for key in ("samples", "seq_len") if key in settings}

    how = {"method": "fasp", "score": "taylor2_element", "ratio": 0.2, **settings}
    billhook.prune(model, calibration=text, **how).save(cut)

    search = {"memory": memory, "allocation": "search", "format": "both"}
    bits = billhook.quantize(cut, packed, calibration=text, **search, **windows)
    print(f"{bits.bits_per_weight:.2f} bits a weight: {bits.choice.get('taken')}")

    lora = {"trainable": "lora", "merge": False, "loftq": str(cut), **(training or {})}
    healed = billhook.recover(packed, teacher=model, text=(text,), tokens=tokens, **lora)
    healed.save(adapter)
    print(f"saved to {adapter}: {healed.healing['trained_parameters']:,} parameters trained, {packed} as it was")


if __name__ == "__main__":
    main(*sys.argv[1:])
