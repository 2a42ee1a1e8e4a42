"""What a prune or a training did, typed for Python: what users read has a name, all else stays in `record`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from billhook.models.plan import Cut
from billhook.reports.records import to_json

Made = TypeVar("Made", bound="Record")
Of = Callable[[Any], Any]


def each(of: Of) -> Of:
    """For a list, or for None where there is none."""
    return lambda found: tuple(map(of, found or ()))


@dataclass(frozen=True, kw_only=True)
class Record:
    """A result as plain data, with names for the part of it that users read."""

    record: Mapping[str, Any] = field(repr=False)  # all of it
    made: ClassVar[Mapping[str, Of]] = {}  # how fields come of what the record has by their names, or of None

    @classmethod
    def of(cls: type[Made], record: Mapping[str, Any]) -> Made:
        """The plain data, typed."""
        names = [one.name for one in fields(cls) if one.name != "record"]
        return cls(record=record, **{name: cls.made.get(name, _plain)(record.get(name)) for name in names})

    def __getitem__(self, name: str) -> Any:
        """What has no name of its own: report["search"]."""
        return self.record[name]

    def __contains__(self, name: str) -> bool:
        return name in self.record

    def to_json(self) -> str:
        """As JSON, with null for a number that is not finite."""
        return to_json(dict(self.record))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class Size(Record):
    """Parameters of a model."""

    parameters: int  # a tied head counted once
    decoder_parameters: int  # of the decoder layers


@dataclass(frozen=True, kw_only=True)
class Sizes(Record):
    """Sizes before and after a cut, the budget asked for, and the shares that went."""

    before: Size
    after: Size
    budget: str
    achieved_ratio: float  # of the decoder layers' parameters
    achieved_ratio_of_all: float
    made: ClassVar = {"before": Size.of, "after": Size.of}


@dataclass(frozen=True, kw_only=True)
class Training(Record):
    """One training of a model."""

    student: str
    teacher: str | None
    kept_tokens: int  # that the model, as it is kept, was trained on
    stopped: str | None  # why it ended early, if it did
    seconds: Mapping[str, float]  # by stage


def _cut(found: Mapping[str, Any]) -> Cut:
    """A number that was not finite is null in files."""
    names = [one.name for one in fields(Cut)]
    told: dict[str, Any] = {name: math.nan if found.get(name) is None else found[name] for name in names}
    told["error_held_out"] = found.get("error_held_out")
    return Cut(**told)


@dataclass(frozen=True, kw_only=True)
class Report(Record):
    """What was done to a model: what billhook.json beside it says."""

    parent: str  # the model it was made from
    model_type: str
    command: str | None  # that does the same; None where nothing was pruned
    layout: str | None
    sizes: Sizes | None
    cuts: tuple[Cut, ...]
    dropped_layers: tuple[int, ...]
    recovery: tuple[Training, ...]
    seconds: Mapping[str, float]  # of the prune, by stage
    made: ClassVar = {
        "sizes": lambda found: found and Sizes.of(found),
        "cuts": each(_cut),
        "dropped_layers": each(int),
        "recovery": each(Training.of),
        "seconds": lambda found: found or {},
    }
