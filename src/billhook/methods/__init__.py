"""Every method: an explicit table of what it is, where it comes from, what it prunes and what it needs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from billhook.cuts.chopping import chop
from billhook.cuts.experts import reduce_experts
from billhook.cuts.narrowing import narrow, narrow_each
from billhook.cuts.slicing import slice_residual
from billhook.math.layerwise import SparseWeight
from billhook.math.solvers import SOLVERS
from billhook.models.plan import Cut


@dataclass(frozen=True)
class Method:
    """One row of `billhook methods`."""

    title: str
    paper: str
    needs: str
    note: str
    run: Callable[..., list[Cut]] | None = None  # cuts a model by a plan
    run_each: Callable[..., Iterator[tuple[PreTrainedModel, list[Cut]]]] | None = (
        None  # many plans from one pass, dense stream
    )
    linear: Callable[..., SparseWeight] | None = None  # or makes one weight sparse (billhook.cuts.masking)
    kinds: tuple[str, ...] = ()  # axes it can prune
    default_kinds: tuple[str, ...] = ()
    scored: bool = True  # whether it scores units, by `SCORES` or gradients, in one of the streams
    stream: str = "dense_target"  # what a layer sees, unless told otherwise
    own: Mapping[str, Any] = field(default_factory=dict)  # other settings of a recipe, likewise


METHODS: dict[str, Method] = {
    "fasp": Method(
        run=narrow,
        run_each=narrow_each,
        title="Fast and Accurate Structured Pruning of LLMs",
        paper="arXiv:2501.09412",
        kinds=("ffn", "heads", "groups", "value", "expert_ffn", "shared", "layers"),
        default_kinds=("ffn",),
        needs="calibration text; one forward pass, no gradients, no training",
        note="--score wanda --axes ffn,value --layout per_layer --stream dense is nearest to the paper. Value channels (its V/O) "
        "need another attention shape than stock classes have. Layers go whole by --allocation auto or sensitivity.",
    ),
    "adapruner": Method(
        run=narrow,
        title="Adaptive Pruning by Bayesian optimisation of calibration samples and importance metric",
        paper="arXiv:2503.06184",
        kinds=("ffn", "heads", "groups"),
        default_kinds=("ffn",),
        needs="calibration and validation text; one backward pass over a pool of short windows, then forward passes (extra: search)",
        note="`billhook search` has its options. What wins is restored by FASP's least squares; --space paper keeps to what the paper's "
        "abstract names, without. Of the paper no more than the outline is public.",
    ),
    "layerchop": Method(
        run=chop,
        title="Just CHOP: Embarrassingly Simple LLM Compression",
        paper="arXiv:2305.14864",
        kinds=("layers",),
        default_kinds=("layers",),
        needs="nothing for a preset by position; a few windows of calibration text for the others, and for --patch linear",
        note="Which layers: --preset, or --drop 10-14,20, --keep, --layers N. The paper trains on afterwards; without that, presets by "
        "position ruin small models, and contiguous, the default, costs least. --patch linear makes up for much of it, without training.",
        scored=False,
    ),
    "experts": Method(
        run=reduce_experts,
        title="REAP the Experts, and UNCURL: fewer experts in a mixture",
        paper="arXiv:2510.13999",
        kinds=("experts",),
        default_kinds=("experts",),
        needs="calibration text; one forward pass",
        note="--experts says how: reap, frequency and random drop, uncurl (arXiv:2409.01483) merges. The calibration text is the task: "
        "experts that it does not use go first.",
        scored=False,
        stream="dense",
        own={"experts": "reap"},
    ),
    "slicegpt": Method(
        run=slice_residual,
        title="SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
        paper="arXiv:2401.15024",
        kinds=("residual",),
        default_kinds=("residual",),
        needs="calibration text; one forward pass, one eigendecomposition of the residual dimension's size, and some passes that "
        "restore (the paper does not: --no-restoration)",
        note="The residual stream itself becomes narrower: embeddings, norms, all projections and the head with it. One rotation "
        "for the whole model, where the paper has one a block and products between them, which no stock class holds; it unties tied "
        "embeddings (--no-rotate does not). Models with LayerNorm cannot, those with norms behind their writers not with --rotate.",
        scored=False,
        own={"rotate": True},
    ),
    "magnitude": Method(
        linear=SOLVERS["magnitude"],
        title="Magnitude pruning",
        paper="Han et al. 2015, arXiv:1506.02626",
        needs="calibration text, for the reported errors alone",
        note="The smallest weights of each matrix, or of each group; nothing is repaired unless --refit.",
        scored=False,
        stream="sequential",
    ),
    "wanda": Method(
        linear=SOLVERS["wanda"],
        title="A Simple and Effective Pruning Approach for LLMs",
        paper="arXiv:2306.11695",
        needs="calibration text; two forward passes",
        note="Weight times the norm of its input, compared in each row; nothing is repaired unless --refit.",
        scored=False,
        stream="sequential",
    ),
    "optishear": Method(
        linear=SOLVERS["optishear"],
        title="OptiShear: evolutionary metric search for each model",
        paper="arXiv:2502.10735",
        needs="calibration and validation text; two forward passes, then one of a few windows a trial (extra: search)",
        note="Wanda's score with its parts transformed; which transformation is searched, unless --metric names it. "
        "`billhook search --method optishear` has the options of the search. Nothing is repaired unless --refit.",
        scored=False,
        stream="sequential",
        own={"sampler": "nsga2"},
    ),
    "sparsegpt": Method(
        linear=SOLVERS["sparsegpt"],
        title="SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot",
        paper="arXiv:2301.00774",
        needs="calibration text; two forward passes",
        note="Column by column, what a zero costs goes to the weights right of it.",
        scored=False,
        stream="sequential",
    ),
    "fistapruner": Method(
        linear=SOLVERS["fistapruner"],
        title="FISTAPruner: convex layer-wise post-training pruning",
        paper="arXiv:2408.03728",
        needs="calibration text; several forward passes and some minutes of a convex solver",
        note="A refinement of another method's zeros: --init says whose. Its stream is layer_target, where layers are independent. "
        "Of the paper abstract, reviews and the authors' answers were at hand, not the body; --no-normalised --no-refit is its way.",
        scored=False,
        stream="layer_target",
        own={"refit": True, "normalised": True},
    ),
    "admm": Method(
        linear=SOLVERS["admm"],
        title="Fast and Effective Weight Update for Pruned LLMs",
        paper="arXiv:2401.02938",
        needs="calibration text; several forward passes and a minute of a solver",
        note="Alternating directions on normalised inputs, the sparsity rising step by step; the best of all here, from SparseGPT's "
        "weights and in FISTAPruner's stream. The paper's way: --init dense --stream sequential.",
        scored=False,
        stream="layer_target",
    ),
}


def carry_out(method: str) -> Callable[..., list[Cut]]:
    """What cuts a model by a plan; methods that make zeros have none."""
    run = METHODS[method].run
    assert run is not None
    return run


MASKING = tuple(name for name, method in METHODS.items() if method.linear)
