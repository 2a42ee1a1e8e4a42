"""Linear weights of the decoder layers become two thin ones each (LLM-ROM, arXiv:2312.07046; Bolaco, arXiv:2405.10616).

Layer by layer: the sums of what enters its weights, in the stream `sequential` from layers that are factored already;
the factors of each weight by a moment of its input (billhook.math.low_rank); two thin modules in its place.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from billhook.calibration.inputs import inputs
from billhook.calibration.passage import Route
from billhook.cuts.settings import Factoring as Settings
from billhook.math import low_rank
from billhook.math.low_rank import Factors
from billhook.models.families import linear, linears, weight_of
from billhook.models.surgery import factor
from billhook.runtime.run import Run
from billhook.tensors import Tokens, precise


@dataclass(frozen=True)
class Factored:
    """One weight that became two.  Errors are relative, ||Y - Y_r||_F / ||Y||_F, biases left out of Y."""

    layer: int
    role: str
    rank: int
    full: int  # the rank that it can have
    error: float  # on the calibration text
    error_held_out: float | None  # on windows that the factors did not see


@torch.no_grad()
def factorise(
    model: PreTrainedModel, tokens: Tokens, ranks: Mapping[str, int], settings: Settings, run: Run
) -> list[Factored]:
    """Factor the weights named in `ranks`, in place.

    Args:
        tokens: calibration windows (windows, length), of which the last tenth is held out.
        ranks: of each weight, by path.

    Raises:
        BillhookError: an activation is not finite; the message names the module.
    """
    done = [Factored(**one) for one in run.finished.found]
    for layer in inputs(model, tokens, ranks, run, Route(settings.stream)):
        roles = {path: role for group in linears(model, layer.number) for role, path in group.items()}
        now = []
        for path, sums in layer.fit.items():
            W, held, rank = precise(weight_of(model, path)), layer.held_out.get(path), ranks[path]
            with run.clock("factors"):
                found = low_rank.factors(W, sums, settings.moment)
                off = None if held is None else low_rank.output_error(W, found.at(rank), held)
                error = low_rank.output_error(W, found.at(rank), sums)
                now.append(Factored(layer.number, roles[path], rank, min(W.shape), error, off))
                _put(model, path, found, rank)
        with run.clock("saving"):
            run.finished.save(layer.number, [asdict(one) for one in now], [])
        done += now
    return sorted(done, key=lambda one: one.layer)


@torch.no_grad()
def factors_of(
    model: PreTrainedModel, tokens: Tokens, paths: list[str], settings: Settings, run: Run
) -> dict[str, Factors]:
    """Factors of weights to their full rank in the model's dtype, twice its weights or so; it stays as it is.

    To rounding those that `factorise` finds in the stream `dense`.
    """
    found: dict[str, Factors] = {}
    for layer in inputs(model, tokens, paths, run, Route("dense")):
        for path, sums in layer.fit.items():
            with run.clock("factors"):
                W = weight_of(model, path)
                found[path] = low_rank.factors(W, sums, settings.moment).cast(W.dtype)
    return found


@contextmanager
def factored(model: PreTrainedModel, known: Mapping[str, Factors], ranks: Mapping[str, int]) -> Iterator[None]:
    """While open, the weights named in `ranks` are two thin ones; no number is copied but in another dtype."""
    with ExitStack() as undo:
        for path, rank in ranks.items():
            undo.callback(model.set_submodule, path, linear(model, path))
            _put(model, path, known[path], rank)
        yield


def _put(model: PreTrainedModel, path: str, found: Factors, rank: int) -> None:
    module = linear(model, path)
    expand, reduce, added = (part.to(module.weight) for part in found.at(rank))
    factor(model, path, expand, reduce, added if module.bias is None else module.bias.data + added)
