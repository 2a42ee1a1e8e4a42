"""Run a model layer by layer and sum over the inputs of the readers of its axes.

    for layer in walk(model, tokens, ("ffn",), run, Route("dense")):
        G = layer.fit[axis.reader_module].gram  # for each axis of layer.axes
        ...                                     # edit the layer; in all streams but "dense" later layers see the edit

Memory holds one hidden state per token (two in the stream dense_target) and the sums of one layer, never of all layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from billhook.calibration.forward import check_finite, run_layer
from billhook.calibration.gram import add_upper, mirrored
from billhook.calibration.passage import Batch, Passage, Route, inputs_of, path_in_layer
from billhook.models.axes import Axis, axes
from billhook.models.families import layers
from billhook.runtime.memory import return_freed
from billhook.runtime.run import Run
from billhook.tensors import Cross, Gram, Tokens, precise


@dataclass
class ReaderSums:
    """Sums over tokens of one reader's input, X (tokens, in), and of what its output should gain, E (tokens, out).

    E is zero in all streams but `dense_target`, and there for all readers whose output is not added to the layer's
    output unchanged.  For the other it is `correction` times the unpruned model's output of the layer minus this
    model's, plus everything that dropped layers right after this one would have added.
    """

    gram: Gram  # X^T X
    cross: Cross | None = None  # E^T X
    energy: float | Tensor = 0.0  # ||E||_F^2; a tensor while it is summed, which nothing waits for

    def __add__(self, other: "ReaderSums") -> "ReaderSums":
        cross = self.cross if self.cross is None or other.cross is None else self.cross + other.cross
        return ReaderSums(self.gram + other.gram, cross, self.energy + other.energy)


Sums = dict[str, ReaderSums]  # by reader module


@dataclass(frozen=True)
class Layer:
    """One layer of the walk: its axes, and the sums over the windows to fit and over those held out."""

    number: int
    axes: list[Axis]
    fit: Sums
    held_out: Sums


def walk(
    model: PreTrainedModel, tokens: Tokens, kinds: tuple[str, ...], run: Run, route: Route = Route()
) -> Iterator[Layer]:
    """Yield the decoder layers of a route with the sums of their axes' readers.

    Layers that an earlier run has finished are restored and passed through, not yielded.

    Args:
        tokens: calibration windows (windows, length).

    Raises:
        BillhookError: an activation is not finite; the message names the module.
    """
    by_layer: dict[int, list[Axis]] = {n: [] for n in route.wanted(model)}
    for axis in axes(model, kinds):
        if axis.layer in by_layer:
            by_layer[axis.layer].append(axis)
    readers = [axis.reader_module for layer_axes in by_layer.values() for axis in layer_axes]
    passage = Passage(model, tokens, run, route, readers)
    sums = _recalled if passage.recalls else _summed
    for n in passage.stops("statistics"):
        # a layer's Grams may be most of the memory: this generator keeps no reference once it has yielded them
        yield Layer(n, by_layer[n], *sums(passage, n, by_layer[n]))


def _recalled(passage: Passage, _: int, layer_axes: Sequence[Axis]) -> tuple[Sums, Sums]:
    """The cached sums of an earlier walk in the dense stream."""
    sums: tuple[Sums, Sums] = ({}, {})
    for name in {axis.reader_module for axis in layer_axes}:
        for side, gram in zip(sums, passage.recall(name), strict=True):
            if gram is not None:
                side[name] = ReaderSums(gram)
    return sums


def _summed(passage: Passage, n: int, layer_axes: Sequence[Axis]) -> tuple[Sums, Sums]:
    """Run every batch through layer n as it is, and sum over the windows to fit and those held out."""
    paths = {axis.reader_module: path_in_layer(axis.reader_module, n) for axis in layer_axes}
    sums: tuple[Sums, Sums] = ({}, {})
    for batch in passage.batches:
        with passage.run.clock("forward"):
            inputs, after = inputs_of(
                layers(passage.model)[n], list(paths.values()), batch.state.read(), batch.calls[n]
            )
            assert after is not None
            lack = _lack(passage, batch, n, after)
        with passage.run.clock("gram"):
            for name, ends in {axis.reader_module: axis.ends_layer for axis in layer_axes}.items():
                _add(sums[batch.held_out], name, inputs[paths[name]], lack if ends else None, passage.every(batch))
    with passage.run.clock("gram"):
        for name, total in (*sums[0].items(), *sums[1].items()):
            total.gram, total.energy = mirrored(total.gram), float(total.energy)
            check_finite(f"the input of {name}", total.gram.diagonal())  # which overflows first
            check_finite(f"the output of {name}", total.energy, total.cross)
        for name, fit in sums[0].items():
            passage.remember(name, fit.gram, sums[1][name].gram if name in sums[1] else None)
    return_freed()
    return sums


def _lack(passage: Passage, batch: Batch, n: int, after: Tensor) -> Tensor | None:
    """What a layer's output, `after`, should gain, in float32, if there is a target, which moves on."""
    if passage.independent:
        passage.put(batch, n, after)
    if passage.independent or not passage.follows:
        return None
    dense = after if batch.uncut else run_layer(layers(passage.model)[n], batch.target.read(), batch.calls[n])
    target = passage.past(batch, n, dense)
    batch.target = passage.run.hidden.keep(target)
    after, dense, target = after.float(), dense.float(), target.float()  # differences of near numbers
    return passage.route.correction * (dense - after) + (target - dense)


def _add(
    sums: Sums, name: str, inputs: Tensor, lack: Tensor | None, every: Callable[[Tensor], Iterator[Tensor]]
) -> None:
    """Add one batch of every process to the sums of a reader; Grams stay upper triangles until the layer is done."""
    x, before = inputs.flatten(0, -2), sums.get(name)
    total = ReaderSums(add_upper(before.gram if before else None, x, every))
    if lack is not None:
        e = lack.flatten(0, -2)
        total.cross, total.energy = (before.cross, before.energy) if before else (None, 0.0)
        for cross in every(precise(e.T @ x.float())):
            total.cross = cross if total.cross is None else total.cross + cross
        for energy in every(precise(e.square()).sum()):
            total.energy = total.energy + energy
    sums[name] = total
