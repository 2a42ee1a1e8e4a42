"""What matrix products are computed in: bfloat16 where the device has instructions for it, weights staying as they are."""

import torch

PRECISIONS = {
    "auto": "bfloat16 where the device has instructions for it",
    "float32": "all of it",
    "bfloat16": "matrix products; weights and optimiser stay float32",
}
FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # torch's names of what CPUs have for it: x86's two, ARM's


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What matrix products are computed in; None: in the weights' own dtype."""
    fast = {
        "cpu": lambda: any(torch.cpu.get_capabilities().get(name) for name in FAST_BFLOAT16),
        # by default torch counts GPUs that emulate it, from before 2020, which are slower then than in float32
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
    }
    wanted = precision == "bfloat16" or (precision == "auto" and device.type in fast and fast[device.type]())
    return torch.bfloat16 if wanted else None


def computing(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """While open, matrix products are computed in `dtype`; None: as the weights are."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
