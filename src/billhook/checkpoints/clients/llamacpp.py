"""A GGUF in llama.cpp, in a process of a Python that has llama-cpp-python."""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from billhook.checkpoints.gguf.architectures import CLIENT_PACKAGE
from billhook.errors import BillhookError
from billhook.runtime import interpreters

CLIENT = Path(__file__).with_name("llamacpp_client.py")


def run(python: str | Path, gguf_path: Path, request: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
    """Answer a request by llama.cpp with `gguf_path`, in an isolated process of the interpreter `python`.

    A request holds any of:
        tokenize: texts.
        logits: lists of token ids.
        prompts: lists of token ids, with `new_tokens`, how many to add to each.
        windows: lists of token ids.
        speed: a dict of `prompt`, `new_tokens` and `repeats`.
        cache: "f16" (llama.cpp's default) or "f32".
        threads: how many to use.

    The answer holds the client's `version` and, for what was asked:
        tokens: ids of each text, special tokens added and recognised.
        logits: float32 arrays (positions, vocabulary).
        greedy: the new ids.
        perplexity: exp of the mean loss over the windows, over every token but the first.
        speed: tokens a second for `prefill` and `decode`.

    Raises:
        BillhookError: there is no such interpreter, it has no llama-cpp-python, or llama.cpp could not do it; the
            message ends with what llama.cpp said last.
    """
    command = interpreters.command(str(python), CLIENT, str(gguf_path))
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, errors="replace", timeout=timeout
        )
    except OSError as error:
        raise BillhookError(
            f"cannot run {python}: {error.strerror}: name a Python that has {CLIENT_PACKAGE}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise BillhookError(f"llama.cpp took longer than {timeout:g} s over {gguf_path}") from error
    if done.returncode:
        raise BillhookError(_why(str(python), gguf_path, done))
    answer = json.loads(done.stdout)
    if "logits" in answer:
        answer["logits"] = [
            np.frombuffer(base64.b64decode(rows["float32"]), "<f4").reshape(rows["shape"]) for rows in answer["logits"]
        ]
    return answer


def _why(python: str, gguf_path: Path, done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit code {done.returncode}"
    if last.startswith("ModuleNotFoundError"):
        return f"{python} has no {CLIENT_PACKAGE} ({last}): install it there, or name a Python that has it"
    reason = next((line for line in lines if "error loading model" in line or "GGML_ASSERT" in line), last)
    return f"llama.cpp could not run {gguf_path}: {reason.strip()}"
