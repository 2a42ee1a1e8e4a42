"""Prove that what was written comes back equal when it is loaded in this process."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.checkpoints.load import ROOM, load
from billhook.checkpoints.save import elements, stored_parameters
from billhook.errors import ModelError, first_line
from billhook.models.cached import after
from billhook.runtime.memory import free_bytes
from billhook.runtime.offload import is_offloaded

STEPS = 64  # the most steps with a cache
STEPS_OFFLOADED = 2  # the most where weights are offloaded, since each step reads the whole model from disk
# largest difference with and without cache, as a share of the logits' norm: half the digits of float32.  A stale cache
# index costs a tenth and more (tests/models/test_laws.py has them); SmolLM2 itself drifts by 2e-6, cut by a quarter on
# four windows by 1.3e-5.  In bfloat16 the rounding of a right model may cost as much as a wrong index.
CACHE_TOLERANCE = torch.finfo(torch.float32).eps ** 0.5


@torch.no_grad()
def verify(path: Path, model: Any) -> dict[str, Any]:
    """Reload a written folder with stock transformers and compare it with the model in memory.

    Returns:
        the client, and what was compared.

    Raises:
        BillhookError: the logits differ by a bit; the tensors on disk have more or fewer parameters than the model; a
            tied embedding came back untied; or logits with a cache differ from those without, in float32.
    """
    written = stored_parameters(path)
    expected = elements(model)
    reloaded = load(path, device=str(model.device), stream=is_offloaded(model))
    attention = model.config._attn_implementation
    if reloaded.config._attn_implementation != attention:  # the model was loaded with another one than the default
        reloaded.set_attn_implementation(attention)
    ids = _probe(model)
    same = torch.equal(model(ids, use_cache=False).logits, reloaded(ids, use_cache=False).logits)
    tied = (reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight) == bool(
        reloaded.config.tie_word_embeddings
    )
    if reloaded.dtype != torch.float32:
        del reloaded  # before a copy in float32, which takes twice as much
        reloaded = _in_float32(path, model)
    try:
        steps = STEPS_OFFLOADED if is_offloaded(model) else STEPS
        drift = _cache_drift(reloaded, ids.to(reloaded.device), steps)
    except (RuntimeError, IndexError, ValueError) as error:  # a wrong index makes masks and positions of another length
        raise ModelError(f"{path} did not survive reloading: with a cache it fails ({first_line(error)})") from error
    problems = []
    if written != expected:
        problems.append(f"the tensors on disk hold {written:,} parameters, the model {expected:,}")
    if not same:
        problems.append(
            "logits after reloading differ from the model in memory (one cast by .to(dtype) has rounded rotary "
            "frequencies: "
            "load it with dtype=…)"
        )
    if not tied:
        problems.append("the embedding is not tied as the config says")
    if not drift <= CACHE_TOLERANCE:
        problems.append(f"logits with and without cache differ by {drift:.1e} of their size")
    if problems:
        raise ModelError(f"{path} did not survive reloading: {'; '.join(problems)}")
    return {"client": "transformers", "logits": "equal", "parameters_on_disk": written, "cache_drift": drift}


def _in_float32(path: Path, model: Any) -> Any:
    """The written model in float32, without the rounding of its own dtype; on the model's device if there is room."""
    needed = elements(model) * torch.float32.itemsize
    device = torch.device("cpu") if needed > ROOM * free_bytes(model.device) else model.device
    return load(path, dtype=torch.float32, device=str(device), stream=is_offloaded(model))


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Two rows of fixed token ids, within the model's vocabulary and positions."""
    length = min(64, getattr(model.config, "max_position_embeddings", 64))
    ids = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def _cache_drift(model: Any, ids: torch.Tensor, steps: int) -> float:
    """Relative difference of the logits when the second half of `ids` goes through the cache, in at most `steps` steps.

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
