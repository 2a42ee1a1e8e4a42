"""Start another Python interpreter, isolated from this process.

The interpreter that runs this process is started with the same import path.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

# Arguments: an import path as JSON, a script, its arguments.  Runs the script with that path, without billhook.
START = """
import json, runpy, sys
sys.path[:], sys.modules["billhook"], sys.argv[:] = json.loads(sys.argv[1]), None, sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PROBE = """
import importlib.util, json, sys
sys.path[:] = json.loads(sys.argv[1])
missing = [name for name in sys.argv[2:] if not (spec := importlib.util.find_spec(name)) or not spec.origin]
sys.exit(f"No module named {missing[0]!r}" if missing else 0)
"""


def command(python: str, script: Path, *arguments: str) -> list[str]:
    """The command that runs `script` by the interpreter `python`, isolated (-I).

    Isolated means without the user's site, PYTHONPATH and the working folder.  The interpreter of this process gets
    this process's import path, wherever that came from, but finds no billhook in it.
    """
    if not is_own(python):
        return [python, "-I", str(script), *arguments]
    return [python, "-I", "-c", START, json.dumps(_path()), str(script), *arguments]


def is_own(python: str) -> bool:
    """Whether `python` runs this process; compares names, since a virtual environment links to another's Python."""
    return bool(python) and os.path.abspath(python) == os.path.abspath(sys.executable)


def why_not(*packages: str) -> str:
    """Why this process's interpreter, started anew, would not find all these packages, or ''.

    Nothing is imported, and the answer is cached.
    """
    return _why_not(sys.executable or "", json.dumps(_path()), packages)


def _path() -> list[str]:
    """This process's import path, absolute; an empty entry is the working folder."""
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
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return (lines or [f"exit code {done.returncode}"])[-1] if done.returncode else ""
