"""Imported last by the server of new processes: collections in these walk nothing of what it has imported."""

import gc

gc.collect()
gc.freeze()
