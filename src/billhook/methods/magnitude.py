"""Magnitude pruning: the smallest weights become zero (`billhook.math.magnitude`)."""

from billhook.methods.zeros import ZerosMethod


class Magnitude(ZerosMethod):
    name = "magnitude"
    title = "Magnitude pruning"
    paper = "Han et al. 2015, arXiv:1506.02626"
    does = (
        "Sets the smallest weights of each matrix, or of each group, to zero. Nothing is repaired unless --refit. It is the "
        "control that the others should beat."
    )
    needs = "calibration text, for the reported errors alone"
    costs = "two forward passes, for the reported errors"
    example = "billhook prune demo --method magnitude --sparsity 0.5 -o sparse"


METHOD = Magnitude()
