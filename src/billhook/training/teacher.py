"""The teacher's predictions for every training window, cached on disk: training needs no second model in memory.

A file holds SHARD windows, and its name is a digest of all that decides its content.  So runs may share a folder, and a
longer run of the same seed goes on where a shorter one ended.
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
from billhook.evaluation.perplexity import head_batches
from billhook.math.losses import most_likely
from billhook.runtime import cache
from billhook.runtime.headers import check_tensors
from billhook.runtime.precision import computing
from billhook.runtime.progress import Tick, quiet
from billhook.tensors import Tokens

SHARD = 32  # windows in a file: 12 MB of 512 tokens at k = 256
STAGE = "asking the teacher"
# indices into hidden_states: the embeddings, and what enters the last layer but one, where Minitron (arXiv:2407.14679)
# aligns a student
EMBEDDED, HIDDEN, LAST = 0, -3, -1


@dataclass(frozen=True)
class Lesson:
    """What is kept of a teacher's predictions for a window."""

    k: int  # so many of the likeliest tokens at each position
    states: bool = False  # embeddings and the states that enter the last layer but one, too
    last: bool = False  # what enters the head, too
    autocast: torch.dtype | None = None  # that matrix products are computed in; None: the model's own

    @property
    def hidden(self) -> dict[str, int]:
        """Which of `hidden_states` are kept, by the tensors' names."""
        aligned = {"embedded": EMBEDDED, "hidden": HIDDEN} if self.states else {}
        return aligned | ({"last": LAST} if self.last else {})


@dataclass(frozen=True)
class TeacherCache:
    """Files that hold the teacher's predictions, window by window."""

    files: Sequence[Path]  # one for every SHARD windows
    states: bool  # whether they hold hidden states, too

    def of(self, window: int) -> dict[str, Tensor]:
        """A window's `ids` and `chances` (length - 1, k), `tail` (length - 1), and states (length, hidden).

        Raises:
            BillhookError: the file is damaged.
        """
        path, row = self.files[window // SHARD], window % SHARD
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_slice(key)[row] for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BillhookError(f"{path} is damaged ({first_line(error)}): {cache.AGAIN}") from error
        tensors["ids"] = tensors["ids"].long()
        return tensors


def fill_cache(
    teacher: PreTrainedModel,
    windows: Tokens,
    folder: Path,
    lesson: Lesson,
    *,
    share: tuple[int, int] = (0, 1),
    tick: Tick = quiet,
) -> TeacherCache:
    """The predictions for `windows` (windows, length); the teacher runs over those that `folder` has no file for.

    Args:
        share: (n, count): this process makes every count-th file from the n-th on; other processes make the others.

    Raises:
        BillhookError: a file in `folder` is damaged.
    """
    shards = windows.split(SHARD)
    key = {
        **cache.model_key(teacher),
        "computed in": str(lesson.autocast or teacher.dtype),
        "k": lesson.k,
        "states": lesson.states,
        **({"last": True} if lesson.last else {}),
    }
    files = _files(shards, folder, key)
    for path, shard in zip(files, shards, strict=True):
        if path.exists():
            check_tensors(path, cache.AGAIN, _shapes(teacher, shard, lesson))
    for n, (path, shard) in enumerate(zip(files, shards, strict=True)):
        tick(STAGE, n, len(files))
        if n % share[1] == share[0] and not path.exists():
            cache.write_tensors(path, _predictions(teacher, shard, lesson))
    tick(STAGE, len(files), len(files))
    return TeacherCache(files, lesson.states)


def _files(shards: Sequence[Tensor], folder: Path, key: dict[str, Any]) -> list[Path]:
    keys = [{**key, "tokens": hashlib.sha256(shard.numpy().tobytes()).hexdigest()} for shard in shards]
    return [cache.path(folder, "teacher", shard_key, "safetensors") for shard_key in keys]


def _shapes(teacher: PreTrainedModel, shard: Tokens, lesson: Lesson) -> dict[str, tuple[int, ...] | None]:
    """The shapes of the tensors in a shard's file; None where any will do."""
    rows, length = shard.shape
    likeliest = (rows, length - 1, min(lesson.k, teacher.config.vocab_size))
    hidden: dict[str, None] = dict.fromkeys(lesson.hidden)
    return {"ids": likeliest, "chances": likeliest, "tail": likeliest[:2], **hidden}


@torch.no_grad()
def _predictions(teacher: PreTrainedModel, shard: Tokens, lesson: Lesson) -> dict[str, Tensor]:
    batches: dict[str, list[Tensor]] = {}
    narrow = torch.uint16 if teacher.config.vocab_size <= 2**16 else torch.int32
    for batch in head_batches(shard):
        with computing(teacher.device, lesson.autocast):
            out = teacher(batch.to(teacher.device), use_cache=False, output_hidden_states=bool(lesson.hidden))
        ids, chances, tail = most_likely(out.logits[:, :-1], lesson.k)
        # half precision rounds log-probabilities to 0.8 % at e^-8 to e^-16; the tail keeps their sum exact
        tensors = {"ids": ids.to(narrow), "chances": chances.half(), "tail": tail}
        for name, place in lesson.hidden.items():  # the largest activations are beyond what float16 holds
            tensors[name] = out.hidden_states[place].bfloat16()
        for name, tensor in tensors.items():
            batches.setdefault(name, []).append(tensor.cpu())
    return {name: torch.cat(values).contiguous() for name, values in batches.items()}
