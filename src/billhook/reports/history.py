"""What billhook.json says was done to a model: every key that is read back, and its type.

Pages, cards and commands take the record as plain data; what is typed here is what they rely on.  Keys that are not
named may hold anything.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from billhook.runtime.atomic import MARK
from billhook.runtime.documents import read_object, typed

Count = Annotated[int, Field(ge=0, le=2**53)]
Layer = Annotated[int, Field(ge=0, lt=10_000)]
Real = Annotated[float, Field(ge=-1e300, le=1e300)]
Name = Annotated[str, Field(pattern=r"\S")]
Number = Real | None  # null where it was not finite, or not measured


class Part(BaseModel):
    """Strict: a number in quotes is not one.  Keys that nothing reads are allowed."""

    model_config = ConfigDict(strict=True, extra="allow")


class Size(Part):
    parameters: Count
    decoder_parameters: Count


class Sizes(Part):
    before: Size
    after: Size
    budget: Name
    achieved_ratio: Number
    achieved_ratio_of_all: Number


class Calibration(Part):
    windows: Count
    seq_len: Count
    source: str
    probes: Count | None = None
    begins_with: list[str] | None = None


class Settings(Part):
    """The recipe; its other keys are shown and never computed with."""

    method: Name


class LayerCut(Part):
    layer: Layer
    kind: Name
    units: Count
    dropped: Count
    error_without: Number
    error: Number
    error_held_out: Number = None
    score_dropped: Number = None

    @model_validator(mode="after")
    def _some_stay(self) -> "LayerCut":
        if self.dropped > self.units:
            raise ValueError(f"dropped should be at most units, {self.units}")
        return self


class Vocabulary(Part):
    before: Count
    kept: Count
    calibration_grows: Number


class Operator(Part):
    role: Name
    error: Number
    error_held_out: Number


class Zeros(Part):
    pattern: str
    targets: list[str]
    zeros: Count
    weights: Count
    sparsity: Number
    operators: list[Operator]


class Residual(Part):
    before: Count
    kept: Count
    rotated: bool
    untied_parameters: Count


class Candidate(Part):
    name: Name
    dropped: list[Layer]
    before: dict[str, Number]
    after: dict[str, Number]
    rank_before: Number
    rank_after: Number


class Selection(Part):
    chosen: str
    by: str
    heal_tokens: Count
    seconds: Number = None
    candidates: list[Candidate]


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


class Judgement(Part):
    step: Count
    tokens: Count
    perplexities: dict[str, Number]
    shares: dict[str, Number] | None = None


class Flips(Part):
    step: Count
    flips: Count


class Rate(Part):
    lr: Real
    loss: Number


class Scored(Part):
    tokens: Count | None = None
    seq_len: Count | None = None
    begins_with: list[str] | None = None


class Choosing(Part):
    windows: Count
    tokens: Count


class Recovery(Part):
    student: Name
    teacher: str | None
    objective: str
    states: bool
    trainable: str
    texts: list[str]
    text_sha256: list[str] | None = None
    mixture: str | None = None
    keep_data: str | None = None
    choosing: Choosing | None = None
    windows: Count
    windows_available: Count
    passes: Number = None
    tokens: Count
    kept_tokens: Count | None = None
    seq_len: Count
    begins_with: list[str] | None = None
    batch_tokens: Count
    steps: Count
    lr: Real
    warmup: Number = None
    rates: list[Rate] | None = None
    precision: str
    top_k: Count
    processes: Count | None = None
    seed: Count
    keep_zeros: bool | None = None
    pattern: str | None = None
    masks: str | None = None
    mask_score: str | None = None
    mask_decay: Number = None
    flips: list[Flips] | None = None
    bits: str | None = None
    scales: str | None = None
    contrast: Number = None
    merge: bool | None = None
    loftq: str | None = None
    quantized: dict[str, Any] | None = None
    losses: list[Number] | None = None
    evaluations: list[Judgement] | None = None
    teacher_perplexities: dict[str, Number] | None = None
    judged_by: dict[str, Scored] | None = None
    stopped: str | None = None
    tokens_per_second: Number = None
    trained_parameters: Number = None
    parameters: Number = None
    peak_growth_bytes: Number = None
    seconds: dict[str, Number] | None = None


class Client(Part):
    client: str | None = None
    version: str | None = None


class Cut(Part):
    """What billhook.json holds of a model that billhook pruned, and perhaps trained afterwards."""

    recipe: Settings
    command: str | None = None  # the command line that makes it again
    parent: Name
    model_type: str | None = None
    layout: Literal["uniform", "per_layer"] | None = None
    paper: str | None = None
    sizes: Sizes
    calibration: Calibration
    cuts: list[LayerCut]
    dropped_layers: list[Layer] | None = None
    kept_layers: list[Layer] | None = None
    vocabulary: Vocabulary | None = None
    selection: Selection | None = None
    search: Search | None = None
    zeros: Zeros | None = None
    residual: Residual | None = None
    recovery: list[Recovery] | None = None
    seconds: dict[str, Number]
    peak_growth_bytes: Number = None
    versions: dict[str, str]
    loads: list[Client] | None = None

    @model_validator(mode="after")
    def _stay(self) -> "Cut":
        if self.dropped_layers and self.kept_layers is None:
            raise ValueError("kept_layers should name the layers that stay, since dropped_layers has some")
        return self


def read(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint's billhook.json says was cut and trained; None if nothing was cut or there is no file.

    Raises:
        BillhookError: it cannot be read, or a key is missing or of another type; names it.
    """
    path, remedy = folder / MARK, "copy the folder again, or remove the file if what it tells may be forgotten"
    try:
        record = read_object(path, str(path), remedy)
    except FileNotFoundError:
        return None
    if "cuts" not in record:
        return None
    typed(Cut, record, str(path), remedy)
    return record
