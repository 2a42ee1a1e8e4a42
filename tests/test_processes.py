"""Fresh processes of tests are there at once: a module that has moved would be missed silently."""

import gc
import sys

from processes import Child


def told() -> None:
    assert gc.get_freeze_count() and gc.isenabled()
    assert "billhook.training.trainer" in sys.modules


def test_a_fresh_process_has_imported_all_and_walks_nothing_of_it() -> None:
    assert Child(told, fresh=True).ended() == (0, "", "")
