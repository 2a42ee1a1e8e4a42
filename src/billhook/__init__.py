"""billhook makes large language models smaller.

import billhook
result = billhook.prune("demo", method="fasp", ratio=0.2)
result.model; result.report; result.save("out")
"""

from billhook.errors import BillhookError
from billhook.recipe import Recipe, Result, prune

__all__ = ["BillhookError", "Recipe", "Result", "prune"]
