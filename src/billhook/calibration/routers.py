"""What the routers of a mixture of experts do on a text, layer by layer."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.calibration.forward import BATCH_TOKENS, enter, run
from billhook.calibration.walk import Finished
from billhook.errors import BillhookError
from billhook.models.families import layers, mixture, router_path, row_of
from billhook.runtime.activations import State, keep
from billhook.runtime.memory import return_freed
from billhook.runtime.offload import loaded
from billhook.runtime.progress import Clock, Tick, quiet
from billhook.tensors import Gram, Scores, Tokens, precise


@dataclass
class Routing:
    """Over the tokens of the windows to fit: sums for each expert, float64."""

    tokens: int
    frequency: Scores  # tokens that go to it
    output: Scores  # over them, sum of g(x) ||E(x)||: its weight times the norm of what it puts out
    logits: Gram  # L^T L of the router's logits L (tokens, experts)

    @property
    def saliency(self) -> Scores:
        """REAP's (arXiv:2510.13999): the mean of g(x) ||E(x)|| over the tokens that go to an expert."""
        return self.output / self.frequency.clamp(min=1)


@dataclass(frozen=True)
class Mixture:
    """One stop: a layer's routing, and what goes into its mixture and comes out (tokens, hidden), by batch and whether held out."""

    layer: int
    routing: Routing
    block: nn.Module
    seen: list[tuple[State, State, bool]]


@torch.no_grad()
def mixtures(
    model: PreTrainedModel,
    tokens: Tokens,
    *,
    stream: str = "dense",
    held_out: float = 0.1,
    finished: Finished | None = None,
    clock: Clock | None = None,
    tick: Tick = quiet,
) -> Iterator[Mixture]:
    """Yield every layer that mixes experts, apart (billhook.models.experts), on the inputs that `stream` says; its weights are there until
    the next one is asked for.

    Args:
        finished: layers that are made what they became and passed through, not yielded.

    Raises:
        BillhookError: an activation is not finite; the message names the module.
    """
    clock = clock or Clock()
    count = len(tokens) - int(held_out * len(tokens))
    rows = max(1, BATCH_TOKENS // tokens.shape[1])
    batches = [
        (part, side) for some, side in ((tokens[:count], False), (tokens[count:], True)) for part in some.split(rows)
    ]
    batches = [(part, side) for part, side in batches if len(part)]
    with clock("forward"):
        states, calls = enter(model, [part for part, _ in batches], keep)
    for n, module in enumerate(layers(model)):
        tick("routing", n, len(layers(model)))
        passed = [one[n] for one in calls]
        if finished is not None and n in finished.records:
            with clock("forward"), loaded(module, edits=False):
                _onward(module, states if stream == "dense" else [], passed)
            finished.reload(n)
            with clock("forward"), loaded(module, edits=False):
                _onward(module, states if stream != "dense" else [], passed)
            continue
        experts: Any = mixture(model, n)
        if experts is None:
            with clock("forward"), loaded(module, edits=False):
                _onward(module, states, passed)
            continue
        block = module.get_submodule(row_of(model).experts.rpartition(".")[0])
        zeros = torch.zeros(len(experts), dtype=torch.float64)
        routing, seen = Routing(0, zeros, zeros.clone(), torch.zeros(len(zeros), len(zeros), dtype=torch.float64)), []
        with loaded(module):
            for b, state in enumerate(states):
                with clock("forward"), _tapped(model, n, block, experts) as found:
                    after = run(module, state.read(), passed[b])
                seen.append((keep(found["in"]), keep(found["out"]), batches[b][1]))
                if stream == "dense":
                    states[b] = keep(after)
                if not batches[b][1]:
                    with clock("routing"):
                        _count(routing, found, n)
            yield Mixture(n, routing, block, seen)
            return_freed()
            if stream != "dense":
                with clock("forward"):
                    _onward(module, states, passed)
    tick("routing", 1, 1)


def _onward(module: nn.Module, states: list[State], passed: list[dict[str, Any]]) -> None:
    """Every batch through a layer, in place."""
    for b, state in enumerate(states):
        states[b] = keep(run(module, state.read(), passed[b]))


def _count(routing: Routing, found: dict[Any, Any], layer: int) -> None:
    logits, weights, index = found["router"]
    if not logits.isfinite().all():
        raise BillhookError(f"the router of layer {layer} puts out what is not finite: try --dtype float32")
    routing.tokens += len(logits)
    x = precise(logits).cpu()
    routing.logits += x.T @ x
    for number in range(len(routing.frequency)):
        token, place = torch.where(index == number)
        routing.frequency[number] += len(token)
        norms = found[number].float().norm(dim=-1) * weights[token, place].float()
        routing.output[number] += precise(norms).sum().item()


@contextmanager
def _tapped(model: PreTrainedModel, layer: int, block: nn.Module, experts: nn.ModuleList) -> Iterator[dict[Any, Any]]:
    """Yield a dict that, while the context is open, receives what enters and leaves a mixture ("in", "out"), and what its
    router ("router") and its experts (by number) put out."""
    found: dict[Any, Any] = {}

    def both(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        found.update({"in": args[0], "out": out})

    def tap(name: str | int) -> Callable[..., None]:
        return lambda _, __, out: found.update({name: out})

    hooked = [(block, both), (model.get_submodule(router_path(model, layer)), tap("router"))]
    hooked += [(expert, tap(number)) for number, expert in enumerate(experts)]
    with ExitStack() as hooks:
        for module, hook in hooked:
            hooks.callback(module.register_forward_hook(hook).remove)
        yield found
