"""How near the predictions of cut models are to the unpruned one's, window by window."""

import torch
from transformers import PreTrainedModel

from billhook.calibration.forward import enter, head, run_layer
from billhook.models.families import layers
from billhook.tensors import Probes

EVERY = 2  # positions of which one is compared


class Standard:
    """A model and windows, on which others are compared with it, however large the vocabulary: what its last layer puts
    out is kept, and its logits are made again."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, tokens: Probes) -> None:
        self.model, self.windows = model, tokens.to(model.device).split(1)
        self.keep = torch.arange(0, tokens.shape[1], EVERY, device=model.device)
        states, calls = enter(model, list(self.windows))
        for n, module in enumerate(layers(model)):
            states = [run_layer(module, state, call[n]) for state, call in zip(states, calls, strict=True)]
        self.states = states  # (1, length, hidden) of each window

    @torch.no_grad()
    def divergences(self, other: PreTrainedModel) -> list[float]:
        """KL(model || other) in nats a token, mean over every second position, of each window."""
        found = []
        for window, state in zip(self.windows, self.states, strict=True):
            before = torch.log_softmax(head(self.model, window, state, self.keep).float(), -1)
            after = torch.log_softmax(other(window, use_cache=False, logits_to_keep=self.keep).logits.float(), -1)
            found.append((before.exp() * (before - after)).sum(-1).mean())
        return torch.stack(found).tolist() if found else []  # waited for once
