"""A folder that long work is kept in belongs to one run: what it is, lies in run.json."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from billhook import atomic
from billhook.errors import BillhookError

NAME = "run.json"
ELSEWHERE = {"device"}  # settings that a run may go on with others of


def claim(work: Path, key: dict[str, Any], fresh: bool, keep: Sequence[str] = ()) -> None:
    """Make `work` the folder of the run that `key` describes, or find that it is; `fresh` empties it of another's, but for `keep`.

    Raises:
        BillhookError: it is another's; says in what they differ.
    """
    path = work / NAME
    if fresh and path.exists():  # a folder without one is not ours to empty
        for one in work.iterdir():
            if one.name not in keep:
                shutil.rmtree(one) if one.is_dir() else one.unlink()
    elif path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            known = {}
        if differing := sorted(_differing(known, key)):
            raise BillhookError(
                f"{work} holds an unfinished run that differs in {', '.join(differing)}: repeat its own command, or start "
                "over with --fresh"
            )
    elif work.exists() and not all(
        one.match(atomic.partial(NAME)) for one in work.iterdir()
    ):  # of one killed right here
        raise BillhookError(f"{work} is not a run's folder, and would become one: remove it, or choose another output")
    work.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(key) + "\n")


def _differing(known: dict[str, Any], key: dict[str, Any]) -> set[str]:
    flat = [{**one, **one.get("settings", {}), "settings": None} for one in (known, key)]
    return {name for name in flat[0].keys() | flat[1].keys() if flat[0].get(name) != flat[1].get(name)} - ELSEWHERE
