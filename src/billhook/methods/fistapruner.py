"""FISTAPruner: another method's zeros, refined by a convex problem (`billhook.math.fistapruner`)."""

from typing import Any

from billhook.choices import OPERATOR_STREAMS, STARTS
from billhook.methods.narrowed import stream
from billhook.methods.zeros import ZerosMethod, ZerosSettings
from billhook.runtime.options import option


class FISTAPrunerSettings(ZerosSettings):
    """Its defaults are what works best here; its paper's: --no-normalised --no-refit."""

    stream: str = stream("layer_target", OPERATOR_STREAMS)
    refit: bool = option(True, "refit the weights that stay by least squares")
    init: str = option("", f"whose weights they start from: {', '.join(STARTS)}", names=STARTS, shown="own")
    normalised: bool = option(True, "solve for inputs of unit energy, which its paper does not")

    @property
    def solver(self) -> dict[str, Any]:
        return {"init": self.init or None, "normalised": self.normalised}


class FISTAPruner(ZerosMethod):
    name = "fistapruner"
    title = "FISTAPruner: convex layer-wise post-training pruning"
    paper = "arXiv:2408.03728"
    does = (
        "Refines another method's zeros by a convex problem with an l1 penalty; --init says whose. Its stream is layer_target, where "
        "layers are independent. Of the paper abstract, reviews and the authors' answers were at hand, not the body; "
        "--no-normalised --no-refit is its way."
    )
    costs = "several forward passes and some minutes of a convex solver"
    example = "billhook prune demo --method fistapruner --sparsity 0.5 -o sparse"
    Settings = FISTAPrunerSettings


METHOD = FISTAPruner()
