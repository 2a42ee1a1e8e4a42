"""What a recovery may choose, and what its words mean."""

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
HALVED = 0.6  # of the layers left, at most: depth counts as halved
STATES = {
    "auto": f"where at most {HALVED:.0%} of the layers are left",
    "on": "align embeddings and late hidden states with the teacher's, too",
    "off": "predictions alone",
}
STEPS = 200  # into which a budget is cut: 10k tokens did better in 20 steps than in 10 (docs/LOG.md)
MOST = 2**16  # tokens in a step, however large the budget


class Recovery(BaseModel):
    """How to train after a cut: everything that decides the result but the two models."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str = ""
    tokens: int | None = Field(default=None, ge=1)  # to train on; "500k" is understood
    minutes: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # instead: all of it may take
    text: tuple[str, ...] = ("demo",)
    held_out: tuple[str, ...] = ("demo",)  # texts to judge by
    objective: str = "distill"
    states: str = "auto"
    trainable: str = "decoder"  # ahead of `all` on three texts, faster (docs/LOG.md)
    lr: float | None = Field(default=None, gt=0, lt=1, allow_inf_nan=False)  # None: the best of three
    batch_tokens: int | None = Field(default=None, ge=1)  # a step; None: `STEPS` of them, where the windows allow
    micro_batch: int = Field(default=1, ge=1)  # windows in one forward
    seq_len: int = Field(default=512, ge=2)
    warmup: float = Field(default=0.05, ge=0, lt=1, allow_inf_nan=False)  # share of the steps
    top_k: int = Field(default=256, ge=1)  # of the teacher's next tokens
    rank: int = Field(default=32, ge=1)  # of lora; of spp, blocks of rows
    keep_zeros: bool | None = None  # of a sparse model; None: refuse to train one, unless it is by spp
    dropout: bool = False  # the config's own
    guard: bool = True
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
        """Whether no zero of a weight is filled: asked for, or by the form of what is trained."""
        return bool(self.keep_zeros) or self.trainable == "spp"

    def rows(self, tokens: int, processes: int = 1) -> int:
        """Windows in a step, of a run over so many tokens."""
        if self.batch_tokens is not None:
            return max(1, round(self.batch_tokens / self.seq_len))
        return rows_for(tokens, self.seq_len, self.micro_batch * processes)


def rows_for(tokens: int, seq_len: int, share: int = 1) -> int:
    """Windows in a step, a multiple of `share`: `STEPS` steps in a budget, where windows allow."""
    return share * max(1, round(min(tokens // STEPS, MOST) / seq_len / share))


def recovery(**settings: Any) -> Recovery:
    """Settings of a recovery.

    Raises:
        BillhookError: an unknown setting or an impossible value, the first one found.
    """
    return checked(Recovery, settings)
