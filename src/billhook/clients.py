"""Proof that what was written loads where people serve: in this process, and in the stock clients."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.checkpoint import load
from billhook.errors import BillhookError
from billhook.saving import stored_parameters


@torch.no_grad()
def verify(path: Path, model: Any) -> dict[str, Any]:
    """Reload a written folder with stock transformers and compare it with the model in memory.

    Returns what was seen.  Raises BillhookError if the logits differ by a bit, the tensors on disk are not as many as the
    model's, a tied embedding came back untied, or generation with a cache goes another way than without.
    """
    written = stored_parameters(path)
    expected = sum(p.numel() for p in model.parameters())
    again = load(path, device=str(next(model.parameters()).device))
    ids = _probe(model)
    same = torch.equal(model(ids).logits, again(ids).logits)
    drift = _cache_drift(again, ids)
    tied = (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == bool(
        again.config.tie_word_embeddings
    )
    problems = {
        f"the tensors on disk hold {written:,} parameters, the model {expected:,}": written != expected,
        "logits after reloading differ from the model in memory (one cast by .to(dtype) has rounded rotary frequencies: "
        "load it with dtype=…)": not same,
        "the embedding is not tied as the config says": not tied,
        f"logits with and without cache differ by {drift:.1e} of their size": drift > _cache_tolerance(again.dtype),
    }
    if found := [text for text, wrong in problems.items() if wrong]:
        raise BillhookError(f"{path} did not survive reloading: {'; '.join(found)}")
    return {"client": "transformers", "logits": "equal", "parameters_on_disk": written, "cache_drift": drift}


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Two rows of fixed token ids, within the model's vocabulary and positions."""
    length = min(64, getattr(model.config, "max_position_embeddings", 64))
    ids = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


def _cache_drift(model: Any, ids: torch.Tensor) -> float:
    """Relative difference of the logits when the second half goes token by token through the cache.

    A stale `layer_idx` shows here, and nowhere else.
    """
    half = ids.shape[1] // 2
    whole = model(ids).logits[:, half:]
    step = model(ids[:, :half], use_cache=True)
    stepped = []
    for n in range(half, ids.shape[1]):
        step = model(ids[:, n : n + 1], past_key_values=step.past_key_values, use_cache=True)
        stepped.append(step.logits)
    return float((torch.cat(stepped, 1) - whole).float().norm() / whole.float().norm())


def _cache_tolerance(dtype: torch.dtype) -> float:
    """A hundred roundings of the dtype: loose in bfloat16, where only a gross fault shows (tests/test_laws.py has one)."""
    return 100 * torch.finfo(dtype).eps
