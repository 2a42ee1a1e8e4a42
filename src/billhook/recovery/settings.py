"""The settings of a recovery, and what their values mean."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from billhook.choices import PRECISIONS, TRAINABLE
from billhook.errors import BillhookError, one_of
from billhook.runtime.units import COUNT, amount
from billhook.runtime.validation import checked

OBJECTIVES = {
    "distill": "the teacher's next-token probabilities, KL(teacher || student) and nothing else",
    "ce": "the text itself: continued pretraining, which needs no teacher",
}
HALVED = 0.6  # share of layers left up to which the depth counts as halved
STATES = {
    "auto": f"where at most {HALVED:.0%} of the layers are left",
    "on": "align embeddings and late hidden states with the teacher's, too",
    "off": "predictions alone",
}
STEPS = 200  # steps that a budget is divided into: 10k tokens did better in 20 steps than in 10 (docs/LOG.md)
MOST = 2**16  # the most tokens in a step, for any budget


class Recovery(BaseModel):
    """How to train after a cut: everything that decides the result besides the two models."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    teacher: str = ""
    tokens: int | None = Field(default=None, ge=1)  # tokens to train on; "500k" is understood
    minutes: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # instead of tokens: time for all of it
    text: tuple[str, ...] = ("demo",)
    held_out: tuple[str, ...] = ("demo",)  # texts to evaluate on
    objective: str = "distill"
    states: str = "auto"
    trainable: str = "decoder"  # faster than `all`, and ahead of it on three texts (docs/LOG.md)
    lr: float | None = Field(default=None, gt=0, lt=1, allow_inf_nan=False)  # learning rate; None: the best of three
    batch_tokens: int | None = Field(default=None, ge=1)  # tokens in a step; None: for `STEPS` steps, if windows allow
    micro_batch: int = Field(default=1, ge=1)  # windows in one forward pass
    seq_len: int = Field(default=512, ge=2)
    # share of the steps that the learning rate rises over
    warmup: float = Field(default=0.05, ge=0, lt=1, allow_inf_nan=False)
    top_k: int = Field(default=256, ge=1)  # the teacher's likeliest next tokens that are kept
    rank: int = Field(default=32, ge=1)  # rank of lora's adapters; blocks of rows of spp
    keep_zeros: bool | None = None  # whether zeros stay; None: a sparse model is trained by spp only
    dropout: bool = False  # whether the dropout of the model's config is on
    guard: bool = True  # whether training stops once a held-out text gets worse
    precision: str = "auto"
    device: str = "auto"
    seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("objective", "states", "trainable", "precision")
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        valid = {"objective": OBJECTIVES, "states": STATES, "trainable": TRAINABLE, "precision": PRECISIONS}
        return one_of(info.field_name, value, valid[info.field_name])

    @field_validator("tokens", "batch_tokens", mode="before")
    @classmethod
    def _amount(cls, value: Any, info: Any) -> Any:
        return amount(value, COUNT, info.field_name.replace("_", "-"))

    @field_validator("lr", mode="before")
    @classmethod
    def _rate(cls, value: Any) -> Any:
        return None if value == "auto" else value

    @model_validator(mode="after")
    def _fits_together(self) -> "Recovery":
        if self.tokens is None and self.minutes is None:
            raise BillhookError("how long? give --tokens 500k, or --minutes 30")
        if self.tokens is not None and self.minutes is not None:
            raise BillhookError("--tokens and --minutes are two budgets: give one")
        if self.objective == "distill" and not self.teacher:
            raise BillhookError("--objective distill learns from the unpruned model: name it with --teacher, or use ce")
        if self.objective == "ce" and self.states == "on":
            raise BillhookError("--states on aligns with a teacher's hidden states: use it with --objective distill")
        if not self.held_out and self.guard:
            raise BillhookError(
                "no --held-out text: nothing would show that training harms; name one, or pass --no-guard"
            )
        return self

    @property
    def keeps_zeros(self) -> bool:
        """Whether every zero stays: because that was asked for, or because what is trained fills none."""
        return bool(self.keep_zeros) or self.trainable == "spp"

    def rows(self, tokens: int, processes: int = 1) -> int:
        """Windows in a step of a run over `tokens`."""
        if self.batch_tokens is not None:
            return max(1, round(self.batch_tokens / self.seq_len))
        return rows_for(tokens, self.seq_len, self.micro_batch * processes)


def rows_for(tokens: int, seq_len: int, multiple_of: int = 1) -> int:
    """Windows in a step, such that `tokens` make `STEPS` steps where windows allow."""
    return multiple_of * max(1, round(min(tokens // STEPS, MOST) / seq_len / multiple_of))


def recovery(**settings: Any) -> Recovery:
    """Settings of a recovery.

    Raises:
        BillhookError: an unknown setting or an impossible value, the first one found.
    """
    return checked(Recovery, settings)
