"""What billhook.json says of a search: every key that is read back, and its type."""

from typing import Annotated

from pydantic import Field, model_validator

from billhook.reports.kinds import Count, Layer, Name, Number, Part


class Solution(Part):
    levels: Annotated[list[Count], Field(min_length=1)]
    count: Count
    draw: Count
    coefficients: dict[str, Number]
    power: Number
    reduction: str
    within: bool


class Shape(Part):
    first: Count
    last: Count
    slope: Number
    bend: Number


class Winner(Part):
    solution: Solution | None = None
    shape: Shape | None = None
    metric: str | None = None
    slope: Number = None
    bend: Number = None
    attention: Count | None = None
    block: Annotated[list[Layer], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Winner":
        if self.metric and not self.solution and {"slope", "bend"} - self.model_fields_set:
            raise ValueError("a metric should have a slope and a bend")
        return self


class Trial(Part):
    number: Count
    state: Name
    worse: Number = None


class Known(Part):
    metric: Name
    loss: Number
    meaning: str | None = None
    standard: bool | None = None
    gain: Number = None
    standard_error: Number = None


class Step(Part):
    what: Name
    loss: Number
    gain: Number = None
    standard_error: Number = None


class Finalist(Part):
    name: Count | str
    by_fasp: bool | None = None
    rung: Number = None
    final: Number = None
    gain: Number = None
    standard_error: Number = None


class Pool(Part):
    sources: list[str]
    seq_len: Count
    begins_with: list[str] | None = None
    left_out: Count | None = None
    source: list[Count]
    clusters: list[Count]
    shares: list[Number]
    samples: list[str]

    @model_validator(mode="after")
    def _alike(self) -> "Pool":
        lengths = {len(values) for values in (self.source, self.clusters, self.shares, self.samples)}
        if len(lengths) > 1:
            raise ValueError("source, clusters, shares and samples should be of one length, one for each window")
        if any(n >= len(self.sources) for n in self.source):
            raise ValueError(f"source should number the {len(self.sources)} sources from 0")
        return self


Rectangle = Annotated[list[Count], Field(min_length=2, max_length=2)]  # how many windows, and how many tokens each has


class Search(Part):
    method: str | None = None
    standard: Name
    sampler: str
    objective: str = "nll"
    trials: list[Trial]
    known: list[Known] | None = None
    importance: dict[str, Number] | None = None
    winner: Winner | None = None
    parts: list[Step] | None = None
    finalists: list[Finalist] | None = None
    accepted: bool | None = None
    chosen: Count | None = None
    by_fasp: bool | None = None
    gain: Number = None
    standard_error: Number = None
    restoration: bool | None = None
    pool: Pool | None = None
    judges: list[str] | None = None
    validation: dict[str, Rectangle] | None = None
