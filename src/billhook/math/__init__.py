"""Tensors in, tensors out: scores, selection, restoration, sparsity, losses. Knows no model.

admm           ADMM for the weights that stay, the sparsity rising step by step (Boza 2024)
fistapruner    FISTAPruner: convex layer-wise pruning by an l1 penalty
knapsack       Which layers give how much: loss curves and prices in, unit counts out; one count for all layers
knee           Where a curve of loss against ratio turns from bearable to steep: a change-point, with its interval
layer_presets  Which layers go, by position alone
layerwise      One linear layer to sparsify: what it should put out, how far a sparse weight is from it
linalg         Symmetric positive definite systems: the one place that damps and factors a Gram
losses         What a model is trained on after a cut: distances to the teacher's predictions and states
magnitude      Magnitude pruning: the smallest weights go
merging        Experts that do the same become one
metric         The points of OptiShear's space: which transformations a score has
optishear      OptiShear: Wanda's score with its parts transformed
overlap        Which windows are, in part, the same text as others: they share a run of tokens
pattern        What is asked for of a sparse weight: a share of zeros, or N of every M neighbours
restore        Closed-form repair of the kept weights: no training, no gradients
scores         Importance of the columns of a reader: what the layer's output loses when one goes
selection      From scores to which units go
solvers        What makes one weight sparse, by the name of its method
sparsegpt      SparseGPT: column by column, what a zero costs goes to the weights right of it
sparsity       Which weights of a matrix go: a share of all, or N of every M neighbours along the input
taylor         Importance of units by how the loss answers to them: a Taylor expansion
wanda          Wanda: weight times the norm of its input, compared in each row
"""
