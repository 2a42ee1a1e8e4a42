"""Statistics of the routers of a mixture of experts on a text, layer by layer."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.calibration.forward import check_finite, run_layer
from billhook.calibration.passage import Passage, Route
from billhook.models.families import layers, mixture, router_path, row_of
from billhook.runtime.activations import State
from billhook.runtime.run import Run
from billhook.tensors import Gram, Scores, Tokens, precise


@dataclass
class Routing:
    """Sums over the tokens of the windows to fit, for each expert, float64."""

    tokens: int
    frequency: Scores  # tokens that go to the expert
    output: Scores  # sum of g(x) ||E(x)|| over those tokens: routing weight times norm of the output
    logits: Gram  # L^T L of the router's logits L (tokens, experts)

    @property
    def saliency(self) -> Scores:
        """REAP's score (arXiv:2510.13999): the mean of g(x) ||E(x)|| over the tokens that go to an expert."""
        return self.output / self.frequency.clamp(min=1)


@dataclass(frozen=True)
class Mixture:
    """One layer of the walk: its routing, and for every batch the mixture's input and output (tokens, hidden), and
    whether the batch is held out."""

    layer: int
    routing: Routing
    block: nn.Module
    seen: list[tuple[State, State, bool]]


@torch.no_grad()
def mixtures(model: PreTrainedModel, tokens: Tokens, run: Run, route: Route = Route()) -> Iterator[Mixture]:
    """Yield every layer with a mixture of unfused experts (billhook.models.experts), on a route that drops none.

    The layer's weights are in memory until the next one is asked for.  Layers that an earlier run has finished are
    restored and passed through, not yielded.

    Raises:
        BillhookError: an activation is not finite; the message names the module.
    """
    places = [n for n in route.wanted(model) if mixture(model, n) is not None]
    passage = Passage(model, tokens, run, replace(route, only=places))
    for n in passage.stops("routing"):
        module, experts = layers(model)[n], cast(nn.ModuleList, mixture(model, n))
        block = module.get_submodule(row_of(model).experts.rpartition(".")[0])
        zeros = torch.zeros(len(experts), dtype=torch.float64)
        routing, seen = Routing(0, zeros, zeros.clone(), torch.zeros(len(zeros), len(zeros), dtype=torch.float64)), []
        for batch in passage.batches:
            with run.clock("forward"), _tapped(model, n, block, experts) as records:
                after = run_layer(module, batch.state.read(), batch.calls[n])
            seen.append((run.hidden.keep(records["in"]), run.hidden.keep(records["out"]), batch.held_out))
            if passage.independent:
                passage.put(batch, n, after)
            if not batch.held_out:
                with run.clock("routing"):
                    _count(routing, records, n)
        yield Mixture(n, routing, block, seen)


def _count(routing: Routing, records: dict[Any, Any], layer: int) -> None:
    logits, weights, index = records["router"]
    check_finite(f"what the router of layer {layer} puts out", logits)
    routing.tokens += len(logits)
    x = precise(logits).cpu()
    routing.logits += x.T @ x
    for number in range(len(routing.frequency)):
        token, place = torch.where(index == number)
        routing.frequency[number] += len(token)
        norms = records[number].float().norm(dim=-1) * weights[token, place].float()
        routing.output[number] += precise(norms).sum().item()


@contextmanager
def _tapped(model: PreTrainedModel, layer: int, block: nn.Module, experts: nn.ModuleList) -> Iterator[dict[Any, Any]]:
    """Yield a dict that, while the context is open, records a mixture's input ("in") and output ("out"), and the
    outputs of its router ("router") and of its experts (by number)."""
    records: dict[Any, Any] = {}

    def both(_: nn.Module, args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        records.update({"in": args[0], "out": out[0] if isinstance(out, tuple) else out})

    def tap(name: str | int) -> Callable[..., None]:
        return lambda _, __, out: records.update({name: out})

    hooked = [(block, both), (model.get_submodule(router_path(model, layer)), tap("router"))]
    hooked += [(expert, tap(number)) for number, expert in enumerate(experts)]
    with ExitStack() as hooks:
        for module, hook in hooked:
            hooks.callback(module.register_forward_hook(hook).remove)
        yield records
