"""Run by a Python that has llama-cpp-python and nothing of billhook: a GGUF and a request in, JSON out.

    python checkpoints/clients/llamacpp_client.py model.gguf < request.json

checkpoints/clients/llamacpp.py says what a request may hold, and what comes back.  Standard output carries the answer
alone; llama.cpp's log goes to standard error.
"""

import base64
import json
import math
import os
import statistics
import sys
import time

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

F32 = 0  # GGML_TYPE_F32, for the cache, which is float16 by default


def opened(path, request, positions, logits_all):
    """The model, with room for `positions` tokens."""
    cache = {"type_k": F32, "type_v": F32} if request.get("cache", "f16") == "f32" else {}
    threads = request.get("threads") or os.cpu_count()
    return llama_cpp.Llama(
        path,
        n_ctx=max(32, positions),
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=logits_all,
        verbose=True,
        **cache,
    )


def logits(model, ids):
    """Logits of every position, (positions, vocabulary)."""
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)], dtype=np.float32)


def greedy(model, prompt, new_tokens):
    """The tokens that follow, the likeliest each time; nothing ends them early."""
    model.reset()
    model.eval(prompt)
    out = []
    for _ in range(new_tokens):
        out.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(out[-1:])
    return out


def loss(model, window):
    """Mean negative log-likelihood of every token but the first."""
    rows = logits(model, window)[:-1].astype(np.float64)
    rows -= rows.max(1, keepdims=True)
    return float(np.mean(np.log(np.exp(rows).sum(1)) - rows[np.arange(len(rows)), window[1:]]))


def speed(model, prompt, new_tokens, repeats):
    """Tokens a second of reading `prompt`, and one at a time after it: medians without the first round."""
    rates = {"prefill": [], "decode": []}
    for turn in range(repeats + 1):
        model.reset()
        start = time.perf_counter()
        model.eval(prompt)
        llama_cpp.llama_synchronize(model.ctx)
        first = time.perf_counter()
        for _ in range(new_tokens):
            model.eval(prompt[-1:])
            llama_cpp.llama_synchronize(model.ctx)
        last = time.perf_counter()
        if turn:
            rates["prefill"].append(len(prompt) / (first - start))
            rates["decode"].append(new_tokens / (last - first))
    return {name: statistics.median(values) for name, values in rates.items()}


def answer(path, request):
    """Everything that was asked for."""
    out = {"version": llama_cpp.__version__}
    if texts := request.get("tokenize"):
        words = llama_cpp.Llama(path, vocab_only=True, verbose=True)
        out["tokens"] = [words.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
    prompts, new = request.get("prompts", []), request.get("new_tokens", 0)
    lengths = [len(ids) for ids in request.get("logits", []) + request.get("windows", [])]
    lengths += [len(prompt) + new for prompt in prompts]
    if lengths:
        model = opened(path, request, max(lengths), logits_all=True)
        every = [logits(model, ids) for ids in request.get("logits", [])]
        out["logits"] = [
            {"shape": rows.shape, "float32": base64.b64encode(rows.astype("<f4").tobytes()).decode()} for rows in every
        ]
        out["greedy"] = [greedy(model, prompt, new) for prompt in prompts]
        losses = [loss(model, window) for window in request.get("windows", [])]
        if losses:
            out["perplexity"] = math.exp(statistics.fmean(losses))
        model.close()
    if timed := request.get("speed"):
        model = opened(path, request, len(timed["prompt"]) + timed["new_tokens"], logits_all=False)
        out["speed"] = speed(model, timed["prompt"], timed["new_tokens"], timed.get("repeats", 3))
    return out


def main():
    """Keep standard output for the answer, whatever libraries print there."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump(answer(sys.argv[1], json.load(sys.stdin)), channel)
    channel.close()


if __name__ == "__main__":
    main()
