"""Measure several models side by side: quality, speed, memory, and the text they write."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from billhook import data
from billhook.checkpoints.gguf.file import parts
from billhook.checkpoints.load import Opened
from billhook.checkpoints.save import stored_bytes
from billhook.choices import PARTS
from billhook.data import Text
from billhook.errors import BillhookError
from billhook.evaluation.continuations import NEW_TOKENS, PROMPTS, continuations
from billhook.evaluation.perplexity import Perplexity, perplexities
from billhook.evaluation.speed import memory, speeds
from billhook.evaluation.zeroshot import retention
from billhook.models import sizes
from billhook.models.experts import fused
from billhook.runtime.peers import ALONE, Peers
from billhook.runtime.progress import Tick, quiet, ticked
from billhook.runtime.text_files import read_text

ROOM = 64  # positions left for new tokens if a model has too few for the default context
LONGEST_PROMPT = 2**16  # characters; most models have fewer positions
Tasks = Callable[["Subject", Tick], list[dict[str, Any]]]


@dataclass(frozen=True)
class Subject:
    """A model to measure, with its name in tables."""

    name: str
    model: Any
    tokenizer: Any
    disk_bytes: int | None = None

    @classmethod
    def of(cls, opened: Opened, name: str | None = None) -> "Subject":
        """An opened model, with the size of its files."""
        stored = opened.folder and stored_bytes(opened.folder)
        if opened.file:
            stored = sum(part.stat().st_size for part in parts(opened.file))
        return cls(name or opened.name, opened.model, opened.tokenizer, stored)


@dataclass(frozen=True)
class Measures:
    """What to measure, and how."""

    texts: Sequence[Text] = ()
    seq_len: int = 512
    max_windows: int | None = None  # for each text; None for all
    batch_sizes: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (512,)
    prompts: tuple[str, ...] = PROMPTS
    new_tokens: int = NEW_TOKENS
    repeats: int = 5
    tasks: Tasks | None = field(default=None, repr=False)
    parts: tuple[str, ...] = tuple(PARTS)
    peers: Peers = ALONE  # that share the windows of each text


def side_by_side(
    subjects: Sequence[Subject], measures: Measures, reference: bool = False, tick: Tick = quiet
) -> list[dict[str, Any]]:
    """Every measure of every model, as plain data; mixtures of experts are measured with the stock class's forward.

    Args:
        reference: whether the other models are compared with the first.

    Returns:
        by subject; in a process that is not the first of those that share the windows, without what is not shared.

    Raises:
        BillhookError: a text is shorter than a window, a context longer than a model's positions; names it.
    """
    if not measures.peers.first:
        measures = replace(measures, parts=(), tasks=None)
    with fused(*(subject.model for subject in subjects)):
        return _measured(subjects, measures, reference, tick)


def _measured(subjects: Sequence[Subject], measures: Measures, reference: bool, tick: Tick) -> list[dict[str, Any]]:
    contexts = _contexts(subjects, measures)
    qualities = _qualities(subjects, measures, reference, tick)
    pairs = [(batch, context) for batch in measures.batch_sizes for context in contexts]
    results = [
        {
            "name": subject.name,
            "sizes": sizes.parameters(subject.model),
            "macs_per_token": sizes.macs_per_token(subject.model, contexts[0]),
            "disk_bytes": subject.disk_bytes,
            "tokenizer": data.fingerprint(subject.tokenizer),
            "perplexities": [asdict(result) for result in quality],
            "tasks": [],
        }
        for subject, quality in zip(subjects, qualities, strict=True)
    ]
    if "speed" in measures.parts:
        timed = speeds([s.model for s in subjects], pairs, repeats=measures.repeats, tick=tick)
        for result, subject, speed in zip(results, subjects, timed, strict=True):
            result["speeds"] = [asdict(timing) for timing in speed]
            result["memory"] = memory(subject.model, measures.batch_sizes[0], contexts[0])
    if "texts" in measures.parts:
        for result, subject in ticked(list(zip(results, subjects, strict=True)), "generation", tick):
            result["prompts"] = list(measures.prompts)
            result["continuations"], result["generation"] = continuations(
                subject.model, subject.tokenizer, measures.prompts, measures.new_tokens
            )
    if measures.tasks:
        for result, subject in zip(results, subjects, strict=True):
            result["tasks"] = measures.tasks(subject, tick)
            result["retention"] = retention(results[0]["tasks"], result["tasks"]) if reference else None
    return results


def same_tokenizer(results: Sequence[dict[str, Any]]) -> bool:
    """Whether all results have the same tokenizer, so that perplexities per token compare."""
    return len({result["tokenizer"] for result in results}) == 1


def _qualities(subjects: Sequence[Subject], measures: Measures, reference: bool, tick: Tick) -> list[list[Perplexity]]:
    """Perplexities by subject and text.

    Models that share a tokenizer see the same windows in one pass, and are compared with the reference if that is one
    of them.
    """
    groups: dict[str, list[int]] = {}
    for n, subject in enumerate(subjects):
        groups.setdefault(data.fingerprint(subject.tokenizer), []).append(n)
    results: list[list[Perplexity]] = [[] for _ in subjects]
    for members in groups.values():
        models, tokenizer = [subjects[n].model for n in members], subjects[members[0]].tokenizer
        for text in measures.texts:
            windows = data.windows(text, tokenizer, measures.seq_len, spans=True)
            windows = replace(
                windows, tokens=windows.tokens[: measures.max_windows], bytes=windows.bytes[: measures.max_windows]
            )
            for n in members:
                data.check_vocabulary(windows, subjects[n].model, subjects[n].name)
            how: dict[str, Any] = {"reference": reference and members[0] == 0, "peers": measures.peers}
            scored = perplexities(models, windows, tick=tick, **how)
            for n, result in zip(members, scored, strict=True):
                results[n].append(result)
    return results


def _contexts(subjects: Sequence[Subject], measures: Measures) -> list[int]:
    """The contexts to measure: the default is shortened to fit all models, others are refused if they do not fit."""
    limits = {s.name: getattr(s.model.config, "max_position_embeddings", None) for s in subjects}
    least = min((limit for limit in limits.values() if limit), default=None)
    if least is None:
        return list(measures.contexts)
    if measures.contexts == Measures.contexts:
        return [max(1, min(measures.contexts[0], least - ROOM))]
    for name, limit in limits.items():
        if limit and (longest := max(measures.contexts)) + ROOM > limit:
            raise BillhookError(
                f"context {longest}: {name} has {limit} positions, {ROOM} of them for new tokens: "
                f"at most {limit - ROOM}"
            )
    return list(measures.contexts)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts from a file, one a line.

    Raises:
        BillhookError: the file cannot be read, has no prompt, or one that is too long.
    """
    lines = tuple(line for line in read_text(path).splitlines() if line.strip())
    if not lines:
        raise BillhookError(f"prompts {path}: no line holds a prompt")
    if (longest := max(map(len, lines))) > LONGEST_PROMPT:
        raise BillhookError(f"prompts {path}: one has {longest:,} characters: at most {LONGEST_PROMPT:,}")
    return lines
