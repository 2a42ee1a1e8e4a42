"""LayerChop: Just CHOP, Embarrassingly Simple LLM Compression (Jha et al. 2023, arXiv:2305.14864).

1. Chop      whole decoder layers go at once, chosen by position alone; the first and the last stay, since they meet the
             embedding table and the head.
2. Recover   training goes on as before, at the learning rate of pretraining.

Step 1 is here; which layers the plan names, by LayerChop's presets or by what others measure, is `chopping`'s business.
Nothing is restored: what a closed form can make up for, FASP does (`--method fasp --allocation auto --axes layers`).
"""

from typing import Any

from transformers import PreTrainedModel

from billhook.cuts import Cut
from billhook.plan import Plan
from billhook.surgery import drop_layers


def layerchop(model: PreTrainedModel, tokens: Any, plan: Plan, settings: Any = None, **_: Any) -> list[Cut]:
    """Drop the plan's layers, in place; there are no cuts to report but the layers themselves.

    Raises:
        BillhookError: no layer would be left, or there is no such layer.
    """
    drop_layers(model, plan.layers)
    return []
