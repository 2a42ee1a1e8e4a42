"""Low-rank adapters as a GGUF, which llama.cpp adds to the GGUF of their base: `llama-cli -m BASE.gguf --lora FILE`.

For a weight W of the base the file has A (rank, in) and B (out, rank), float32, under W's name in the base's file with
`.lora_a` and `.lora_b` behind it.  llama.cpp computes W x + alpha / rank B (A x) (src/llama-adapter.cpp).
"""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from billhook.checkpoints.gguf.write import choose, interleaved, shape_of, tensor_of
from billhook.errors import ModelError

ENDS = (".lora_a", ".lora_b")


def factors(adapted: Any) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A (rank, in), B (out, rank) and alpha of every adapter of a PEFT model, by the path of its module in the base."""
    found = {}
    for path, module in adapted.get_base_model().named_modules():
        for name in getattr(module, "lora_A", {}):
            A, B = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
            found[path] = A, B, module.scaling[name] * len(A)
    return found


def write_lora(base: Any, learned: Mapping[str, tuple[Tensor, Tensor, float]], path: Path) -> None:
    """Write adapters of one alpha as the file `path`.

    Args:
        base: the model that they are of, without them.
        learned: what `factors` gives.

    Raises:
        BillhookError: no architecture of llama.cpp holds the base, or it has q, k and v in one tensor.
    """
    shape = shape_of(base)
    arch = choose(shape)
    if arch.fused:
        raise ModelError(f"q, k and v are one tensor in llama.cpp's {arch.name}, and adapters are of each")
    heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads} if arch.interleaved else {}
    with closing(gguf.GGUFWriter(path, arch.name)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, next(iter(learned.values()))[2])
        for module, (A, B, _) in learned.items():
            tensor = tensor_of(base, module)
            _, number, kind, _ = tensor.split(".")
            rows = interleaved(B, heads[kind][int(number)]) if kind in heads else B
            for end, values in zip(ENDS, (A, rows), strict=True):
                writer.add_tensor(tensor + end, values.float().contiguous().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
