"""What measuring, comparing and looking at models comes to, typed for Python; what a prune does is
`billhook.checkpoints.report`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from billhook.checkpoints.report import Record, Size, each
from billhook.evaluation.perplexity import Perplexity, ReferenceComparison
from billhook.evaluation.speed import Speed


def _perplexity(found: Mapping[str, Any]) -> Perplexity:
    told: dict[str, Any] = {one.name: found[one.name] for one in fields(Perplexity)}
    told |= {
        name: tuple(told[name]) for name in ("window_losses", "begins_with")
    }  # lists, where they were kept in files
    told["against"] = told["against"] and ReferenceComparison(**told["against"])
    return Perplexity(**told)


def _speed(found: Mapping[str, Any]) -> Speed:
    return Speed(**found)


@dataclass(frozen=True, kw_only=True)
class Measured(Record):
    """A model as `evaluate` measured it."""

    name: str
    sizes: Size
    macs_per_token: int
    disk_bytes: int | None  # None of a model in memory
    perplexities: tuple[Perplexity, ...]  # in the order of texts
    speeds: tuple[Speed, ...]
    continuations: tuple[str, ...]  # of the prompts, greedily
    made: ClassVar = {
        "sizes": Size.of,
        "perplexities": each(_perplexity),
        "speeds": each(_speed),
        "continuations": each(str),
    }


@dataclass(frozen=True, kw_only=True)
class Point(Record):
    """A contender at one ratio, as `compare` and `sweep` judge it; the unpruned model's ratio is 0."""

    series: str
    ratio: float
    error: str | None  # why there are no numbers
    parameters: int | None
    achieved_ratio: float | None  # of the decoder layers' parameters
    perplexities: tuple[Perplexity, ...]  # in the order of texts
    seconds: float | int | None  # of the prune; None where one pass served several, or none was made
    made: ClassVar = {"perplexities": each(_perplexity)}

    @property
    def factors(self) -> tuple[float, ...]:
        """Perplexities divided by the unpruned model's."""
        return tuple(found.get("factor", 1.0) for found in self.record["perplexities"])


@dataclass(frozen=True, kw_only=True)
class Checked(Record):
    """A client that loads a checkpoint and writes the same tokens as billhook."""

    client: str
    version: str
    logits_drift: float | None  # norm of the difference, as a share; None where a client tells no logits


@dataclass(frozen=True, kw_only=True)
class Exported(Record):
    """A GGUF file or a folder that was written."""

    arch: str | None  # llama.cpp's; None of a folder, as the next two
    quantize: str | None
    types: Mapping[str, int] | None  # tensors by type
    merged: str | None  # what became of shapes that no stock class has
    bytes: int  # of a folder, its weights'


@dataclass(frozen=True, kw_only=True)
class QuantizedModel(Record):
    """What few bits came to."""

    bits_per_weight: float  # of the layers' weights, their scales included
    types: Mapping[str, int]  # weights by type
    containers: Mapping[str, Mapping[str, Any]]  # what was written, with its bytes
    choice: Mapping[str, Any]  # how bits were chosen by layer; empty where all have the same


@dataclass(frozen=True, kw_only=True)
class AxisAnatomy(Record):
    """What a kind of axis could give up."""

    axis: str
    units: int | tuple[int, ...] | None  # of each layer, where they differ; None where it cannot be pruned
    parameters_per_unit: int | None
    share_of_decoder: float | None
    refused: str | None  # why it cannot be pruned


@dataclass(frozen=True, kw_only=True)
class Anatomy(Record):
    """What a model is made of."""

    model: str
    model_type: str
    layers: int
    hidden_size: int
    tied_embeddings: bool
    parameters: int
    decoder_parameters: int
    axes: tuple[AxisAnatomy, ...]
    row: Mapping[str, Any]  # of its family: by hand, or what a derived or given one says and what of it was proved
    made: ClassVar = {"axes": each(AxisAnatomy.of)}


@dataclass(frozen=True, kw_only=True)
class Forecast(Record):
    """What minutes of training buy on this machine."""

    parameters: int  # of the model once it is cut
    training_tokens_per_second: float
    teacher_tokens_per_second: float
    tokens: int
    trainable: str
    why: str
    commands: tuple[str, ...]
