"""Proof that what was written loads where people serve: in this process, and in the stock clients."""

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook import interpreters, llamacpp, own_code
from billhook.cached import after
from billhook.checkpoint import ROOM, load, load_tokenizer
from billhook.errors import BillhookError, first_line, one_of
from billhook.export import write_gguf
from billhook.greedy import continued
from billhook.layout import layer_sizes
from billhook.memory import free_bytes
from billhook.modeling_per_layer import V_HEAD_DIM
from billhook.paging import is_paged
from billhook.saving import elements, stored_parameters

NEW_TOKENS = 32
STEPS_PAGED = 2  # of a model that comes from disk anew with every step
CLIENT_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: its errors then come back as errors
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, where vLLM runs on a CPU
}
ERROR = re.compile(r"(\[\w+\]: )?[\w.]*(Error|Exception)\b")
# half the digits of float32: a stale cache index costs a tenth and more (tests/test_laws.py has them), SmolLM2 itself drifts by 2e-6, cut by
# a quarter on four windows by 1.3e-5; in bfloat16 rounding alone may cost a right model as much as a wrong index
CACHE_TOLERANCE = torch.finfo(torch.float32).eps ** 0.5  # of the logits' norm
LLAMACPP_TOLERANCE = 1e-3  # of the logits' norm, float32 weights and cache: other kernels, the same numbers


