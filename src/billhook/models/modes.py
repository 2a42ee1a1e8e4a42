"""What a model does in training alone: how it is kept out of a measurement, and what of a config asks for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

RANDOM = ("drop", "jitter")  # in a config's words for rates: dropout, attn_pdrop, layerdrop, router_jitter_noise
OTHER_HEADS = ("classifier", "summary")  # of models that predict no next token


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """While open the model is as it is judged, and its outputs have names; afterwards every module is in the mode it came in.

    A new one is in the model's.
    """
    whole, modes = model.training, {module: module.training for module in model.modules()}
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
            module.training = modes.get(module, whole)


def noise(config: Any) -> dict[str, float]:
    """The rates at which training under this config drops or shakes what a layer computes, by key; none that is zero."""
    given = config.to_dict().items()
    return {
        key: float(value)
        for key, value in given
        if any(word in key for word in RANDOM)
        and not key.startswith(OTHER_HEADS)
        and isinstance(value, int | float)
        and value > 0
    }
