"""Check that stock clients load a checkpoint: transformers, vLLM and llama.cpp, each in a process without billhook."""

import base64
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from billhook.checkpoints import compressed, own_code
from billhook.checkpoints.around import rest
from billhook.checkpoints.clients import llamacpp
from billhook.checkpoints.clients.ask import ask
from billhook.checkpoints.gguf.write import write_gguf
from billhook.checkpoints.load import load
from billhook.checkpoints.save import elements
from billhook.checkpoints.shards import read_json
from billhook.checkpoints.tokenizers import load_tokenizer
from billhook.checkpoints.verify import CACHE_TOLERANCE
from billhook.errors import BillhookError, one_of
from billhook.models.greedy import greedy_tokens
from billhook.models.layout import layer_sizes
from billhook.models.modeling_per_layer import PAIRS, V_HEAD_DIM
from billhook.models.multimodal import decoder_config
from billhook.runtime import interpreters

NEW_TOKENS = 32
# largest difference of logits, as a share of their norm: float32 weights and cache in other kernels
LLAMACPP_TOLERANCE = 1e-3


def check_startable() -> None:
    """Refuse work whose result could not be checked by stock transformers in a process of its own.

    Raises:
        BillhookError: such a process does not start, or does not find its packages.
    """
    if why := interpreters.why_not("torch", "transformers"):
        raise BillhookError(
            f"what is written could not be checked: {sys.executable or 'Python'}, started anew, has no stock "
            "transformers "
            f"({why}): install torch and transformers where billhook is"
        )


def check(path: Path, client: str, python: str | None = None, trust: bool = False) -> dict[str, Any]:
    """Load a checkpoint in a process of a stock client, without billhook, and compare with billhook's own load.

    Args:
        client: a name in CHECKS.
        python: the interpreter that has the client; this one if not given.
        trust: whether all code in the folder may run, of model and tokenizer; else only what billhook wrote
            (billhook.checkpoints.own_code).

    Returns:
        the client's name and version, that its tokens are equal, and how far logits differ where they were compared.

    Raises:
        BillhookError: the client is not installed, cannot load the checkpoint, or gives other tokens or logits.
    """
    return CHECKS[one_of("client", client, CHECKS)](path, python or sys.executable, trust)


def _check_transformers(path: Path, python: str, trust: bool) -> dict[str, Any]:
    code = {"model_code": trust or own_code.needed(path), "tokenizer_code": trust}
    model, prompts = load(path, dtype="float32"), _prompts(path)
    # the same number of threads: sums in another order could tip a near tie, for which the whole prune would be refused
    request = {"prompts": prompts, "new_tokens": NEW_TOKENS, "threads": torch.get_num_threads(), **code}
    answer = ask(python, "transformers", path, request)
    logits = torch.frombuffer(bytearray(base64.b64decode(answer["logits"]["float32"])), dtype=torch.float32)
    expected = _logits(model, prompts)
    drift = float((logits.view(answer["logits"]["shape"]) - expected).norm() / expected.norm())
    beyond = sum(tensor.elements for tensor in rest(path, str(path)).values())  # which only a multimodal folder has
    problems = []
    if not drift <= CACHE_TOLERANCE:
        problems.append(f"its logits differ by {drift:.1e} of their size")
    if answer["greedy"] != _greedy(model, prompts):
        problems.append("it generates other tokens")
    if answer["greedy"] != answer["greedy_without_cache"]:
        problems.append("it generates other tokens with a cache than without")
    if not compressed.is_compressed(path) and answer["parameters"] != elements(model) + beyond:
        problems.append("it counts other parameters")
    if not answer["stock"]:
        problems.append("billhook was there")
    refused = answer.get("refused_generation_config")  # its from_pretrained fails by it, as it does in the source
    seen = {"logits_drift": drift} | ({"refused_generation_config": refused} if refused else {})
    return _verdict("transformers", path, answer["version"], problems, seen)


def _check_vllm(path: Path, python: str, trust: bool) -> dict[str, Any]:
    code = trust or own_code.needed(path)
    model, prompts = load(path, dtype="float32"), _prompts(path)
    if any(key in sizes for sizes in layer_sizes(model) for key in (V_HEAD_DIM, PAIRS)):
        raise BillhookError(
            f"{path} has heads of fewer channels than its head_dim (value channels or rotary pairs cut), which vllm does not serve"
        )
    answer = ask(python, "vllm", path, {"prompts": prompts, "new_tokens": NEW_TOKENS, "model_code": code})
    problems = ["it generates other tokens"] if answer["greedy"] != _greedy(model, prompts) else []
    return _verdict("vllm", path, answer["version"], problems, {})


def _check_llamacpp(path: Path, python: str, trust: bool) -> dict[str, Any]:
    del trust  # a GGUF holds no code
    model, prompts = load(path, dtype="float32"), _prompts(path)
    tokenizer = load_tokenizer(path, str(path))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(model, tokenizer, file, "F32")
        request = {"logits": prompts, "prompts": prompts, "new_tokens": NEW_TOKENS, "cache": "f32"}
        answer = llamacpp.run(python, file, request)
    expected = _logits(model, prompts)
    logits = torch.stack([torch.from_numpy(rows.copy()) for rows in answer["logits"]])
    drift = float((logits - expected).norm() / expected.norm())
    problems = []
    if drift > LLAMACPP_TOLERANCE:
        problems.append(f"its logits differ by {drift:.1e} of their size")
    if answer["greedy"] != _greedy(model, prompts):
        problems.append("it generates other tokens")
    return _verdict("llama.cpp", path, answer["version"], problems, {"logits_drift": drift})


CHECKS: dict[str, Callable[[Path, str, bool], dict[str, Any]]] = {
    "transformers": _check_transformers,
    "vllm": _check_vllm,
    "llama.cpp": _check_llamacpp,
}


def _verdict(client: str, path: Path, version: str, problems: list[str], seen: dict[str, Any]) -> dict[str, Any]:
    if problems:
        raise BillhookError(f"{client} {version} does not serve {path} as billhook does: {'; '.join(problems)}")
    return {"client": client, "version": version, "tokens": "equal", **seen}


def _prompts(path: Path) -> list[list[int]]:
    config = decoder_config(read_json(path / "config.json", str(path)))
    length = max(2, min(16, config.get("max_position_embeddings", 64) - NEW_TOKENS))
    return torch.randint(config["vocab_size"], (2, length), generator=torch.Generator().manual_seed(0)).tolist()


@torch.no_grad()
def _logits(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    return model(torch.tensor(prompts)).logits


def _greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """All new tokens, since other clients do not stop at an end of text."""
    return greedy_tokens(model, torch.tensor(prompts), NEW_TOKENS).tolist()
