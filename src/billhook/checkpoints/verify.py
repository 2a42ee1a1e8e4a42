"""Proof that what was written comes back equal, in this process."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.checkpoints.load import ROOM, load
from billhook.checkpoints.save import elements, stored_parameters
from billhook.errors import BillhookError, first_line
from billhook.models.cached import after
from billhook.runtime.memory import free_bytes
from billhook.runtime.offload import is_offloaded

STEPS_PAGED = 2  # of a model that comes from disk anew with every step
# half the digits of float32: a stale cache index costs a tenth and more (tests/models/test_laws.py has them), SmolLM2 itself drifts by 2e-6, cut by
# a quarter on four windows by 1.3e-5; in bfloat16 rounding alone may cost a right model as much as a wrong index
CACHE_TOLERANCE = torch.finfo(torch.float32).eps ** 0.5  # of the logits' norm


@torch.no_grad()
def verify(path: Path, model: Any) -> dict[str, Any]:
    """Reload a written folder with stock transformers and compare it with the model in memory.

    Returns what was seen.  Raises BillhookError if the logits differ by a bit, the tensors on disk are not as many as the
    model's, a tied embedding came back untied, or generation with a cache goes another way than without, in float32.
    """
    written = stored_parameters(path)
    expected = elements(model)
    again = load(path, device=str(model.device), stream=is_offloaded(model))
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
        drift = _cache_drift(again, ids.to(again.device), **({"steps": STEPS_PAGED} if is_offloaded(model) else {}))
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


def _in_float32(path: Path, model: Any) -> Any:
    """What was written, to be computed without the roundings of its own dtype: on the model's device where there is room."""
    needed = elements(model) * torch.float32.itemsize
    device = torch.device("cpu") if needed > ROOM * free_bytes(model.device) else model.device
    return load(path, dtype=torch.float32, device=str(device), stream=is_offloaded(model))


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
