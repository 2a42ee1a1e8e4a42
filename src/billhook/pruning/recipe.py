"""One recipe says a whole pruning run: command-line flags, YAML files and Python arguments are the same."""

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from billhook.choices import (
    AXIS_STREAMS,
    CLIENTS,
    DTYPES,
    EXPERT_STREAMS,
    GRADIENT_SCORES,
    LAYOUTS,
    MIXED,
    OPERATOR_STREAMS,
    PATCHES,
    PRESETS,
    ROLES,
    SAMPLERS,
    SCORES,
    SEARCH_OBJECTIVES,
    SELECT,
    STARTS,
    WAYS,
    check_axes,
)
from billhook.cuts.settings import SOLVER_DAMPING, Chopping, Narrowing, Slicing
from billhook.errors import BillhookError, one_of
from billhook.math import metric
from billhook.math.pattern import parse, parse_layer_sparsity
from billhook.methods import MASKING, METHODS
from billhook.pruning import allocation
from billhook.runtime.units import BYTES, COUNT, amount
from billhook.runtime.validation import checked

BUDGETS = ("ratio", "params", "memory", "speedup")
CANDIDATES = ("contiguous", "block-influence", "middle", "max-gap", "input")
EXPLICIT = ("drop", "keep", "layers")  # budgets of layerchop alone
ZEROS = ("sparsity", "pattern")  # budgets of methods that make zeros
MASKED = (*ZEROS, "targets", "init", "refit", "normalised", "layer_sparsity", "metric")  # what they alone have
INITIALISED = ("fistapruner", "admm")


