"""FASP: Fast and Accurate Structured Pruning of Large Language Models (Hu et al. 2025, arXiv:2501.09412).

W (out, in) reads an axis;  X (tokens, in) is what enters it;  G = X^T X.
1. Coupling     column j of a reader is fed by row j of its writers (and their biases): they go together, and the rows
                cost nothing beyond what the column costs.
2. Score        s_j = sum_i |W_ij| ||X_j||_2, Wanda summed over the column (`score="wanda"`); a unit of several columns
                takes their sum.
3. Restoration  W_S = argmin_V ||V X_S^T - W X^T||_F^2 over the kept columns S, in closed form from G.

Where this differs from the paper.  The default score is the optimal-brain-surgery column score, the error left *after*
step 3.  The ridge of step 3 draws toward the kept weights.  In the default stream, `dense_target`, step 3 also makes up
a share `correction` of E, what the layers before have cost the residual stream: W X^T + correction * E^T in place of
W X^T.  docs/LOG.md has what each is worth.  The paper prunes value channels in attention, which no stock attention class
can hold; here whole query heads or KV groups go, where the user asks for them.  The paper's body was not at hand
(abstract and reviews were): its damping, its stream and its tables are open, and nothing here claims to reproduce them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from billhook import choose, restore
from billhook.axes import Axis, reader_weight
from billhook.cuts import Cut
from billhook.observe import Evidence, Layer, walk
from billhook.progress import Clock, Tick, quiet
from billhook.scores import SCORES
from billhook.surgery import remove
from billhook.tensors import Cross, Kept, Narrowed, Tokens, Weight


@dataclass(frozen=True)
class Settings:
    """What may be chosen; why these defaults, and which were only tried in passing: docs/LOG.md."""

    score: str = "obs"
    damping: float = 1e-3  # ridge as a share of the mean diagonal of G, for score and restoration
    restoration: bool = True
    correction: float = 0.3  # share of E to make up, in the dense_target stream

    def pull(self, evidence: Evidence) -> Cross | None:
        """correction * E^T X, if there is any to make up."""
        return None if evidence.cross is None or not self.restoration else self.correction * evidence.cross


@torch.no_grad()
def fasp(
    model: PreTrainedModel,
    tokens: Tokens,
    drops: Mapping[str, int],
    settings: Settings = Settings(),
    *,
    stream: str = "dense_target",
    clock: Clock | None = None,
    tick: Tick = quiet,
) -> list[Cut]:
    """Remove from every layer `drops[kind]` units of each kind of axis, in place, and restore what reads them.

    Args:
        tokens: calibration windows (windows, length).
        drops: units to drop from each layer, by kind of axis.
    """
    clock = clock or Clock()
    return [
        cut(model, axis, layer, drops[axis.kind], settings, clock)
        for layer in walk(model, tokens, tuple(drops), stream=stream, clock=clock, tick=tick)
        for axis in layer.axes
    ]


def cut(model: PreTrainedModel, axis: Axis, layer: Layer, count: int, settings: Settings, clock: Clock) -> Cut:
    """Steps 1-3 on one axis.  The held-out windows first judge a fit on the others, then join it."""
    fit, held = layer.fit[axis.reader_module], layer.held_out.get(axis.reader_module)
    seen = fit if held is None else fit + held
    W = reader_weight(model, axis).to(seen.gram.device)
    with clock("score"):
        s = axis.pool(SCORES[settings.score](W, seen.gram, settings.damping))
        drop, keep = choose.lowest(s, count, axis.blocks)
        kept = axis.columns(keep)
    with clock("restoration"):
        V, used = _restored(W, seen, kept, settings)
    with clock("errors"):
        before, after = _error(W, W[:, kept], seen, kept, settings), _error(W, V, seen, kept, settings)
        unseen = None if held is None else _error(W, _restored(W, fit, kept, settings)[0], held, kept, settings)
    with clock("surgery"):
        remove(model, axis, drop)
        reader_weight(model, axis).copy_(V)
    return Cut(axis.layer, axis.kind, axis.units, len(drop), used, before, after, unseen)


def _restored(W: Weight, evidence: Evidence, kept: Kept, settings: Settings) -> tuple[Narrowed, float]:
    if not settings.restoration:
        return W[:, kept], 0.0
    return restore.least_squares(W, evidence.gram, kept, settings.damping, settings.pull(evidence))


def _error(W: Weight, V: Narrowed, evidence: Evidence, kept: Kept, settings: Settings) -> float:
    energy = settings.correction**2 * evidence.energy if settings.restoration else 0.0
    return restore.relative_error(W, V, evidence.gram, kept, settings.pull(evidence), energy)