@torch.no_grad()
def verify(path: Path, model: Any) -> dict[str, Any]:
    """Reload a written folder with stock transformers and compare it with the model in memory.

    Returns what was seen.  Raises BillhookError if the logits differ by a bit, the tensors on disk are not as many as the
    model's, a tied embedding came back untied, or generation with a cache goes another way than without, in float32.
    """
    written = stored_parameters(path)
    expected = elements(model)
    again = load(path, device=str(model.device), stream=is_paged(model))
    if again.config._attn_implementation != model.config._attn_implementation:  # of one that was loaded with another
        again.set_attn_implementation(model.config._attn_implementation)
    ids = _probe(model)
    same = torch.equal(model(ids, use_cache=False).logits, again(ids, use_cache=False).logits)
    tied = (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == bool(
        again.config.tie_word_embeddings
    )
    if again.dtype != torch.float32:
        del again  # before what takes twice its place
        again = _in_float32(path, model)
    try:
        drift = _cache_drift(again, ids.to(again.device), **({"steps": STEPS_PAGED} if is_paged(model) else {}))
    except (RuntimeError, IndexError, ValueError) as error:  # masks and positions of another length, by a wrong index
        raise BillhookError(f"{path} did not survive reloading: with a cache it fails ({first_line(error)})") from error
    problems = {
        f"the tensors on disk hold {written:,} parameters, the model {expected:,}": written != expected,
        "logits after reloading differ from the model in memory (one cast by .to(dtype) has rounded rotary frequencies: "
        "load it with dtype=…)": not same,
        "the embedding is not tied as the config says": not tied,
        f"logits with and without cache differ by {drift:.1e} of their size": not drift <= CACHE_TOLERANCE,
    }
    if found := [text for text, wrong in problems.items() if wrong]:
        raise BillhookError(f"{path} did not survive reloading: {'; '.join(found)}")
    return {"client": "transformers", "logits": "equal", "parameters_on_disk": written, "cache_drift": drift}


def check_startable() -> None:
    """Refuse work whose result stock transformers could not be asked about, in a process of its own.

    Raises:
        BillhookError: no such process starts, or it would not find its packages.
    """
    if why := interpreters.why_not("torch", "transformers"):
        raise BillhookError(
            f"what is written could not be checked: {sys.executable or 'Python'}, started anew, has no stock transformers ({why}): "
            "install torch and transformers where billhook is"
        )


def check(path: Path, client: str, python: str | None = None, trust: bool = False) -> dict[str, Any]:
    """Load a checkpoint in a separate process of a stock client, without billhook, and compare with billhook's own load.

    Args:
        client: of CHECKS.
        python: the interpreter that has the client; this one if not given.
        trust: run whatever code lies in the folder, of model and tokenizer; else none but what billhook wrote (billhook.own_code).

    Returns:
        the client's name and version, whether it was compared by logits too, and `equal`.

    Raises:
        BillhookError: the client is not there, cannot load the checkpoint, or gives other tokens or logits.
    """
    return CHECKS[one_of("client", client, CHECKS)](path, python or sys.executable, trust)


def _check_transformers(path: Path, python: str, trust: bool) -> dict[str, Any]:
    code = {"model_code": trust or own_code.needed(path), "tokenizer_code": trust}
    model, prompts = load(path, dtype="float32"), _prompts(path)
    # as many threads as here: sums in another order could tip a near tie, and the whole prune would be refused for it
    request = {"prompts": prompts, "new_tokens": NEW_TOKENS, "threads": torch.get_num_threads(), **code}
    answer = _ask(python, "transformers", path, request)
    logits = torch.frombuffer(bytearray(base64.b64decode(answer["logits"]["float32"])), dtype=torch.float32)
    own = _logits(model, prompts)
    drift = float((logits.view(answer["logits"]["shape"]) - own).norm() / own.norm())
    problems = {
        f"its logits differ by {drift:.1e} of their size": not drift <= CACHE_TOLERANCE,
        "it generates other tokens": answer["greedy"] != _greedy(model, prompts),
        "it generates other tokens with a cache than without": answer["greedy"] != answer["greedy_without_cache"],
        "it counts other parameters": answer["parameters"] != elements(model),
        "billhook was there": not answer["stock"],
    }
    refused = answer.get("refused_generation_config")  # which its from_pretrained then ends in, here as in the source
    seen = {"logits_drift": drift} | ({"refused_generation_config": refused} if refused else {})
    return _verdict("transformers", path, answer["version"], problems, seen)


def _check_vllm(path: Path, python: str, trust: bool) -> dict[str, Any]:
    code = trust or own_code.needed(path)
    model, prompts = load(path, dtype="float32"), _prompts(path)
    if any(V_HEAD_DIM in sizes for sizes in layer_sizes(model)):
        raise BillhookError(
            f"{path} has value heads narrower than its key heads (axis value), which vllm does not serve"
        )
    answer = _ask(python, "vllm", path, {"prompts": prompts, "new_tokens": NEW_TOKENS, "model_code": code})
    problems = {"it generates other tokens": answer["greedy"] != _greedy(model, prompts)}
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
    own = _logits(model, prompts)
    found = torch.stack([torch.from_numpy(rows.copy()) for rows in answer["logits"]])
    drift = float((found - own).norm() / own.norm())
    problems = {
        f"its logits differ by {drift:.1e} of their size": drift > LLAMACPP_TOLERANCE,
        "it generates other tokens": answer["greedy"] != _greedy(model, prompts),
    }
    return _verdict("llama.cpp", path, answer["version"], problems, {"logits_drift": drift})


CHECKS: dict[str, Callable[[Path, str, bool], dict[str, Any]]] = {
    "transformers": _check_transformers,
    "vllm": _check_vllm,
    "llama.cpp": _check_llamacpp,
}


def _verdict(client: str, path: Path, version: str, problems: dict[str, bool], seen: dict[str, Any]) -> dict[str, Any]:
    if found := [text for text, wrong in problems.items() if wrong]:
        raise BillhookError(f"{client} {version} does not serve {path} as billhook does: {'; '.join(found)}")
    return {"client": client, "version": version, "tokens": "equal", **seen}


def _ask(python: str, client: str, path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a client's script, run isolated (billhook.interpreters)."""
    script = Path(__file__).with_name(f"{client}_client.py")
    try:
        done = subprocess.run(
            interpreters.command(python, script, str(path)),
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            env=CLIENT_ENVIRONMENT | os.environ,
        )
    except OSError as error:
        raise BillhookError(f"cannot run {python}: {error.strerror}: name a Python that has {client}") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        last = ([line for line in said if ERROR.match(line)] or said)[-1]  # a progress bar may come after it
        if last.startswith("ModuleNotFoundError"):
            raise BillhookError(f"{python} has no {client} ({last}): install it there, or name another with --python")
        raise BillhookError(f"{client} could not load {path}: {last.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def _prompts(path: Path) -> list[list[int]]:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    length = max(2, min(16, config.get("max_position_embeddings", 64) - NEW_TOKENS))
    return torch.randint(config["vocab_size"], (2, length), generator=torch.Generator().manual_seed(0)).tolist()


@torch.no_grad()
def _logits(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    return model(torch.tensor(prompts)).logits


def _greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    return continued(
        model, torch.tensor(prompts), NEW_TOKENS
    ).tolist()  # to the last: other clients go on behind an end


def _in_float32(path: Path, model: Any) -> Any:
    """What was written, to be computed without the roundings of its own dtype: on the model's device where there is room."""
    needed = elements(model) * torch.float32.itemsize
    device = torch.device("cpu") if needed > ROOM * free_bytes(model.device) else model.device
    return load(path, dtype=torch.float32, device=str(device), stream=is_paged(model))


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Two rows of fixed token ids, within the model's vocabulary and positions."""
    length = min(64, getattr(model.config, "max_position_embeddings", 64))
    ids = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def _cache_drift(model: Any, ids: torch.Tensor, steps: int = 64) -> float:
    """Relative difference of the logits when the second half goes through the cache, at most so many steps, else token by token.

    A stale `layer_idx` shows here, and nowhere else.
    """
    half = ids.shape[1] // 2
    whole = model(ids, use_cache=False).logits[:, half:]
    step = model(ids[:, :half], use_cache=True)
    stepped = []
    for part in ids[:, half:].split(max(1, half // steps), dim=1):
        step = model(part, **after(step))
        stepped.append(step.logits)
    return float((torch.cat(stepped, 1) - whole).float().norm() / whole.float().norm())
