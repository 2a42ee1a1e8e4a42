"""What the teacher says of every training window, on disk: training then needs no second model in memory.

A file holds SHARD windows, under a name made of all that decides its content: a longer run of the same seed goes on where a
shorter one ended, and runs share a folder.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from billhook.errors import BillhookError, first_line
from billhook.math.losses import most_likely
from billhook.runtime import atomic, cache, tensor_files
from billhook.runtime.headers import check_tensors
from billhook.runtime.precision import computing
from billhook.runtime.progress import Tick, quiet
from billhook.tensors import Tokens

SHARD = 32  # windows in a file: 12 MB of 512 tokens at k = 256
BATCH_TOKENS = 2048
AGAIN = "delete it, it will be made again"
STAGE = "asking the teacher"
# of hidden_states: the embeddings, and what enters the last layer but one, where Minitron (arXiv:2407.14679) ties a student
EMBEDDED, HIDDEN = 0, -3


@dataclass(frozen=True)
class Lessons:
    """The files that hold the teacher's answers, by window."""

    files: Sequence[Path]
    states: bool  # whether hidden states are there too

    def of(self, window: int) -> dict[str, Tensor]:
        """One window's `ids` (length - 1, k), `chances` (length - 1, k), `tail` (length - 1), and states (length, hidden).

        Raises:
            BillhookError: the file is damaged.
        """
        path, row = self.files[window // SHARD], window % SHARD
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: file.get_slice(key)[row] for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BillhookError(f"{path} is damaged ({first_line(error)}): {AGAIN}") from error
        found["ids"] = found["ids"].long()
        return found


def lessons(
    teacher: PreTrainedModel,
    windows: Tokens,
    folder: Path,
    *,
    k: int,
    states: bool,
    autocast: torch.dtype | None = None,
    share: tuple[int, int] = (0, 1),
    tick: Tick = quiet,
) -> Lessons:
    """Run `teacher` over the windows that `folder` has no file for.

    Args:
        k: how many of its most likely tokens are kept at each position.
        states: keep also its embeddings and the states that enter the last layer but one.
        autocast: what matrix products are computed in; None: in the model's own dtype.
        share: (n, of): this process makes every of-th file from the n-th on; the others are made elsewhere.
    """
    shards = windows.split(SHARD)
    key = {
        **cache.model_key(teacher),
        "computed in": str(autocast or teacher.dtype),
        "k": k,
        "states": states,
    }
    files = _files(shards, folder, key)
    for path, shard in zip(files, shards, strict=True):
        if path.exists():
            check_tensors(path, AGAIN, _shapes(teacher, shard, k, states))
    for n, (path, shard) in enumerate(zip(files, shards, strict=True)):
        tick(STAGE, n, len(files))
        if n % share[1] == share[0] and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with atomic.file(path) as work:
                tensor_files.write(_answers(teacher, shard, k, states, autocast), work)
    tick(STAGE, len(files), len(files))
    return Lessons(files, states)


def _files(shards: Sequence[Tensor], folder: Path, key: dict[str, Any]) -> list[Path]:
    said = [{**key, "tokens": hashlib.sha256(one.numpy().tobytes()).hexdigest()} for one in shards]
    return [cache.path(folder, "teacher", one, "safetensors") for one in said]


def _shapes(teacher: PreTrainedModel, shard: Tokens, k: int, states: bool) -> dict[str, tuple[int, ...] | None]:
    """Of the tensors that answer a shard."""
    rows, length = shard.shape
    most = (rows, length - 1, min(k, teacher.config.vocab_size))
    return {"ids": most, "chances": most, "tail": most[:2], **dict.fromkeys(("embedded", "hidden") if states else ())}


@torch.no_grad()
def _answers(
    teacher: PreTrainedModel, shard: Tokens, k: int, states: bool, autocast: torch.dtype | None
) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    small = torch.uint16 if teacher.config.vocab_size <= 2**16 else torch.int32
    for batch in shard.split(max(1, BATCH_TOKENS // shard.shape[1])):
        with computing(teacher.device, autocast):
            out = teacher(batch.to(teacher.device), use_cache=False, output_hidden_states=states)
        ids, chances, tail = most_likely(out.logits[:, :-1], k)
        # half precision spaces log-probabilities by 0.8 % at e^-8 to e^-16; the tail keeps what they sum to exact
        one = {"ids": ids.to(small), "chances": chances.half(), "tail": tail}
        if states:  # bfloat16: the largest activations are beyond what float16 holds
            one |= {"embedded": out.hidden_states[EMBEDDED].bfloat16(), "hidden": out.hidden_states[HIDDEN].bfloat16()}
        for name, value in one.items():
            found.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values).contiguous() for name, values in found.items()}
