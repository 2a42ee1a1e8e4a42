"""Importance of layers, measured: their influence on the hidden state, or the loss without them.

One pass over a few windows scores every layer.  For a loss the layers are skipped in the forward pass; nothing is cut.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from hashlib import sha256
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.calibration.forward import enter, head, run_layer
from billhook.calibration.gradients import WINDOW, element_sums
from billhook.errors import BillhookError
from billhook.math import layer_presets
from billhook.models.families import layers, linears
from billhook.models.multimodal import within
from billhook.runtime import cache
from billhook.runtime.offload import is_offloaded, loaded
from billhook.runtime.progress import Tick, quiet
from billhook.runtime.run import Run
from billhook.tensors import Probes, Tokens, precise

KEPT_BY_TAYLOR = (4, 2)  # how many of the first layers, and of the last, always stay
STAGE = "measuring layers"
SHORTLIST = 6  # blocks that are tried on all windows, after one window has seen every block
EVERY = 4  # positions of which one is compared


def chosen(
    model: PreTrainedModel,
    preset: str,
    count: int,
    tokens: Tokens,
    probe: Probes,
    run: Run,
    seed: int = 0,
) -> list[int]:
    """The `count` layers that a preset drops, ascending; the first and the last stay.

    Args:
        tokens: windows for measures that take one pass.
        probe: fewer windows, for losses: every layer or block takes a pass of its own.
        run: its `statistics` keeps measurements, for later calls with other counts.

    Raises:
        BillhookError: the preset keeps more layers than would be left.
    """
    total = len(layers(model))
    if preset in layer_presets.POSITIONS:
        return layer_presets.POSITIONS[preset](total, count)
    if preset == "random":
        return layer_presets.random_layers(total, count, seed)

    tick, key = run.tick, _key(model, tokens, probe) if run.statistics else {}

    def measured(name: str, measure: Callable[[], Any], **options: int) -> Any:
        return cache.cached(run.statistics, name, {**key, "criterion": name, **options}, measure)

    if preset == "block-influence":
        return layer_presets.lowest_layers(measured(preset, lambda: block_influence(model, tokens, tick)), count)
    if preset == "angular":
        distances = measured(preset, lambda: angular_distances(model, tokens, tick))
        return _block(min(_starts(model, count), key=lambda n: distances[n][n + count]), count)
    if preset == "perplexity":
        return layer_presets.lowest_layers(measured(preset, lambda: losses_without_each(model, probe, (), tick)), count)
    if preset == "contiguous":
        losses = measured(preset, lambda: losses_without_blocks(model, probe, count, tick), count=count)
        return _block(min(_starts(model, count), key=lambda n: losses[n - 1]), count)
    if preset == "greedy":
        dropped: list[int] = []
        for n in range(count):
            remaining = [m for m in range(1, total - 1) if m not in dropped]
            losses = measured(preset, lambda: losses_without_each(model, probe, dropped, tick), step=n)
            dropped.append(min(remaining, key=lambda m: losses[m]))
        return sorted(dropped)
    may_go = _range_of_taylor(total, count)
    scores = measured(preset, lambda: taylor_scores(model, tokens, tick))
    return layer_presets.lowest_layers([score if n in may_go else math.inf for n, score in enumerate(scores)], count)


def missed_least(model: PreTrainedModel, count: int, probe: Probes, run: Run) -> list[int]:
    """The `count` neighbouring layers without which predictions change least: all blocks are tried on the first
    window, the best of them on the others, too.

    One window tells blocks that ruin a model from others, and not which of the others is best.

    Args:
        probe: windows (windows, length).
        run: its `statistics` keeps what was found.
    """
    blocks = [_block(n, count) for n in _starts(model, count)]

    def measured() -> list[int]:
        first = _divergences(model, probe[:1], [set(block) for block in blocks], run.tick)
        best = sorted(range(len(blocks)), key=lambda n: first[n])[:SHORTLIST]
        if len(probe) == 1:
            return blocks[best[0]]
        rest = _divergences(model, probe[1:], [set(blocks[n]) for n in best], run.tick)
        totals = {n: first[n] + (len(probe) - 1) * loss for n, loss in zip(best, rest, strict=True)}
        return blocks[min(totals, key=lambda n: totals[n])]

    key = {**_key(model, probe), "criterion": "missed least", "count": count} if run.statistics else {}
    return cache.cached(run.statistics, "missed least", key, measured)


def _starts(model: PreTrainedModel, count: int) -> range:
    """Where a block of `count` layers may start: the first and the last layer stay, and those that images reach."""
    total, stands = len(layers(model)), within(model)
    first = max(1, stands.kept_layers if stands else 0)
    if not (starts := range(first, total - count)):
        raise BillhookError(f"no {count} neighbouring layers of {total} can go: the first {first} and the last stay")
    return starts


def _key(model: PreTrainedModel, *windows: Tensor) -> dict[str, Any]:
    """All that decides what is measured, besides the measure."""
    return cache.model_key(model) | {"windows": [sha256(part.numpy().tobytes()).hexdigest() for part in windows]}


def _range_of_taylor(total: int, count: int) -> range:
    """The layers that the preset taylor may drop."""
    first, last = KEPT_BY_TAYLOR
    may_go = range(first, max(total - last, first))
    if count > len(may_go):
        raise BillhookError(
            f"--preset taylor keeps the first {first} and the last {last} of {total} layers: at most {len(may_go)} can "
            f"go, and {count} would; ask for less, or use another --preset"
        )
    return may_go


def block_influence(model: PreTrainedModel, tokens: Tokens, tick: Tick = quiet) -> list[float]:
    """BI_n = 1 - E cos(x_n, x_n+1) of every layer; x_n (tokens, hidden) is its input.

    In float32, without each window's first token: it is an attention sink, and its state is unlike any other.
    """

    def alike(before: Tensor, after: Tensor) -> Tensor:
        return precise(torch.cosine_similarity(before[:, 1:].float(), after[:, 1:].float(), dim=-1)).sum()

    parts = [list(map(alike, before, after)) for before, after in pairwise(_each_layer(model, tokens, tick))]
    return [1 - total / (tokens.numel() - len(tokens)) for total in _sums(parts)]


def angular_distances(model: PreTrainedModel, tokens: Tokens, tick: Tick = quiet) -> list[list[float]]:
    """d[l][m] = arccos cos(x_l, x_m) / pi at the last token, mean over windows:
    the angle that layers l to m - 1 turn."""
    last = [torch.cat([state[:, -1] for state in states]) for states in _each_layer(model, tokens, tick)]
    x = torch.nn.functional.normalize(precise(torch.stack(last)), dim=-1)  # (states, windows, hidden)
    cosine = torch.einsum("awh,bwh->abw", x, x).clamp(-1, 1)
    return (cosine.arccos() / math.pi).mean(-1).tolist()


def losses_without_each(
    model: PreTrainedModel, probe: Probes, gone: Sequence[int] = (), tick: Tick = quiet
) -> list[float]:
    """The loss, in nats a token, without layer n and without the layers `gone`, for every n."""
    return _losses(model, probe, [{n, *gone} for n in range(len(layers(model)))], tick)


def losses_without_blocks(model: PreTrainedModel, probe: Probes, count: int, tick: Tick = quiet) -> list[float]:
    """The loss without layers n to n + count - 1, for n = 1, 2, … while the last layer stays."""
    total = len(layers(model))
    return _losses(model, probe, [set(_block(n, count)) for n in range(1, total - count)], tick)


def taylor_scores(model: PreTrainedModel, tokens: Tokens, tick: Tick = quiet) -> list[float]:
    """sum |w dL/dw| over the linear weights of each layer: attention's, every FFN's, every expert's.

    Routers are left out: the paper names the projections (q, k, v, o, gate, up, down), and routers only choose.
    """
    layer_of = {
        f"{path}.weight": n for n in range(len(layers(model))) for group in linears(model, n) for path in group.values()
    }
    scores = [0.0] * len(layers(model))
    sums = element_sums(model, tokens[:, :WINDOW], list(layer_of), tick)
    for layer, total in zip(layer_of.values(), sums, strict=True):
        scores[layer] += total
    return scores


def _block(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


@torch.no_grad()
def _each_layer(model: PreTrainedModel, tokens: Tokens, tick: Tick) -> Iterator[list[Tensor]]:
    """For each layer what enters it (1, length, hidden), a window each; then what the last one puts out."""
    states, calls = enter(model, list(tokens.split(1)))
    for n, module in enumerate(layers(model)):
        yield states
        tick(STAGE, n, len(layers(model)))
        with loaded(module, edits=False):
            states = [run_layer(module, state, call[n]) for state, call in zip(states, calls, strict=True)]
    tick(STAGE, len(layers(model)), len(layers(model)))
    yield states


def _sums(parts: Sequence[Sequence[Tensor]]) -> list[float]:
    """Of each row of numbers, in one transfer."""
    return [sum(row) for row in torch.stack([torch.stack(list(row)) for row in parts]).tolist()] if parts else []


Judge = Callable[[Tensor], Tensor]  # a number; of the last layer's output (1, length, hidden)


@torch.no_grad()
def _losses(model: PreTrainedModel, probe: Probes, without: Sequence[Collection[int]], tick: Tick) -> list[float]:
    """Mean loss of the model without each set of layers."""

    def judge(ids: Tensor, _: Tensor) -> Judge:
        return lambda state: torch.nn.functional.cross_entropy(head(model, ids, state)[0, :-1].float(), ids[0, 1:])

    return _judged(model, probe, without, judge, tick)


@torch.no_grad()
def _divergences(model: PreTrainedModel, probe: Probes, without: Sequence[Collection[int]], tick: Tick) -> list[float]:
    """KL(model || the model without each set of layers), nats a token, mean over every fourth position."""
    keep = torch.arange(0, probe.shape[1], EVERY, device=model.device)

    def judge(ids: Tensor, whole: Tensor) -> Judge:
        def log_probabilities(state: Tensor) -> Tensor:
            return torch.log_softmax(head(model, ids, state, keep).float(), -1)

        before = log_probabilities(whole)
        return lambda state: (before.exp() * (before - log_probabilities(state))).sum(-1).mean()

    return _judged(model, probe, without, judge, tick)


def _judged(
    model: PreTrainedModel,
    probe: Probes,
    without: Sequence[Collection[int]],
    judge: Callable[[Tensor, Tensor], Judge],
    tick: Tick,
) -> list[float]:
    """What the model without each set of layers is judged by, mean over windows; layers before a set are run once.

    A window after the other, but where weights are read from files: then a layer is read once for all windows.

    Args:
        judge: makes the judge of a window from its ids and what the whole model's last layer puts out.
    """
    groups, total = probe.split(len(probe) if is_offloaded(model) else 1), len(layers(model))
    parts: list[list[Tensor]] = [[] for _ in without]
    for g, group in enumerate(groups):

        def tick_layer(n: int, g: int = g) -> None:
            tick(STAGE, g * total + n, len(groups) * total)

        whole, ends = _ends(model, group, without, tick_layer)
        for w, window in enumerate(group.split(1)):
            judged = judge(window.to(model.device), whole[w])
            for part, states in zip(parts, ends, strict=True):
                part.append(judged(states[w]))
    tick(STAGE, len(groups) * total, len(groups) * total)
    return [loss / len(probe) for loss in _sums(parts)]


def _ends(
    model: PreTrainedModel, windows: Probes, without: Sequence[Collection[int]], tick: Callable[[int], None]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """What the last layer puts out (1, length, hidden) for each window:
    of the whole model, and of the model without each set of layers."""
    whole, calls = enter(model, list(windows.split(1)))
    ends = [whole] * len(without)
    for n, module in enumerate(layers(model)):
        tick(n)

        def moved(states: list[Tensor], n: int = n, module: Any = module) -> list[Tensor]:
            return [run_layer(module, state, call[n]) for state, call in zip(states, calls, strict=True)]

        with loaded(module, edits=False):
            after = moved(whole)
            ends = [
                after if n < min(gone) else states if n in gone else moved(states)
                for states, gone in zip(ends, without, strict=True)
            ]
        whole = after
    return whole, ends
