"""ADMM: mask and least squares in turns (`billhook.math.admm`)."""

from typing import Any

from billhook.choices import OPERATOR_STREAMS, STARTS
from billhook.methods.narrowed import stream
from billhook.methods.zeros import ZerosMethod, ZerosSettings
from billhook.runtime.options import option


class ADMMSettings(ZerosSettings):
    """Its defaults are what works best here; its paper's: --init dense --stream sequential."""

    stream: str = stream("layer_target", OPERATOR_STREAMS)
    init: str = option("", f"whose weights they start from: {', '.join(STARTS)}", names=STARTS, shown="own")

    @property
    def solver(self) -> dict[str, Any]:
        return {"init": self.init or None}


class ADMM(ZerosMethod):
    name = "admm"
    title = "Fast and Effective Weight Update for Pruned LLMs"
    paper = "arXiv:2401.02938"
    does = (
        "Alternates between mask and least squares on normalised inputs, the sparsity rising step by step. It is the best of all "
        "here, from SparseGPT's weights and in FISTAPruner's stream. The paper's way: --init dense --stream sequential."
    )
    costs = "several forward passes and a minute of a solver"
    example = "billhook prune demo --method admm --sparsity 0.5 -o sparse"
    Settings = ADMMSettings


METHOD = ADMM()
