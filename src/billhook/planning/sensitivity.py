"""What cutting one layer costs the model:
the divergence from its own dense predictions, with the cut in place and undone.

Each axis of each layer is cut alone, at a few counts, and restored in closed form as it will be (FASP's steps); then
the layers after it run on a few probe windows that the restoration never saw.  No gradients.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.calibration.forward import enter, head, run_layer
from billhook.calibration.passage import Route
from billhook.calibration.walk import Layer, walk
from billhook.cuts.narrowing import Settings, fit
from billhook.models.axes import Axis, reader_weight
from billhook.models.families import layers
from billhook.models.plan import Curves, UnitScores
from billhook.planning.texts import Texts
from billhook.runtime.progress import Clock, quiet
from billhook.runtime.run import Run
from billhook.tensors import Scores, Tokens

POINTS = (0.125, 0.25, 0.5, 0.75)  # shares of an axis that are tried
REFERENCE_BYTES = 2**28  # dense log-probabilities that are kept: positions are thinned out to fit


class Probe:
    """Windows on which a model's predictions are compared with its own dense ones, from any layer on."""

    def __init__(self, model: PreTrainedModel, tokens: Tokens) -> None:
        self.model, self.tokens = model, tokens.to(model.device)
        (self.state,), (self.calls,) = enter(model, [self.tokens])
        self._first, self.at = self.state, 0
        entries = tokens.numel() * model.config.vocab_size
        self.every = max(1, -(-4 * entries // REFERENCE_BYTES))
        self.reference = self._log_probabilities(self.after(0))

    def begin(self) -> None:
        """Go back before the first layer."""
        self.state, self.at = self._first, 0

    def advance(self) -> None:
        """Move on to the next layer, the present one as it is."""
        self.state = run_layer(layers(self.model)[self.at], self.state, self.calls[self.at])
        self.at += 1

    def divergence(self, start: int) -> float:
        """KL(dense || model as it is now) in nats a token, the present state taken as the input of layer `start`."""
        return self._from(self._log_probabilities(self.after(start)))

    def after(self, start: int) -> Tensor:
        """What the last layer puts out, the present state taken as the input of layer `start`."""
        state = self.state
        for n in range(start, len(layers(self.model))):
            state = run_layer(layers(self.model)[n], state, self.calls[n])
        return state

    @torch.no_grad()
    def divergences_of(self, other: PreTrainedModel) -> list[float]:
        """KL(dense || another model) in nats a token, of each window."""
        found = []
        for window, dense in zip(self.tokens, self.reference, strict=True):
            logits = other(window[None], use_cache=False, logits_to_keep=self._kept).logits
            now = torch.log_softmax(logits.float(), -1)[0]
            found.append((dense.exp() * (dense - now)).sum(-1).mean().item())
        return found

    @property
    def _kept(self) -> Tensor:
        return torch.arange(0, self.tokens.shape[1], self.every, device=self.tokens.device)

    def _from(self, now: Tensor) -> float:
        return (self.reference.exp() * (self.reference - now)).sum(-1).mean().item()

    def _log_probabilities(self, state: Tensor) -> Tensor:
        return torch.log_softmax(head(self.model, self.tokens, state, self._kept).float(), -1)


def curves(
    model: PreTrainedModel,
    texts: Texts,
    kinds: tuple[str, ...],
    settings: Settings,
    run: Run,
    *,
    scores: UnitScores | None = None,
    whole_layers: bool = False,
) -> Curves:
    """The loss of cutting every axis of `kinds` alone, at `POINTS` of its units; the model is left as it was.

    Args:
        texts: windows to calibrate on, for the scores and the restoration; and other windows, for the divergence.
        scores: of the units of each axis, by (layer, kind), where they come from elsewhere than `settings.score`.
        whole_layers: also what each whole layer costs, as kind `layers`.
    """
    total, probe, found, scores = len(layers(model)), Probe(model, texts.probe), Curves(), scores or {}
    for layer in walk(model, texts.calibration, kinds, replace(run, tick=quiet), Route(held_out=0.0)):
        run.tick("sensitivity", layer.number, total)
        with run.clock("sensitivity"):
            for axis in layer.axes:
                place = (axis.layer, axis.kind)
                found[place] = _axis_curve(model, axis, layer, probe, settings, scores.get(place), run.clock)
            if whole_layers:
                found[layer.number, "layers"] = {1: probe.divergence(layer.number + 1)}
            probe.advance()
    run.tick("sensitivity", total, total)
    return found


def counts(axis: Axis, points: Sequence[float] = POINTS) -> list[int]:
    """How many units to try: shares of the axis, whole multiples of its blocks, at least one a block, never all."""
    each = axis.units // axis.blocks
    return sorted({axis.blocks * min(max(round(point * each), 1), each - 1) for point in points} - {0})


def _axis_curve(
    model: PreTrainedModel,
    axis: Axis,
    layer: Layer,
    probe: Probe,
    settings: Settings,
    scores: Scores | None,
    clock: Clock,
) -> dict[int, float]:
    W, evidence = reader_weight(model, axis), layer.fit[axis.reader_module]
    whole, found = W.clone(), {}
    for count in counts(axis):
        fitted = fit(axis, whole.to(evidence.gram.device), evidence, count, settings, clock, scores)
        W.zero_()
        W[:, fitted.kept.to(W.device)] = fitted.weight.to(W)
        found[count] = probe.divergence(axis.layer)
        W.copy_(whole)
    return found
