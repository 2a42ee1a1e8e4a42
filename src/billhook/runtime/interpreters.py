"""How another Python is started: with nothing of this process, but where it is this very one, for what this process imports from."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

# Given a path, a script and its arguments, this is the script with its arguments; imports search the path, and find no billhook.
START = """
import json, runpy, sys
sys.path[:], sys.modules["billhook"], sys.argv[:] = json.loads(sys.argv[1]), None, sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PROBE = """
import importlib.util, json, sys
sys.path[:] = json.loads(sys.argv[1])
gone = [name for name in sys.argv[2:] if not (spec := importlib.util.find_spec(name)) or not spec.origin]
sys.exit(f"No module named {gone[0]!r}" if gone else 0)
"""


def command(python: str, script: Path, *arguments: str) -> list[str]:
    """What runs `script` by the interpreter `python`, isolated (-I): without the user's site, PYTHONPATH and the working folder.

    Where it is the one that runs this process, imports search what they search here, wherever that came from, and find no billhook.
    """
    if not is_own(python):
        return [python, "-I", str(script), *arguments]
    return [python, "-I", "-c", START, json.dumps(_path()), str(script), *arguments]


def is_own(python: str) -> bool:
    """Whether this process is run by it: by the very name, since a virtual environment is a link to another's Python."""
    return bool(python) and os.path.abspath(python) == os.path.abspath(sys.executable)


def why_not(*packages: str) -> str:
    """Why the interpreter of this process, started anew, would not find all these packages; empty where it would.

    Nothing is imported; it is asked once.
    """
    return _why_not(sys.executable or "", json.dumps(_path()), packages)


def _path() -> list[str]:
    """Where this process imports from, in full: an empty entry is its working folder."""
    return [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]


@functools.cache
def _why_not(python: str, path: str, packages: tuple[str, ...]) -> str:
    if not python:
        return "this process does not know what runs it: sys.executable is empty"
    try:
        done = subprocess.run(
            [python, "-I", "-c", PROBE, path, *packages], capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        return error.strerror or type(error).__name__
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return (said or [f"exit code {done.returncode}"])[-1] if done.returncode else ""
