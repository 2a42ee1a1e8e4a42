"""Every choice that has a name, and what it means:
what commands complete, what `billhook methods` says, what code goes by.

Plain data on a low floor, and one check of names: whatever defines settings or messages reads it without loading torch.
"""

from billhook.errors import SettingsError, one_of

# What can be cut
KINDS = {
    "ffn": "FFN channels: gate and up rows with the down column",
    "heads": "query heads, the same number from every KV group",
    "groups": "whole KV groups: key and value head with their query heads",
    "value": "value channels (FASP's V/O): one V row with its O columns",
    "experts": "whole experts of a mixture, with their rows of the router",
    "expert_ffn": "FFN channels of every expert, each its own: gate and up rows with the down column",
    "shared": "FFN channels of the expert that every token goes to",
}
MIXED = ("experts", "expert_ffn", "shared")  # kinds that only a mixture of experts has
AXES = {
    **KINDS,
    "layers": "whole decoder layers",
    "residual": "channels of the residual stream, through the whole model",
}
ROLES = ("q", "k", "v", "o", "gate", "up", "down")  # linear weights of a decoder layer
LAYOUTS = {
    "uniform": "one width for all layers: a stock checkpoint, loaded by whatever loads the family",
    "per_layer": "widths and heads differ by layer: transformers and vLLM load it with trust_remote_code, billhook.load "
    "without, llama.cpp as GGUF",
}
ALLOCATIONS = {
    "equal": "the same from every layer",
    "skip:F,L": "the same from every layer but the first F and the last L",
    "global": "by one threshold on a gradient score that compares across layers",
    "standardised": "by one threshold on the method's own score, standardised in each layer: one forward pass (FLAP)",
    "sensitivity": "by what cutting each layer alone costs, measured with the cut in place",
    "FILE": "a YAML or JSON file: for each layer, the units of each axis to keep",
}
CLIENTS = {  # who will load it: what FFN widths its kernels want, and why
    "transformers": (32, "matrix products like it"),
    "vllm": (128, "its Marlin kernels want N % 64 and K % 128"),
    "llama.cpp": (256, "K-quants want rows of 256; multiples of 32 fall back to Q5_0 or Q8_0, others to F16"),
}

# What a layer sees while it is cut, and what it is fitted to
AXIS_STREAMS = {
    "dense": "every layer sees the unpruned model's activations: one forward pass in all",
    "sequential": "every layer sees the activations that the pruned layers before it produce",
    "dense_target": "as sequential, and every reader is also fitted to the unpruned model's output, in part",
}
OPERATOR_STREAMS = {
    "dense": "every operator sees the unpruned model's activations: one forward pass in all",
    "sequential": "every layer sees the activations that the pruned layers before it produce (SparseGPT, Wanda)",
    "true_sequential": "as sequential, and every operator sees the pruned operators before it in its layer",
    "layer_target": "every layer sees the unpruned model's activations; in it every operator sees the pruned ones "
    "before it, and is fitted to its output in the unpruned layer (FISTAPruner)",
    "dense_target": "as true_sequential, and every operator is fitted to the unpruned model's output",
}
INDEPENDENT_STREAMS = ("dense", "layer_target")  # streams of operators in which no layer sees the pruning of another
EXPERT_STREAMS = {name: AXIS_STREAMS[name] for name in ("dense", "sequential")}
RULES = {  # which layers keep how many value channels
    "progressive": "the first most, by the condition numbers of keys and values from there on (LoRC)",
    "uniform": "all the same",
}
KEYS = {  # what becomes of keys while values get narrower
    "whole": "they stay as they are",
    "pairs": "rotary pairs of queries and keys go, so that keys get as narrow as values (MoDeGPT)",
}
MOMENTS = {  # by what a weight is factored
    "plain": "truncated SVD of the weight: no text decides",
    "whitened": "by its output's energy on the text: the least error that a rank can have (LLM-ROM)",
    "centred": "by its output's covariance, with the mean output kept in a bias",
    "pooled": "the same within each block of the text (Bolaco)",
}