class Recipe(BaseModel):
    """How to prune: everything that decides the result but the model itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    method: str = "fasp"
    ratio: float | None = Field(default=None, gt=0, lt=1, allow_inf_nan=False)
    params: int | None = Field(default=None, ge=1)  # parameters the whole model may have; "100M" is understood
    memory: int | None = Field(default=None, ge=1)  # bytes of weights and KV cache; "250MB" is understood
    speedup: float | None = Field(
        default=None, gt=1, allow_inf_nan=False
    )  # how many times faster a prefill is on this machine
    context: int = Field(default=2048, ge=1)  # tokens in the KV cache that `memory` counts
    batch: int = Field(default=1, ge=1)
    preset: str = "contiguous"  # layerchop: which layers go
    drop: str = ""  # layerchop: layers that go, "10-14,20"
    keep: str = ""  # layerchop: layers that stay
    layers: int | None = Field(default=None, ge=1)  # layerchop: how many layers stay
    select: str = "preset"  # layerchop: how the layers are chosen
    candidates: tuple[str, ...] = CANDIDATES  # layerchop: presets compared after a short training
    heal_tokens: int = Field(default=100_000, ge=1)  # layerchop: tokens to train each candidate on
    held_out: tuple[str, ...] = ("demo",)  # layerchop: texts that judge the candidates
    patch: str = "none"  # layerchop: what makes up for the layers that go
    sparsity: float | None = Field(
        default=None, gt=0, lt=1, allow_inf_nan=False
    )  # share of zeros in the targeted weights
    pattern: str = ""  # N zeros in every M weights of a row: "2:4"
    targets: tuple[str, ...] = ()  # roles of the weights that get zeros; none: all
    layer_sparsity: dict[int, float] = Field(
        default_factory=dict
    )  # shares of zeros of some layers, in place of `sparsity`
    init: str = ""  # fistapruner, admm: whose weights they start from
    refit: bool = False  # least squares on the weights that stay; fistapruner: True
    metric: str = ""  # optishear: alpha,F1,beta,F2; empty: searched
    normalised: bool = False  # inputs scaled to unit energy; fistapruner: True
    keep_zeros: bool = True  # zeros that are there already stay
    experts: str = ""  # experts: which go, or are merged
    rotate: bool = False  # the stream is turned before it is cut; slicegpt: True
    trials: int = Field(default=64, ge=1)  # candidates of a search
    minutes: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # time that a search may take
    pool: int = Field(default=64, ge=1)  # adapruner: windows to choose calibration samples from
    pool_len: int = Field(default=128, ge=2)  # adapruner: tokens in each of them
    clusters: int = Field(default=4, ge=1, le=8)  # adapruner: groups of such windows
    space: str = "full"
    sampler: str = "tpe"
    objective: str = "nll"
    validation: tuple[str, ...] = ()  # texts that try candidates; none: the last fifth of the calibration text
    layout: str = "uniform"
    allocation: str = "equal"
    floor: float = Field(default=0.3, gt=0, le=1, allow_inf_nan=False)
    axes: tuple[str, ...] = ()  # empty: the method's own default
    vocab_from: tuple[str, ...] = ()
    vocab_size: int = Field(default=0, ge=0)  # least tokens that `vocab_from` keeps
    stream: str = "dense_target"
    score: str = Narrowing.score
    damping: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)  # None: the method's own
    restoration: bool = Narrowing.restoration
    correction: float = Field(default=Narrowing.correction, ge=0, le=1, allow_inf_nan=False)
    calibration: str = "demo"
    samples: int = Field(default=64, ge=1)
    probes: int = Field(default=8, ge=1)  # further windows, by which an allocation judges
    seq_len: int = Field(default=512, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**63)
    clients: tuple[str, ...] = ("transformers",)
    multiple_of: int | None = Field(default=None, ge=1)  # step of widths; None: what `clients` want
    device: str = "auto"
    dtype: str = "auto"

    @field_validator(
        *("method", "score", "stream", "dtype", "layout", "preset", "select", "patch", "sampler", "objective", "init"),
        "experts",
    )
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        valid = {
            "method": METHODS,
            "score": (*SCORES, *GRADIENT_SCORES),
            "stream": {**AXIS_STREAMS, **OPERATOR_STREAMS},
            "dtype": ("auto", *DTYPES),
            "layout": LAYOUTS,
            "preset": PRESETS,
            "select": SELECT,
            "patch": PATCHES,
            "sampler": SAMPLERS,
            "objective": SEARCH_OBJECTIVES,
            "init": ("", *STARTS),
            "experts": ("", *WAYS),
        }
        return one_of(info.field_name, value, valid[info.field_name])

    @model_validator(mode="before")
    @classmethod
    def _own(cls, given: Any) -> Any:
        """Every method has settings of its own, unless told otherwise (None, or an empty text)."""
        if not isinstance(given, dict) or not (method := METHODS.get(given.get("method", "fasp"))):
            return given
        off = dict.fromkeys(("refit", "normalised", "rotate"), False)
        own = {"stream": method.stream, "sampler": "tpe", **off, **method.own}
        return {**given, **{name: value for name, value in own.items() if given.get(name) in (None, "")}}

    @field_validator("metric")
    @classmethod
    def _metric(cls, value: str) -> str:
        return str(metric.parse(value)) if value else ""

    @field_validator("targets")
    @classmethod
    def _targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one_of("target", name, ROLES) for name in dict.fromkeys(value))

    @field_validator("layer_sparsity", mode="before")
    @classmethod
    def _by_layer(cls, value: Any) -> Any:
        return parse_layer_sparsity(value) if isinstance(value, str) else value

    @field_validator("params", "memory", "heal_tokens", mode="before")
    @classmethod
    def _amount(cls, value: Any, info: Any) -> Any:
        return amount(value, BYTES if info.field_name == "memory" else COUNT, info.field_name.replace("_", "-"))

    @field_validator("clients")
    @classmethod
    def _clients(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one_of("client", name, CLIENTS) for name in value)

    @field_validator("candidates")
    @classmethod
    def _candidates(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one_of("candidate", name, PRESETS) for name in dict.fromkeys(value))

    @model_validator(mode="after")
    def _layers_fit(self) -> "Recipe":
        """What is of layerchop alone."""
        explicit = [name for name in EXPLICIT if getattr(self, name) not in (None, "")]
        if self.masks:
            self._check_masks()
        elif alien := [name for name in MASKED if getattr(self, name) not in (None, "", (), {}, False)]:
            flag = alien[0].replace("_", "-")
            raise BillhookError(f"--{flag} is of methods that make zeros: use it with --method {' or '.join(MASKING)}")
        if self.chops:
            self._check_layers()
        elif explicit:
            raise BillhookError(f"--{explicit[0]} names whole layers: use it with --method layerchop")
        elif self.select == "healed":
            raise BillhookError("--select healed chooses whole layers: use it with --method layerchop")
        elif self.patches:
            raise BillhookError("--patch makes up for whole layers that go: use it with --method layerchop")
        if self.slices:
            self._check_slices()
        elif self.rotate:
            raise BillhookError("--rotate turns the residual stream before it is cut: use it with --method slicegpt")
        return self

    def _check_masks(self) -> None:
        alien = [name for name in (*BUDGETS, *EXPLICIT) if getattr(self, name) not in (None, "")]
        if alien:
            raise BillhookError(
                f"--{alien[0]} is a budget of structured cuts; {self.method} makes zeros: give --sparsity 0.5 or --pattern 2:4"
            )
        if self.sparsity is not None and self.pattern:
            raise BillhookError("--sparsity and --pattern both say which weights become zeros: give one")
        if self.sparsity is None and not self.pattern:
            raise BillhookError(f"{self.method} makes zeros: say how many, --sparsity 0.5 or --pattern 2:4")
        if self.axes or self.allocation != "equal" or self.layout != "uniform":
            raise BillhookError(
                f"{self.method} makes zeros and cuts no axis: leave out --axes, --allocation and --layout; --targets and "
                "--layer-sparsity say where the zeros are"
            )
        if self.init and self.method not in INITIALISED:
            raise BillhookError(
                f"--init is of {' and '.join(INITIALISED)}: {self.method} has no start of another method"
            )
        if self.metric and self.method != "optishear":
            raise BillhookError(f"--metric is of optishear: {self.method} has one of its own")
        if self.shears and self.refit:
            raise BillhookError(
                "--refit repairs weights, and the search tries metrics without: search first, then give its --metric with --refit"
            )
        if self.normalised and self.method != "fistapruner":
            raise BillhookError(f"--normalised is of fistapruner: {self.method} has one scale of its own")
        one_of("stream", self.stream, OPERATOR_STREAMS)
        self._check_shares()

    def _check_shares(self) -> None:
        if self.pattern:
            parse(self.pattern)
        if self.layer_sparsity and self.pattern:
            raise BillhookError("--layer-sparsity are shares of zeros, and --pattern has none: give --sparsity")
        for n, share in self.layer_sparsity.items():
            if not 0 <= share < 1:
                raise BillhookError(f"--layer-sparsity: {share:g} of layer {n} is no share from 0 to below 1")

    def _check_slices(self) -> None:
        if self.speedup or self.allocation != "equal":
            raise BillhookError(f"{self.method} cuts all layers alike and times none: no --allocation, no --speedup")

    def _check_layers(self) -> None:
        if self.allocation != "equal":
            raise BillhookError("layerchop has no allocation: its --preset says which layers go")
        if self.patches and not any(getattr(self, name) for name in (*BUDGETS, *EXPLICIT)):
            raise BillhookError("--patch makes up for layers that go: name them, or give a budget")
        if self.select == "healed" and (self.drop or self.keep):
            raise BillhookError("--select healed chooses the layers, and --drop or --keep names them: give one")
        if self.select == "healed" and len(self.candidates) < 2:
            raise BillhookError("--select healed compares: name at least two --candidates")

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        if self.masks:
            return self
        one_of("stream", self.stream, AXIS_STREAMS)
        given = [f"--{name}" for name in (*BUDGETS, *EXPLICIT) if getattr(self, name) not in (None, "")]
        if len(given) > 1:
            raise BillhookError(f"{' and '.join(given)} are two budgets: give one")
        if self.vocab_size and not self.vocab_from:
            raise BillhookError("--vocab-size says how many tokens --vocab-from keeps at least: give a text with it")
        said = allocation.parse(self.allocation)
        by_file = said.name == "file"
        if by_file and given:
            raise BillhookError(f"{given[0]} and an allocation file both say how much goes: give one")
        if not given and not by_file and not self.vocab_from:
            raise BillhookError("no budget: give --ratio 0.2, --params 100M, --memory 250MB or --speedup 1.3")
        if self.searches and (not given or said.name != "equal"):
            raise BillhookError(
                "adapruner searches for one budget, spread evenly or by its own --space: give a ratio, and no allocation"
            )
        if self.layout == "uniform" and said.uneven:
            raise BillhookError(
                f"allocation {self.allocation} makes layers differ, which the uniform layout cannot hold: use --layout per_layer"
            )
        if self.layout != "uniform" and self.allocation == "auto":
            raise BillhookError(
                "allocation auto chooses depth and one width, for the uniform layout: leave out --layout"
            )
        check_axes(self.kinds, self.layout)
        if alien := [kind for kind in self.kinds if kind not in METHODS[self.method].kinds]:
            own = ", ".join(METHODS[self.method].kinds)
            raise BillhookError(f"{self.method} does not prune {alien[0]!r}: leave out --axes, or name some of {own}")
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> "Recipe":
        """What mixtures of experts cannot do."""
        if self.experts and not self.routes:
            raise BillhookError("--experts says how a mixture of experts loses some: use it with --method experts")
        if self.routes and self.stream not in EXPERT_STREAMS:
            raise BillhookError(f"stream {self.stream}: experts are observed in {' or '.join(EXPERT_STREAMS)}")
        if set(self.kinds) & set(MIXED) and (self.allocation != "equal" or self.score in GRADIENT_SCORES):
            raise BillhookError(
                "experts of a layer keep equal sizes: use --allocation equal, and a --score that needs no gradients"
            )
        return self

    @property
    def chops(self) -> bool:
        """Whether the method drops whole layers, chosen by preset or by name."""
        return METHODS[self.method].default_kinds == ("layers",)

    @property
    def routes(self) -> bool:
        """Whether the method takes experts away."""
        return self.method == "experts"

    @property
    def slices(self) -> bool:
        """Whether the method cuts the residual stream, through the whole model."""
        return METHODS[self.method].default_kinds == ("residual",)

    @property
    def masks(self) -> bool:
        """Whether the method makes zeros, and cuts nothing."""
        return self.method in MASKING

    @property
    def searches(self) -> bool:
        """Whether the scores are searched for."""
        return self.method == "adapruner"

    @property
    def shears(self) -> bool:
        """Whether the metric of zeros is searched for."""
        return self.method == "optishear" and not self.metric

    @property
    def restores(self) -> bool:
        """Whether kept weights are repaired: not in the paper's own space."""
        return self.restoration and not (self.searches and self.space == "paper")

    @property
    def patches(self) -> bool:
        """Whether what stands before a cut in depth is refitted."""
        return self.patch != "none"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The axes to prune."""
        return self.axes or METHODS[self.method].default_kinds

    @property
    def unit_kinds(self) -> tuple[str, ...]:
        """Those of `kinds` that are axes of a layer, not layers themselves."""
        return tuple(kind for kind in self.kinds if kind != "layers")

    @property
    def ridge(self) -> float:
        """The damping, of a patch or else of a restoration."""
        of_kind = ((self.chops, Chopping.damping), (self.slices, Slicing.damping), (self.masks, SOLVER_DAMPING))
        return self.damping or next((damping for here, damping in of_kind if here), Narrowing.damping)

    @property
    def width_step(self) -> int:
        """What FFN widths are a multiple of."""
        return self.multiple_of or math.lcm(*(CLIENTS[name][0] for name in self.clients))

    @property
    def budget(self) -> str:
        """The budget as the user would say it."""
        for name in (*BUDGETS, *EXPLICIT, *ZEROS):
            if (value := getattr(self, name)) not in (None, ""):
                if isinstance(value, str):
                    return f"{name} {value}"
                return f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:g}"
        return "an allocation file" if allocation.parse(self.allocation).name == "file" else "vocabulary alone"


def recipe(**settings: Any) -> Recipe:
    """A recipe from keyword settings.

    Raises:
        BillhookError: an unknown setting or an impossible value, the first one found.
    """
    return checked(Recipe, settings)
