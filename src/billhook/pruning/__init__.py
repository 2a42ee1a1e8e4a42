"""From a recipe to a cut model and its result; dry run, comparison, sweep.

bits_search Bits by layer: Bayesian optimisation of a measured loss
compare     Many prunes of one model, judged by the same texts: methods at one size, or one method at many
contenders  What is compared: a method with settings, as one word of a command says it
dry_run     What a prune will come to, before it: parameters, memory, disk, operations and time
heal        Prune and train in one run, which goes on after a kill
preflight   What cannot be done by the means that a prune was given, said before it computes anything
prune       Prune a model by a recipe: open, draw, plan, carry out, prove
quantize    Quantise a model: open, choose bits, walk, write both containers, read them back
recipe      A recipe from what people write: flat settings, or parts, in Python or in a file
rehearsal   What a layer of a model costs to prune on this machine: the prune itself
"""
