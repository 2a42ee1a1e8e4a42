"""Queries and keys lose rotary pairs (`billhook.math.rotary_pairs`): what each pair is worth, and the cut."""

import torch
from transformers import PreTrainedModel

from billhook.calibration.inputs import inputs
from billhook.calibration.passage import Route
from billhook.math.rotary_pairs import energies, in_common, pair_scores
from billhook.models.families import attention, layers, linear, module_path, row_of
from billhook.runtime.run import Run
from billhook.tensors import PairScores, Tokens

ENOUGH = 8192  # tokens, for energies of single channels


@torch.no_grad()
def scores_of_pairs(model: PreTrainedModel, tokens: Tokens, alike: bool, run: Run) -> dict[int, PairScores]:
    """What each rotary pair is worth, by layer, in the unpruned model.

    Args:
        tokens: calibration windows (windows, length), of which the first `ENOUGH` tokens are read.
        alike: whether all heads of all layers get the same scores, so that they keep the same pairs.
    """
    few = tokens[: max(1, ENOUGH // tokens.shape[1])]
    row, found = row_of(model), dict[int, PairScores]()
    paths = {n: [module_path(model, n, f"{row.attention}.{name}") for name in (row.q, row.k)] for n in _numbers(model)}
    wanted = [path for of_layer in paths.values() for path in of_layer]
    for layer in inputs(model, few, wanted, run, Route("dense", held_out=0.0)):
        sizes = attention(model, layer.number)
        with run.clock("pairs"):
            queries, keys = (
                energies(module.weight.data, getattr(module.bias, "data", None), layer.fit[path], heads)
                for path, heads in zip(paths[layer.number], (sizes.heads, sizes.kv_heads), strict=True)
                if (module := linear(model, path))
            )
            found[layer.number] = pair_scores(queries, keys)
    return dict.fromkeys(found, in_common(list(found.values()))) if alike else found


def _numbers(model: PreTrainedModel) -> range:
    return range(len(layers(model)))
