"""What cuts a model by a plan, by the name of its method."""

from collections.abc import Callable

from billhook.cuts.chopping import chop
from billhook.cuts.experts import reduce_experts
from billhook.cuts.narrowing import narrow, narrow_each
from billhook.cuts.slicing import slice_residual
from billhook.models.plan import Cut

CUTS: dict[str, Callable[..., list[Cut]]] = {  # methods that make zeros have none: cuts.masking
    "fasp": narrow,
    "adapruner": narrow,
    "layerchop": chop,
    "experts": reduce_experts,
    "slicegpt": slice_residual,
}
MANY_PLANS = {"fasp": narrow_each}  # one pass in the dense stream serves many plans