# How units, layers, experts and weights are weighed
SCORES = {
    "obs": "the error left after the best repair of what stays (optimal brain surgery, by columns)",
    "wanda": "column norms of the weight times the norm of its input (FASP's own)",
    "energy": "the error of leaving the column out, nothing repaired",
}
GRADIENT_SCORES = {
    "taylor1_vector": "first-order change of the loss, a unit as a whole (LLM-Pruner)",
    "taylor1_element": "first-order, |weight x mean gradient| summed over a unit's weights (LLM-Pruner)",
    "taylor1_window": "first-order, |weight x gradient| of each window, summed",
    "taylor2_element": "second-order by the empirical Fisher, weight by weight: compares across layers",
    "taylor2_vector": "second-order by the empirical Fisher, a unit as a whole",
    "gate_fisher": "the Fisher information of a gate on the unit (Kwon et al., arXiv:2204.09656)",
    "gate_sensitivity": "the mean |gradient| of a gate on the unit (Michel et al., arXiv:1905.10650)",
}
VALUE_BASES = {
    "principal": "each KV head's values turned to the principal axes of what the output projection reads",
    "channels": "the model's own channels (FASP's V/O)",
}
OUTPUT_SCORES = {
    "analytic": "what a channel puts out, from the second moment of what enters its writers (the paper's)",
    "measured": "the same, from the channel's own second moment",
}
DATA_FREE_PRESETS = {  # of layers by position: they need no text
    "input": "the layers after the first",
    "output": "the layers before the last",
    "reverse": "another name for output",
    "middle": "those in the middle",
    "both": "half of them after the first layer, half before the last",
    "max-gap": "spread evenly, as far apart as can be",
    "random": "by lot: what the others should beat",
}
MEASURED_PRESETS = {
    "block-influence": "the least change of direction, 1 - cos(input, output), mean over tokens (ShortGPT, arXiv:2403.03853)",
    "angular": "the block whose ends are nearest by angle, at the last token (Gromov et al., arXiv:2403.17887)",
    "perplexity": "the least loss without each alone (Kim et al., arXiv:2402.02834)",
    "contiguous": "the block with the least loss without it: what costs least without training (docs/LOG.md)",
    "greedy": "one at a time, each time the one least missed (SLEB, arXiv:2402.09025)",
    "taylor": "the least sum of |weight x gradient|, the first four and last two kept (Taylor+ of Kim et al.)",
}
PRESETS = {**DATA_FREE_PRESETS, **MEASURED_PRESETS}
SELECT = {"preset": "by --preset", "healed": "the best of --candidates after a short training of each"}
PATCHES = {
    "none": "the layers go, the others stay as they are",
    "linear": "the FFN before each cut learns in closed form to add what the layers that go would have added",
}
JUDGES = {  # texts by which auto judges cuts beside the calibration's; any other name is a text's
    "reference": "Python's language reference, which every Python brings",
    "own": "none: windows of the calibration's text alone",
}
WAYS = {
    "reap": "drop those of lowest mean weight times output norm (REAP)",
    "frequency": "drop those that fewest tokens go to",
    "random": "drop any",
    "uncurl": "merge those whose router logits are alike (UNCURL)",
}
STARTS = {
    "dense": "the dense weight",
    "magnitude": "the weight that magnitude pruning gives",
    "wanda": "the weight that Wanda gives",
    "sparsegpt": "the weight that SparseGPT gives",
}

MODULE_METRICS = {
    "kl": "the divergence from the unpruned model's predictions",
    "loss": "the loss on the next token",
    "task:NAME": "the accuracy of lm-eval's task NAME, or of a task's .yaml file (extra: eval)",
}
MODULE_ORDERS = {
    "knapsack": "what costs least by the table for the parameters that it saves",
    "global": "the module of lowest loss first, whatever it saves, until the budget is met (the paper's)",
}
MODULE_STAGES = {
    "width-first": "widths first, then whole layers on the cut model, measured anew (the paper's for fine-tuning)",
    "joint": "whole layers weighed against the others in one table (the paper's for pre-training)",
}

BASELINES = {
    "loo": "the mean loss of the step's other masks: no bias, whatever the batch",
    "ema": "a moving average of the losses of the steps before (the paper's)",
}
UNIT_PRICES = {
    "parameters": "the parameters that it owns, all axes together",
    "count": "the same, each axis with a budget of its own (the paper's)",
}
GATE_WAYS = {
    "annealed": "soft, and ever nearer to 0 and 1",
    "straight-through": "0 or 1 from the first step, with the gradient of a soft one (GRASPrune)",
}
VARIANTS = {
    "billhook": "chunks of channels, prices, four masks a step: for a few hundred forward passes",
    "paper": "single channels, two masks a step, 15,000 steps at a rate of 0.002, nothing restored",
}

# What a search tries
SAMPLERS = {
    "tpe": "tree-structured Parzen estimators, over all dimensions together (AdaPruner's)",
    "gp": "a Gaussian process",
    "cmaes": "evolution of a normal distribution",
    "nsga2": "a genetic algorithm",
    "random": "no learning: the control",
}
SEARCH_OBJECTIVES = {
    "nll": "the cut model's loss on the next token",
    "kl": "its divergence from the unpruned model's predictions",
}
SPACES = {
    "full": "samples, metric and budgets, attention where the axes have it",
    "paper": "samples, and one of LLM-Pruner's metrics: what AdaPruner's abstract names; nothing is restored",
}
GROUPS = {
    "samples": "which clusters of the pool weigh how much, how many of their windows, which draw",
    "metric": "a coefficient for each importance metric, a power, the reduction over a unit's slots, how terms are scaled",
    "budgets": "how much each layer gives: a smooth profile over depth, and how many at either end stay whole (per_layer "
    "layout); a block of layers that goes whole (uniform layout)",
    "attention": "how many KV groups or query heads go, of what the budget takes (where --axes names them beside ffn)",
}

