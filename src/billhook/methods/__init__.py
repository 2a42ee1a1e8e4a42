"""Every method: an explicit table of what it is, where it comes from, what it prunes and what it needs."""

from collections.abc import Callable
from dataclasses import dataclass

from billhook.cuts import Cut
from billhook.methods.fasp import fasp


@dataclass(frozen=True)
class Method:
    """One row of `billhook methods`."""

    run: Callable[..., list[Cut]]
    title: str
    paper: str
    kinds: tuple[str, ...]  # axes it can prune
    default_kinds: tuple[str, ...]
    needs: str
    note: str


METHODS: dict[str, Method] = {
    "fasp": Method(
        run=fasp,
        title="Fast and Accurate Structured Pruning of LLMs",
        paper="arXiv:2501.09412",
        kinds=("ffn", "heads", "groups"),
        default_kinds=("ffn",),
        needs="calibration text; one forward pass, no gradients, no training",
        note="--score wanda is the paper's own. Its V/O value channels (--axes value) need another attention shape than stock "
        "classes have: they come with the per-layer layout.",
    ),
}
