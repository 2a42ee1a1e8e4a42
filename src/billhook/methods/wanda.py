"""Wanda: weights are scored by their size times the norm of their input (`billhook.math.wanda`)."""

from billhook.methods.zeros import ZerosMethod


class Wanda(ZerosMethod):
    name = "wanda"
    title = "A Simple and Effective Pruning Approach for LLMs"
    paper = "arXiv:2306.11695"
    does = (
        "Scores a weight by its size times the norm of its input. The lowest of each row become zero. Nothing is repaired "
        "unless --refit."
    )
    example = "billhook prune demo --method wanda --sparsity 0.5 -o sparse"


METHOD = Wanda()
