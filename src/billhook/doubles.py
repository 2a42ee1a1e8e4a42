"""float64, which Apple's GPUs have not: from a device without it, mathematics that needs it goes to the CPU."""

import torch
from torch import Tensor

WITHOUT = {"mps"}  # types of devices


def place(device: torch.device) -> torch.device:
    """Where float64 is for what is on a device: there, or on the CPU."""
    return torch.device("cpu") if device.type in WITHOUT else device


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float64, on `place` of its device."""
    return tensor.to(place(tensor.device)).double()  # in this order: neither way of the other is on an Apple GPU
