"""Every method: an explicit table of what it is, where it comes from, what it prunes and what it needs.

admm              Fast and Effective Weight Update for Pruned Large Language Models (Boza 2024, arXiv:2401.02938)
experts           Fewer experts in every layer of a mixture: dropped or merged
fasp              FASP: Fast and Accurate Structured Pruning of Large Language Models (Hu et al
fistapruner       FISTAPruner: convex layer-wise pruning by an l1 penalty (Zhao et al., arXiv:2408.03728
layerchop         LayerChop: Just CHOP, Embarrassingly Simple LLM Compression (Jha et al
magnitude         Magnitude pruning: the smallest weights go (Han et al
masking           Sparsify a model: zeros in the linear weights of its decoder layers, found operator by operator
optishear         OptiShear (arXiv:2502.10735): Wanda's score with its parts transformed
parallel          Cut a model in several processes: in the dense stream no layer sees what became of another
restoration       How far a reader's new weight is from what it should put out
slicegpt          SliceGPT: Compress Large Language Models by Deleting Rows and Columns (Ashkboos et al
slicegpt_restore  What a narrower residual stream lost, made up for in closed form: linear weight by linear weight
sparsegpt         SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot (Frantar & Alistarh 2023
wanda             Wanda: A Simple and Effective Pruning Approach for Large Language Models (Sun et al
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from billhook.math.layerwise import Found
from billhook.methods import admm, fistapruner, magnitude, optishear, sparsegpt, wanda
from billhook.methods.experts import experts
from billhook.methods.fasp import fasp, fasp_each
from billhook.methods.layerchop import layerchop
from billhook.methods.slicegpt import slicegpt
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
    linear: Callable[..., Found] | None = None  # or makes one weight sparse (billhook.methods.masking)
    kinds: tuple[str, ...] = ()  # axes it can prune
    default_kinds: tuple[str, ...] = ()
    scored: bool = True  # whether it scores units, by `SCORES` or gradients, in one of the streams
    stream: str = "dense_target"  # what a layer sees, unless told otherwise
    own: Mapping[str, Any] = field(default_factory=dict)  # other settings of a recipe, likewise


METHODS: dict[str, Method] = {
    "fasp": Method(
        run=fasp,
        run_each=fasp_each,
        title="Fast and Accurate Structured Pruning of LLMs",
        paper="arXiv:2501.09412",
        kinds=("ffn", "heads", "groups", "value", "expert_ffn", "shared", "layers"),
        default_kinds=("ffn",),
        needs="calibration text; one forward pass, no gradients, no training",
        note="--score wanda --axes ffn,value --layout per_layer --stream dense is nearest to the paper. Value channels (its V/O) "
        "need another attention shape than stock classes have. Layers go whole by --allocation auto or sensitivity.",
    ),
    "adapruner": Method(
        run=fasp,
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
        run=experts,
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
        run=slicegpt,
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
        linear=magnitude.prune,
        title="Magnitude pruning",
        paper="Han et al. 2015, arXiv:1506.02626",
        needs="calibration text, for the reported errors alone",
        note="The smallest weights of each matrix, or of each group; nothing is repaired unless --refit.",
        scored=False,
        stream="sequential",
    ),
    "wanda": Method(
        linear=wanda.prune,
        title="A Simple and Effective Pruning Approach for LLMs",
        paper="arXiv:2306.11695",
        needs="calibration text; two forward passes",
        note="Weight times the norm of its input, compared in each row; nothing is repaired unless --refit.",
        scored=False,
        stream="sequential",
    ),
    "optishear": Method(
        linear=optishear.prune,
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
        linear=sparsegpt.prune,
        title="SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot",
        paper="arXiv:2301.00774",
        needs="calibration text; two forward passes",
        note="Column by column, what a zero costs goes to the weights right of it.",
        scored=False,
        stream="sequential",
    ),
    "fistapruner": Method(
        linear=fistapruner.prune,
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
        linear=admm.prune,
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
