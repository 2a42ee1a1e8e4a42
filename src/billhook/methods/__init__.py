"""Every method: an explicit table of what it is, where it comes from, what it prunes and what it needs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from billhook.cuts import Cut
from billhook.methods.fasp import fasp, fasp_each
from billhook.methods.layerchop import layerchop


@dataclass(frozen=True)
class Method:
    """One row of `billhook methods`."""

    run: Callable[..., list[Cut]]
    run_each: (
        Callable[..., Iterator[tuple[PreTrainedModel, list[Cut]]]] | None
    )  # many plans from one pass, dense stream
    title: str
    paper: str
    kinds: tuple[str, ...]  # axes it can prune
    default_kinds: tuple[str, ...]
    needs: str
    note: str
    scored: bool = True  # whether it scores units, by `SCORES` or gradients, in one of the streams


METHODS: dict[str, Method] = {
    "fasp": Method(
        run=fasp,
        run_each=fasp_each,
        title="Fast and Accurate Structured Pruning of LLMs",
        paper="arXiv:2501.09412",
        kinds=("ffn", "heads", "groups", "value", "layers"),
        default_kinds=("ffn",),
        needs="calibration text; one forward pass, no gradients, no training",
        note="--score wanda --axes ffn,value --layout per_layer --stream dense is nearest to the paper. Value channels (its V/O) "
        "need another attention shape than stock classes have. Layers go whole by --allocation auto or sensitivity.",
    ),
    "adapruner": Method(
        run=fasp,
        run_each=None,
        title="Adaptive Pruning by Bayesian optimisation of calibration samples and importance metric",
        paper="arXiv:2503.06184",
        kinds=("ffn", "heads", "groups"),
        default_kinds=("ffn",),
        needs="calibration and validation text; one backward pass over a pool of short windows, then forward passes (extra: search)",
        note="`billhook search` has its options. What wins is restored by FASP's least squares; --space paper keeps to what the paper's "
        "abstract names, without. Of the paper no more than the outline is public.",
    ),
    "layerchop": Method(
        run=layerchop,
        run_each=None,
        title="Just CHOP: Embarrassingly Simple LLM Compression",
        paper="arXiv:2305.14864",
        kinds=("layers",),
        default_kinds=("layers",),
        needs="nothing for a preset by position; a few windows of calibration text for the others, and for --patch linear",
        note="Which layers: --preset, or --drop 10-14,20, --keep, --layers N. The paper trains on afterwards; without that, presets by "
        "position ruin small models, and contiguous, the default, costs least. --patch linear makes up for much of it, without training.",
        scored=False,
    ),
}
