"""What a model does in training alone (dropout, noise): switched off for measurements, and read from its config."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

RANDOM = ("drop", "jitter")  # parts of config keys such as dropout, attn_pdrop, layerdrop, router_jitter_noise
OTHER_HEADS = ("classifier", "summary")  # starts of config keys of heads that predict no next token


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """While open the model is in eval mode and its outputs have names; afterwards every module has its former mode.

    Modules that were added meanwhile get the model's mode.
    """
    training, modes = model.training, {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)
    named = getattr(config, "return_dict", None)
    model.eval()
    if named is False:
        config.return_dict = True
    try:
        yield
    finally:
        if named is False:
            config.return_dict = False
        for module in model.modules():
            module.training = modes.get(module, training)


def noise(config: Any) -> dict[str, float]:
    """The rates of dropout and noise in training under this config, by key, without those that are zero."""
    items = config.to_dict().items()
    return {
        key: float(value)
        for key, value in items
        if any(word in key for word in RANDOM)
        and not key.startswith(OTHER_HEADS)
        and isinstance(value, int | float)
        and value > 0
    }