# What trains
TRAINABLE = {
    "all": "every parameter",
    "decoder": "all but embeddings and head",
    "lora": "low-rank adapters on every linear weight of the decoder, merged at the end (extra: lora)",
    "head+last3": "the head, the final norm and the last three layers",
    "seam": "the layers beside dropped ones",
    "spp": "multipliers of rows and columns (SPP), for sparse models: what is zero stays zero",
}
MASKS = {"ast": "the largest weights of each group, found anew every 10 steps; the others decay (AST)"}
MASK_SCORES = {
    "magnitude": "the size of a weight (the paper's)",
    "wanda": "its size times the norm of its input, on the training text before any training (Wanda)",
}
PRECISIONS = {
    "auto": "bfloat16 where the device has instructions for it",
    "float32": "all of it",
    "bfloat16": "matrix products; weights and optimiser stay float32",
}

# What is computed in, measured and written
DTYPES = ("float32", "bfloat16", "float16")
FAMILY_ROW = "file with the row of a model type that billhook has none of: docs/adding-a-family.md"  # --family-row
PARTS = {
    "speed": "tokens a second, and the memory of a prefill",
    "texts": "what they write",
}
NEW_TOKENS = 48  # of a continuation that `evaluate` shows
MEASURING_SECONDS = 60  # of `forecast`: two seconds say little on a machine that others use
QUANTIZER = "llama-quantize"  # the program that writes the K-quants
BY_BILLHOOK = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # types of a GGUF that billhook writes
BY_QUANTIZER = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")
QUANTIZE = (*BY_BILLHOOK, *BY_QUANTIZER)
FORMATS = {  # of `export`
    "gguf": "one file, for llama.cpp",
    "folder": "a checkpoint, as stock as its shapes allow",
}

# Few bits
QUANTIZERS = {
    "gptq": "column by column, the weights right of it make up for each one's error (GPTQ, arXiv:2210.17323)",
    "rtn": "round to nearest: reads no text; the control",
    "kept": "the codes that the weights have: `recover --bits` leaves them so",
}
CONTAINERS = {
    "gguf": "model.gguf, for llama.cpp",
    "compressed-tensors": "a folder for transformers and vLLM (extra: quantize)",
    "both": "both, with the same numbers",
}
BITS = {"2": "T2", "4": "Q4_0", "5": "Q5_0", "8": "Q8_0"}  # the type that a number of bits means
BITS_BY = {
    "sensitivity": "what few bits of each layer alone cost, and a knapsack",
    "mi": "how much a layer's output tells of the loss of its token (QPruner's start)",
    "search": "Bayesian optimisation from both starts (QPruner, arXiv:2412.11629; extra: search)",
}
SCALES = {
    "block": "one for each block of 32 inputs, as Q4_0 stores them",
    "module": "one for each weight (QuantGPT, arXiv:2203.10705)",
}
# with its share of the scales
BITS_A_WEIGHT = {"T2": 2.5, "TQ2_0": 2.0625, "Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5}
GRID_TYPES = tuple(BITS_A_WEIGHT)  # types that have codes of billhook's own
NOT_GGML = ("T2",)  # three levels in blocks of 32: ggml has them in blocks of 256 alone
TERNARY = "TQ2_0"  # which are these: what two bits mean where a GGUF is written
BY_LAYER_TYPES = GRID_TYPES[2:]  # types that a layer may get within a budget: those of more than three levels
WITH_MINIMUM = ("Q4_1", "Q5_1")  # those whose blocks have a minimum besides their scale: zero is on no level
EMBEDDING_TYPES = ("Q8_0", "F16")


def check_axes(kinds: tuple[str, ...], layout: str = "uniform") -> None:
    """Refuse axes that no family can give up together in the layout.

    Raises:
        BillhookError: none is named, one is unknown, or the layout cannot hold them.
    """
    if not kinds:
        raise SettingsError(f"no axis named: valid: {', '.join(AXES)}")
    for kind in kinds:
        one_of("axis", kind, AXES)
    if "value" in kinds and layout == "uniform":
        raise SettingsError(
            "axis 'value' (FASP's V/O channels) needs another attention shape than stock classes have: use --layout per_layer, "
            "or name others of ffn, heads, groups"
        )
    if "residual" in kinds and layout != "uniform":
        raise SettingsError(
            f"axis 'residual' is one size for the whole model, which the uniform layout says: leave out --layout {layout}"
        )
    if len(found := [kind for kind in ("heads", "groups", "value") if kind in kinds]) > 1:
        raise SettingsError(f"axes {' and '.join(map(repr, found))} cut the same columns: name one of them")
