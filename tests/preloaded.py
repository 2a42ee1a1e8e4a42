"""What the server of new processes imports once: collections, now and in these processes, would walk it for nothing."""

import gc
from importlib import import_module

gc.disable()
for name in (
    "billhook.cli.prune",
    "billhook.pruning.prune",
    "billhook.pruning.compare",
    "billhook.recovery.recover",
    "billhook.search.adapruner",
    "billhook.search.optishear",
    "billhook.search.pool",
    "billhook.training.trainer",
    "pytest",
    "tiny",
    "transformers.models.llama.modeling_llama",
):
    import_module(name)
gc.freeze()
gc.enable()
