"""What billhook is measured beside: transformers' own forward, and loops as their papers' code writes them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 4096  # of one forward
BLOCK = 128  # columns of SparseGPT between two updates of the later ones


@torch.inference_mode()
def forward(model: Any, tokens: Tensor) -> None:
    """The decoder on every window, by transformers; no logits."""
    for batch in tokens.split(max(1, TOKENS // tokens.shape[1])):
        model.base_model(batch.to(model.device), use_cache=False)


@torch.inference_mode()
def losses(model: Any, tokens: Tensor) -> Tensor:
    """The mean loss of every window."""
    found = []
    for window in tokens.split(1):
        window = window.to(model.device)
        logits = model(window, use_cache=False).logits[0, :-1].float()
        found.append(nn.functional.cross_entropy(logits, window[0, 1:]))
    return torch.stack(found)


@torch.no_grad()
def sparsegpt(model: Any, tokens: Tensor, prune: Callable[[nn.Linear, Tensor], None]) -> None:
    """Layer by layer: a pass that sums H = X X^T in float32 for every linear module, `prune`, and a pass onwards."""
    inner, batches = model.model, tokens.split(max(1, TOKENS // tokens.shape[1]))
    states = [inner.embed_tokens(batch.to(model.device)) for batch in batches]
    places = torch.arange(tokens.shape[1], device=model.device)[None]
    for layer in inner.layers:
        modules = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        sums = {module: torch.zeros(module.in_features, module.in_features, device=model.device) for module in modules}

        def add(module: nn.Linear, given: tuple[Tensor, ...], sums: dict[nn.Linear, Tensor] = sums) -> None:
            x = given[0].flatten(0, -2).float()
            sums[module] += x.T @ x

        hooks = [module.register_forward_pre_hook(add) for module in modules]
        for state in states:
            layer(state, position_embeddings=inner.rotary_emb(state, places))
        for hook in hooks:
            hook.remove()
        for module in modules:
            prune(module, sums.pop(module))
        states = [layer(state, position_embeddings=inner.rotary_emb(state, places)) for state in states]


def sweep(module: nn.Linear, H: Tensor) -> None:
    """SparseGPT at 2:4 as published: the inverse's factor, then column by column, in float32."""
    W = module.weight.float()
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for start in range(0, W.shape[1], BLOCK):
        block, across = W[:, start : start + BLOCK].clone(), U[start : start + BLOCK, start : start + BLOCK]
        errors, mask = torch.zeros_like(block), torch.zeros_like(block, dtype=torch.bool)
        for j in range(block.shape[1]):
            if j % 4 == 0:
                scores = block[:, j : j + 4].square() / across.diagonal()[j : j + 4].square()
                mask.scatter_(1, j + scores.topk(2, dim=1, largest=False).indices, True)
            error = block[:, j].masked_fill(~mask[:, j], 0.0) / across[j, j]
            block[:, j:] -= error[:, None] * across[j, j:][None]
            errors[:, j] = error
        W[:, start : start + BLOCK] = block.masked_fill(mask, 0.0)
        W[:, start + BLOCK :] -= errors @ U[start : start + BLOCK, start + BLOCK :]
    module.weight.copy_(W)


def wanda(module: nn.Linear, H: Tensor) -> None:
    """Wanda at 2:4 as published."""
    scores = (module.weight.float().abs() * H.diagonal().sqrt()).view(-1, 4)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.scatter_(1, scores.topk(2, dim=1, largest=False).indices, True)
    module.weight.masked_fill_(mask.view_as(module.weight), 0.0)
