"""Every method: an explicit table of what it is, where it comes from, what it takes and what it needs.  Loads no torch.

What a method does to a model is in `billhook.cuts`, its formulas are in `billhook.math`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STOCK = "whatever loads the family: transformers, vLLM, llama.cpp (`billhook export`)"
LAYOUT = "the uniform layout: " + STOCK + "; per_layer: transformers and vLLM with trust_remote_code, llama.cpp as GGUF"
SHARED = ("damping", "restoration", "correction")
ZEROS = ("sparsity", "pattern", "targets", "layer_sparsity", "stream", "refit", "keep_zeros", "damping")
SEARCHED = ("trials", "minutes", "validation", "space", "sampler", "objective")


@dataclass(frozen=True)
class Method:
    """What `billhook methods NAME` says of a method, and what a recipe goes by."""

    title: str
    paper: str
    does: str  # what it does, in a few sentences
    needs: str
    costs: str  # passes over the calibration text, and work besides
    loads: str  # what opens the result
    example: str  # a command
    settings: tuple[str, ...]  # fields of a recipe that this method reads and others may not
    command: str = "prune"  # the command that has all of these settings
    zeros: bool = False  # whether it makes zeros, and cuts nothing
    kinds: tuple[str, ...] = ()  # axes it can prune
    default_kinds: tuple[str, ...] = ()
    stream: str = "dense_target"  # what a layer sees, unless told otherwise
    own: Mapping[str, Any] = field(default_factory=dict)  # other settings of a recipe, likewise


METHODS: dict[str, Method] = {
    "fasp": Method(
        title="Fast and Accurate Structured Pruning of LLMs",
        paper="arXiv:2501.09412",
        does="Scores the units of an axis layer by layer, takes away the lowest, and refits what reads the axis by least squares. "
        "--score wanda --axes ffn,value --layout per_layer --stream dense is nearest to the paper; value channels (its V/O) need "
        "another attention shape than stock classes have. Layers go whole by --allocation auto or sensitivity.",
        needs="calibration text; no gradients, no training",
        costs="one forward pass, and a factorisation of each reader's Gram; an allocation that measures costs passes of its own",
        loads=LAYOUT,
        example="billhook prune demo --ratio 0.2 -o smaller",
        settings=("axes", "layout", "allocation", "floor", "score", "stream", *SHARED),
        kinds=("ffn", "heads", "groups", "value", "expert_ffn", "shared", "layers"),
        default_kinds=("ffn",),
    ),
    "adapruner": Method(
        title="Adaptive Pruning by Bayesian optimisation of calibration samples and importance metric",
        paper="arXiv:2503.06184",
        does="Searches which calibration samples and which importance metric prune this model best, and prunes by them. What wins is "
        "restored by FASP's least squares; --space paper keeps to what the paper's abstract names, without. Of the paper no more "
        "than the outline is public.",
        needs="calibration and validation text (extra: search)",
        costs="one backward pass over a pool of short windows, then a forward pass of a few windows for each trial",
        loads=LAYOUT,
        example="billhook search demo --ratio 0.2 --calibration wiki.txt --calibration news.txt -o smaller",
        settings=("axes", "layout", *SEARCHED, "pool", "pool_len", "clusters", "restoration"),
        command="search",
        kinds=("ffn", "heads", "groups"),
        default_kinds=("ffn",),
    ),
    "layerchop": Method(
        title="Just CHOP: Embarrassingly Simple LLM Compression",
        paper="arXiv:2305.14864",
        does="Drops whole decoder layers: by --preset, or --drop 10-14,20, --keep, --layers N. The paper trains on afterwards; "
        "without that, presets by position ruin small models, and contiguous, the default, costs least. --patch linear makes up "
        "for much of it, without training.",
        needs="nothing for a preset by position; a few windows of calibration text for the others, and for --patch linear",
        costs="nothing by position; otherwise passes over a few windows, at most one for each layer; with --select healed a short training "
        "of each candidate",
        loads=STOCK,
        example="billhook prune demo --method layerchop --ratio 0.2 --patch linear -o smaller",
        settings=(
            *("preset", "drop", "keep", "layers", "patch", "select", "candidates", "heal_tokens", "held_out"),
            *("damping", "correction"),
        ),
        kinds=("layers",),
        default_kinds=("layers",),
    ),
    "experts": Method(
        title="REAP the Experts, and UNCURL: fewer experts in a mixture",
        paper="arXiv:2510.13999",
        does="Takes experts away in every layer of a mixture. --experts says how: reap, frequency and random drop, uncurl "
        "(arXiv:2409.01483) merges. The calibration text is the task: experts that it does not use go first.",
        needs="calibration text, of the task",
        costs="one forward pass",
        loads=STOCK,
        example="billhook prune MIXTURE --method experts --ratio 0.25 -o smaller",
        settings=("experts", "stream"),
        kinds=("experts",),
        default_kinds=("experts",),
        stream="dense",
        own={"experts": "reap"},
    ),
    "slicegpt": Method(
        title="SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
        paper="arXiv:2401.15024",
        does="Makes the residual stream itself narrower: embeddings, norms, all projections and the head with it. One rotation serves "
        "the whole model, where the paper has one a block and products between them, which no stock class holds; it unties tied "
        "embeddings (--no-rotate does not). Models with LayerNorm cannot, those with norms behind their writers not with --rotate.",
        needs="calibration text",
        costs="one forward pass, one eigendecomposition of the residual dimension's size, and some passes that restore (the paper does "
        "not: --no-restoration)",
        loads=STOCK,
        example="billhook prune demo --method slicegpt --ratio 0.2 -o smaller",
        settings=("rotate", *SHARED),
        kinds=("residual",),
        default_kinds=("residual",),
        own={"rotate": True},
    ),
    "magnitude": Method(
        title="Magnitude pruning",
        paper="Han et al. 2015, arXiv:1506.02626",
        does="Sets the smallest weights of each matrix, or of each group, to zero. Nothing is repaired unless --refit. It is the "
        "control that the others should beat.",
        needs="calibration text, for the reported errors alone",
        costs="two forward passes, for the reported errors",
        loads=STOCK,
        example="billhook prune demo --method magnitude --sparsity 0.5 -o sparse",
        settings=ZEROS,
        zeros=True,
        stream="sequential",
    ),
    "wanda": Method(
        title="A Simple and Effective Pruning Approach for LLMs",
        paper="arXiv:2306.11695",
        does="Scores a weight by its size times the norm of its input. The lowest of each row become zero. Nothing is repaired "
        "unless --refit.",
        needs="calibration text",
        costs="two forward passes",
        loads=STOCK,
        example="billhook prune demo --method wanda --sparsity 0.5 -o sparse",
        settings=ZEROS,
        zeros=True,
        stream="sequential",
    ),
    "optishear": Method(
        title="OptiShear: evolutionary metric search for each model",
        paper="arXiv:2502.10735",
        does="Transforms the parts of Wanda's score; which transformation is searched, unless --metric names it. "
        "`billhook search --method optishear` has the options of the search. Nothing is repaired unless --refit.",
        needs="calibration and validation text (extra: search)",
        costs="two forward passes, then one of a few windows for each trial",
        loads=STOCK,
        example="billhook search demo --method optishear --sparsity 0.5 --calibration wiki.txt -o sparse",
        settings=("sparsity", "pattern", "targets", *SEARCHED),
        command="search",
        zeros=True,
        stream="sequential",
        own={"sampler": "nsga2"},
    ),
    "sparsegpt": Method(
        title="SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot",
        paper="arXiv:2301.00774",
        does="Goes through a weight column by column. In each the weights that cost least become zero. What that costs goes to the "
        "weights right of it.",
        needs="calibration text",
        costs="two forward passes, and a factorisation for each weight",
        loads=STOCK,
        example="billhook prune demo --method sparsegpt --pattern 2:4 -o sparse",
        settings=ZEROS,
        zeros=True,
        stream="sequential",
    ),
    "fistapruner": Method(
        title="FISTAPruner: convex layer-wise post-training pruning",
        paper="arXiv:2408.03728",
        does="Refines another method's zeros by a convex problem with an l1 penalty; --init says whose. Its stream is layer_target, where "
        "layers are independent. Of the paper abstract, reviews and the authors' answers were at hand, not the body; "
        "--no-normalised --no-refit is its way.",
        needs="calibration text",
        costs="several forward passes and some minutes of a convex solver",
        loads=STOCK,
        example="billhook prune demo --method fistapruner --sparsity 0.5 -o sparse",
        settings=(*ZEROS, "init", "normalised"),
        zeros=True,
        stream="layer_target",
        own={"refit": True, "normalised": True},
    ),
    "admm": Method(
        title="Fast and Effective Weight Update for Pruned LLMs",
        paper="arXiv:2401.02938",
        does="Alternates between mask and least squares on normalised inputs, the sparsity rising step by step. It is the best of all "
        "here, from SparseGPT's weights and in FISTAPruner's stream. The paper's way: --init dense --stream sequential.",
        needs="calibration text",
        costs="several forward passes and a minute of a solver",
        loads=STOCK,
        example="billhook prune demo --method admm --sparsity 0.5 -o sparse",
        settings=(*ZEROS, "init"),
        zeros=True,
        stream="layer_target",
    ),
}
MASKING = tuple(name for name, method in METHODS.items() if method.zeros)
