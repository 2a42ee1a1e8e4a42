"""What billhook.json says was done to a model: every key that is read back, and its type.

Pages, cards and commands take the record as plain data; what is typed here is what they rely on.  Keys that are not
named may hold anything.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from billhook.reports.kinds import Count, Layer, Name, Number, Pair, Part, Real
from billhook.reports.search_history import Search
from billhook.runtime.atomic import MARK
from billhook.runtime.documents import read_object, typed


class Size(Part):
    parameters: Count
    decoder_parameters: Count


class Sizes(Part):
    before: Size
    after: Size
    budget: Name
    achieved_ratio: Number
    achieved_ratio_of_all: Number


class Elsewhere(Part):
    source: str
    windows: Count


class Calibration(Part):
    windows: Count
    seq_len: Count
    source: str
    probes: Count | None = None
    elsewhere: Elsewhere | None = None
    begins_with: list[str] | None = None


class Settings(Part):
    """The recipe; its other keys are shown and never computed with."""

    method: Name
    minutes: Number = None


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


class CutTried(Part):
    closed: Number
    refined: bool
    behind: Number
    behind_standard_error: Number
    seconds: Number


class Auto(Part):
    chosen: Name
    tried: dict[str, Number]
    trials: dict[str, CutTried] | None = None
    trial_windows: Count
    refused: dict[str, str]

    @model_validator(mode="after")
    def _of_the_same_cuts(self) -> "Auto":
        if self.trials and (self.trials.keys() != self.tried.keys() or len(self.trials) < 2):
            raise ValueError("trials should be of the cuts that tried names, two or more")
        if self.tried and self.chosen not in self.tried:
            raise ValueError("chosen should be one of the cuts that tried names")
        return self


class Refined(Part):
    first: Layer
    last: Layer
    before: Number
    after: Number
    kept: bool


class Look(Part):
    text: str
    perplexities: Pair
    factor: Number
    factor_standard_error: Number
    kl: Number
    repetition: dict[str, Pair]
    tasks: dict[str, Pair]
    warning: str


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
    auto: Auto | None = None
    refined: list[Refined] | None = None
    look: Look | None = None
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
