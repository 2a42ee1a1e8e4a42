"""Searches for samples, metrics and budgets: AdaPruner and OptiShear.

adapruner     AdaPruner (Kong et al
evidence      One backward pass over a pool of windows, and what it leaves
layer_blocks  Blocks of layers that a search may drop whole: which one of each length
metrics       AdaPruner's solution space (Kong et al
optishear     OptiShear's search (arXiv:2502.10735): by which metric, and with which sparsities over depth
pool          The pool that a search for calibration samples draws from: short windows of several texts
rounds        The rounds of a search: known metrics, then batches of candidates
samplers      Optuna, and nothing else of it: a study in memory that is told what trials are worth
settings      What a search reads of a recipe
space         What a search may choose, dimension by dimension, and what a choice means: a solution
trials        Try cuts of a model on windows of text: in place, one after the other or in several processes
"""
