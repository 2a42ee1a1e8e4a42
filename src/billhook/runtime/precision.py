"""The type of matrix products: bfloat16 on devices with instructions for it; weights keep their own type."""

import torch

FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # torch's names of instruction sets: two of x86, one of ARM


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products; None stands for the weights' own dtype."""
    fast = {
        "cpu": lambda: any(torch.cpu.get_capabilities().get(name) for name in FAST_BFLOAT16),
        # without this argument torch counts GPUs that emulate bfloat16 (before 2020), slower than their float32
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
    }
    wanted = precision == "bfloat16" or (precision == "auto" and device.type in fast and fast[device.type]())
    return torch.bfloat16 if wanted else None


def computing(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """While open, matrix products are computed in `dtype`; None stands for the weights' own dtype."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
