"""Searches for samples, metrics, budgets and units: AdaPruner, OptiShear, policy gradients.

adapruner     AdaPruner's search from its inputs to the winner, step by step
budgets       How a cut may be spread while it saves as much: over layers, between attention and FFN, in whole layers
evaluator     Losses of a cut model on windows of text, in place, in several processes, kept on disk
evidence      One backward pass over a pool of windows, and what it leaves
harness       The harness of every search: rounds, promotion, finals, against one standard
inputs        What a search reads: calibration text, pool, validation windows
ladder        How many candidates stand on each rung, on how many windows, until when
layer_blocks  Blocks of layers that a search may drop whole: which one of each length
measured      What AdaPruner's search measures before the first trial, and what a candidate drops
metrics       AdaPruner's solution space: mixtures of windows and importance metrics
optishear     OptiShear's search: by which metric, and with which sparsities over depth
policy        Policy gradients: chances of units to stay, checked and accepted by windows of their own
pool          The pool that a search for calibration samples draws from: short windows of several texts
samplers      Optuna's samplers: a study in memory that proposes trials and is told their losses
settings      What a search reads of a recipe
space         What a search may choose, dimension by dimension
trial         What becomes of a candidate, how two are compared, when a gain is believed
validation    The validation windows of a search, and how rungs take them in turn
"""
