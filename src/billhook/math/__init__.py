"""Tensors in, tensors out: scores, selection, restoration, sparsity, losses. Knows no model.

admm           ADMM for the weights that stay, the sparsity rising step by step (Boza 2024)
condition      Ranks that fall with depth by condition numbers (LoRC)
divergence     How alike attention maps are, and which heads that makes redundant
fistapruner    FISTAPruner: convex layer-wise pruning by an l1 penalty
gates          Gates of units that keep a budget of parameters, soft, and 0 or 1 in the end
gptq           GPTQ: column by column to the nearest level, the weights right of it make up for its error
grids          Grids of few bits: codes and scales of blocks of 32 weights
hard_concrete  Random gates that are 0 or 1 with a chance that can be learned
knapsack       How much each layer gives: loss curves and prices in, unit counts out; also one count for all layers
knee           Where a curve of loss against ratio turns from bearable to steep: a change-point, with its interval
layer_presets  Which layers go, by position alone
layerwise      The layer-wise problem: one linear layer to sparsify, its target output, errors, least squares
linalg         Symmetric positive definite systems: the one place that damps and factors a Gram
low_rank       A weight as the product of two thin ones: one factoriser, by four moments of its input
loftq          LoftQ: adapters that start at what few bits took away
loraprune      LoRAPrune's importance: what units are worth, from the gradients of low-rank adapters
losses         Losses of training after a cut: distances to the teacher's predictions and states
magnitude      Magnitude pruning: the smallest weights go
merging        Similar experts are merged into one
metric         The points of OptiShear's space: which transformations a score has
mixture        DRPruning's shares of several texts: more to those that lag, within a radius
mlpruning      MLPruning's masks: scores say which units stay, shares that are learned how many
mope           MoPE-CLIP's table: what each module is worth, and which go first
optishear      OptiShear: Wanda's score with its parts transformed
ordering       Which steps of a model go first: the lowest of one order of all
overlap        Windows that share text with others: a run of tokens in common
pattern        Sparsity patterns: a share of zeros, or N of every M neighbours
policy         Policy gradients: chances of units to stay, learned from losses alone
qpruner        QPruner: bits by layer, from what the layers' outputs tell of the loss
quantgpt       QuantGPT: weights trained on the levels that they will be packed on
restore        Closed-form reconstruction of the kept weights: no training, no gradients
rotary_pairs   Which pairs of query and key channels matter
scores         Importance of the columns of a reader: what the layer's output loses when one goes
selection      Units to drop, by their scores
shared_turn    One turn for the query heads that share a KV head, fitted to the channels that stay
solvers        Solvers that sparsify one weight, by the method's name
sparsegpt      SparseGPT: column by column, the weights right of a zero make up for its error
sparsity       Masks of a matrix: a share of all weights, or N of every M neighbours along the input
sr_ste         Annealed SR-STE: masks that move while a model trains, and how masked weights decay (AST)
taylor         Importance of units by a Taylor expansion of the loss
value_axes     Value channels turned to the principal axes of what the output projection reads
wanda          Wanda: weight times the norm of its input, compared in each row
window_masks   Masks of training windows, learned under a budget of windows (AdaPruner for data)
"""
