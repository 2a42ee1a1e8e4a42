"""Run a model layer by layer and keep sums of what enters linear weights, with means: block by block of the text.

for layer in inputs(model, tokens, wanted, run, Route("sequential")):
    for name in layer.fit:  # path of each weight that is wanted of the layer
        C = weight @ layer.fit[name].gram @ weight.T
    ...                     # edit the layer; in the stream `sequential` later layers see the edit
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from billhook.calibration.forward import check_finite
from billhook.calibration.gram import gram_of
from billhook.calibration.passage import Passage, Route, inputs_of, path_in_layer
from billhook.math.low_rank import InputSums, block_sums
from billhook.models.families import layers, linears
from billhook.runtime.run import Run
from billhook.tensors import Tokens, precise


@dataclass(frozen=True)
class LayerInputs:
    """The sums of one layer's weights, by path, over the windows to fit and over those held out."""

    number: int
    fit: Mapping[str, InputSums]
    held_out: Mapping[str, InputSums]


@torch.no_grad()
def inputs(
    model: PreTrainedModel, tokens: Tokens, wanted: Collection[str], run: Run, route: Route
) -> Iterator[LayerInputs]:
    """Yield the layers that have one of the weights `wanted`, by path; the streams are `dense` and `sequential`.

    A block of the pooled moment is what passes a layer at once.  Layers that an earlier run has finished are restored
    and passed through, not yielded.

    Args:
        tokens: calibration windows (windows, length).

    Raises:
        BillhookError: an activation is not finite; the message names the module.
    """
    groups = {n: found for n in route.wanted(model) if (found := _groups(model, n, wanted))}
    passage = Passage(model, tokens, run, Route(route.stream, route.held_out, only=groups))
    for n in passage.stops("factoring"):
        sums: tuple[dict[str, InputSums], dict[str, InputSums]] = ({}, {})
        first = [path_in_layer(names[0], n) for names in groups[n]]  # one of those that share an input
        for batch in passage.batches:
            with run.clock("forward"):
                found, after = inputs_of(layers(model)[n], first, batch.state.read(), batch.calls[n])
            with run.clock("gram"):
                for path, names in zip(first, groups[n], strict=True):
                    x = found[path].flatten(0, -2).float()
                    block = block_sums(gram_of(x), precise(x).sum(0), len(x))
                    check_finite(f"the input of {names[0]}", block.gram.diagonal())
                    side = sums[batch.held_out]
                    side |= dict.fromkeys(names, side[names[0]] + block if names[0] in side else block)
            if passage.independent and after is not None:
                passage.put(batch, n, after)
        yield LayerInputs(n, *sums)


def _groups(model: PreTrainedModel, n: int, wanted: Collection[str]) -> list[list[str]]:
    """The weights of layer n that are wanted, those together that share an input."""
    groups = [[path for path in group.values() if path in wanted] for group in linears(model, n)]
    return [names for names in groups if names]
