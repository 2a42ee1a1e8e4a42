"""A GGUF in llama.cpp, in a process of a Python that has llama-cpp-python."""

import base64
from pathlib import Path
from typing import Any

import numpy as np

from billhook.checkpoints.clients.ask import ask


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
        BillhookError: as `ask`.
    """
    answer = ask(python, "llama.cpp", gguf_path, request, timeout)
    if "logits" in answer:
        answer["logits"] = [
            np.frombuffer(base64.b64decode(rows["float32"]), "<f4").reshape(rows["shape"]) for rows in answer["logits"]
        ]
    return answer
