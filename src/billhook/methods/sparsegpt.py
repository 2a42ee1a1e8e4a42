"""SparseGPT: column by column, and the weights to the right make up for it (`billhook.math.sparsegpt`)."""

from billhook.methods.zeros import ZerosMethod


class SparseGPT(ZerosMethod):
    name = "sparsegpt"
    title = "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot"
    paper = "arXiv:2301.00774"
    does = (
        "Goes through a weight column by column. In each the weights that cost least become zero. What that costs goes to the "
        "weights right of it."
    )
    costs = "two forward passes, and a factorisation for each weight"
    example = "billhook prune demo --method sparsegpt --pattern 2:4 -o sparse"


METHOD = SparseGPT()
