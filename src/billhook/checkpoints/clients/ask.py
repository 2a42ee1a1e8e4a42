"""Ask a client's script, run by a Python that has the client: JSON in, JSON out, and why it failed in one line."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from billhook.checkpoints.gguf.architectures import CLIENT_PACKAGE
from billhook.errors import BillhookError
from billhook.runtime import interpreters

CLIENT_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that its errors come back as errors
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, where vLLM runs on a CPU
}
PACKAGES = {"llama.cpp": CLIENT_PACKAGE}  # where the package is not called like the client
CAUSE = re.compile(r"error loading model|GGML_ASSERT")  # in llama.cpp's own words, before Python's
ERROR = re.compile(r"(\[\w+\]: )?[\w.]*(Error|Exception)\b")


def ask(
    python: str | Path, client: str, path: Path, request: dict[str, Any], timeout: float | None = None
) -> dict[str, Any]:
    """What `client`'s script answers to a request about `path`, run isolated (billhook.runtime.interpreters).

    Args:
        python: the interpreter that has the client.
        timeout: seconds.

    Raises:
        BillhookError: there is no such interpreter, it has no such client, or the client could not do it; the message
            ends with what it said last.
    """
    script = Path(__file__).with_name(f"{client.replace('.', '')}_client.py")
    package = PACKAGES.get(client, client)
    try:
        done = subprocess.run(
            interpreters.command(str(python), script, str(path)),
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            env=CLIENT_ENVIRONMENT | os.environ,
            timeout=timeout,
        )
    except OSError as error:
        raise BillhookError(f"cannot run {python}: {error.strerror}: name a Python that has {package}") from error
    except subprocess.TimeoutExpired as error:
        raise BillhookError(f"{client} took longer than {timeout:g} s over {path}") from error
    if not done.returncode:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    last = ([line for line in lines if ERROR.match(line)] or lines)[-1]  # a progress bar may follow the error
    if last.startswith("ModuleNotFoundError"):
        raise BillhookError(f"{python} has no {package} ({last}): install it there, or name another with --python")
    cause = next(filter(CAUSE.search, lines), last)
    raise BillhookError(f"{client} could not load {path}: {cause.strip()}")
