"""What is missed least of a model's depth: python benchmarks/submodules.py MODEL CALIBRATION

Greedily, until as many parameters are gone as --layers layers have, what adds the least divergence a parameter goes
next; nothing makes up for it.  Rows: `layers` whole; `submodules` too (attention and FFN alone); `pairs`, layers that
follow each other side by side, x + A(x) + B(x), which is FlattenGPT's first step (arXiv:2602.08858): its pruning back
to one layer's width would come on top.  KL from the unpruned model in nats a token, on --windows windows, one of four
positions.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import results
import torch
from torch import Tensor

from billhook import data
from billhook.calibration.forward import enter, head, run_layer
from billhook.checkpoints import load
from billhook.models import sizes
from billhook.models.families import layers

SHORTLIST = 7  # of what is left, by what each costs alone
EVERY = 4  # positions of which one is compared
Gone = frozenset[tuple[int, str]]  # layers, and what of each: attention, ffn, layer, or pair (with the next one)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("calibration")
parser.add_argument("--layers", type=int, default=6)
parser.add_argument("--rows", default="layers,submodules,pairs")
parser.add_argument("--windows", type=int, default=2)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()


def attended(module: Any, x: Tensor, call: dict[str, Any]) -> Tensor:
    """What a layer's attention adds."""
    return module.self_attn(hidden_states=module.input_layernorm(x), **call)[0]


def fed(module: Any, x: Tensor) -> Tensor:
    """What a layer's FFN adds."""
    return module.mlp(module.post_attention_layernorm(x))


def passed(gone: Gone, n: int, x: Tensor, calls: Sequence[dict[str, Any]]) -> Tensor:
    """The state after layer n, as it is left."""
    module = layers(model)[n]
    if (n, "layer") in gone or (n - 1, "pair") in gone:
        return x
    if (n, "pair") in gone:
        both = module, layers(model)[n + 1]
        x = x + sum(attended(one, x, call) for one, call in zip(both, calls[n : n + 2], strict=True))
        return x + sum(fed(one, x) for one in both)
    if (n, "attention") in gone:
        return x + fed(module, x)
    if (n, "ffn") in gone:
        return x + attended(module, x, calls[n])
    return run_layer(module, x, calls[n])


def log_probabilities(window: Tensor, x: Tensor) -> Tensor:
    return torch.log_softmax(head(model, window, x, torch.arange(0, window.shape[1], EVERY)).float(), -1)


@torch.no_grad()
def divergence(gone: Gone) -> float:
    start, found = min(n for n, _ in gone), []
    for window, states, calls, before in seen:
        x = states[start]
        for n in range(start, total):
            x = passed(gone, n, x, calls)
        found.append((before.exp() * (before - log_probabilities(window, x))).sum(-1).mean().item())
    return sum(found) / len(found)


def greedy(kinds: Sequence[str]) -> None:
    """Print and keep what goes, step by step."""
    share: dict[str, Callable[[int], float]] = {
        "attention": lambda n: sum(p.numel() for p in layers(model)[n].self_attn.parameters()),
        "ffn": lambda n: sum(p.numel() for p in layers(model)[n].mlp.parameters()),
        "layer": lambda n: whole,
        "pair": lambda n: whole,
    }
    left = {(n, kind) for kind in kinds for n in range(total - (kind == "pair"))}
    alone = {one: divergence(frozenset([one])) / share[one[1]](one[0]) for one in left}
    gone, cost, size = frozenset[tuple[int, str]](), 0.0, 0.0
    while size < args.layers * whole * 0.99:
        tried = {}
        for one in sorted(left, key=lambda one: alone[one])[:SHORTLIST]:
            tried[one] = divergence(gone | {one})
        n, kind = best = min(tried, key=lambda one: (tried[one] - cost) / share[one[1]](one[0]))
        gone, cost, size = gone | {best}, tried[best], size + share[kind](n)
        near = {
            "layer": [(n, each) for each in ("attention", "ffn", "layer")],
            "pair": [(n + d, "pair") for d in (-1, 0, 1)],
        }
        left -= set(near.get(kind, [best, (n, "layer")]))
        print(f"| {'+'.join(kinds)} | {n} {kind} | {size / whole:.2f} | {cost:.3f} |", flush=True)
        how = {key: getattr(args, key) for key in ("model", "calibration", "windows", "seed")}
        row = {"row": "+".join(kinds), "layers": round(size / whole, 2), "gone": f"{n} {kind}", "divergence": cost}
        results.write("submodules", [{**how, **row}])


ROWS = {"layers": ("layer",), "submodules": ("attention", "ffn", "layer"), "pairs": ("pair",)}
opened = load.open_model(args.model, dtype="float32")
model, total = opened.model, len(layers(opened.model))
whole = sizes.layer_parameters(model, total // 2)
tokens = data.windows(data.calibration_text(args.calibration), opened.tokenizer, 512, args.windows, args.seed).tokens
seen = []
with torch.no_grad():
    for window in tokens.split(1):
        (state,), (calls,) = enter(model, [window])
        states = [state]
        for module, call in zip(layers(model), calls, strict=True):
            states.append(run_layer(module, states[-1], call))
        seen.append((window, states, calls, log_probabilities(window, states[-1])))
print("| what may go | next | layers' worth of parameters | KL, nats a token |\n|---|---|---|---|")
for name in args.rows.split(","):
    greedy(ROWS[name])
