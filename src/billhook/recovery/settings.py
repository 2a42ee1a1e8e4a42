"""The settings of a recovery, and what their values mean."""

from pathlib import Path
from typing import Any

from pydantic import field_validator, model_validator

from billhook.choices import BITS, FAMILY_ROW, MASK_SCORES, MASKS, PRECISIONS, SCALES, TRAINABLE
from billhook.errors import SettingsError
from billhook.math.pattern import parse
from billhook.runtime.options import Part, option
from billhook.runtime.validation import checked

OBJECTIVES = {
    "distill": "the teacher's next-token probabilities, KL(teacher || student) and nothing else",
    "ce": "the text itself: continued pretraining, which needs no teacher",
    "both": "the text itself by a third, the teacher's probabilities by two thirds",
}
HALVED = 0.6  # share of layers left up to which the depth counts as halved
STATES = {
    "auto": f"where at most {HALVED:.0%} of the layers are left",
    "on": "align embeddings and late hidden states with the teacher's, too",
    "off": "predictions alone",
}
MIXTURES = {
    "proportional": "as many windows of each text as it has",
    "dro": "more of those where the student lags its teacher, anew at each judgement (DRPruning)",
}
STEPS = 200  # steps that a budget is divided into: 10k tokens did better in 20 steps than in 10 (docs/LOG.md)
WHOLE = ("decoder", "all")  # what --bits and --masks train
MOST = 2**16  # the most tokens in a step, for any budget


DECAY = 1e-4  # AST's for GPT-2, at a rate of 2e-4 (arXiv:2407.20584, its code); for LLaMA-2 6e-5, at 2e-5
BUDGET, TEXT, MACHINE = "Budget", "Calibration", "Machine"  # headings of help; all else is under Training


class Recovery(Part):
    """How to train after a cut: everything that decides the result besides the two models."""

    teacher: str = option("", "the unpruned model, as MODEL; it answers once, to disk, and leaves")
    tokens: int | None = option(None, "how much to train on, like 500k or 2M", ge=1, unit="count", heading=BUDGET)
    minutes: float | None = option(None, "or: how long all of it may take", gt=0, heading=BUDGET)
    text: tuple[str, ...] = option(
        ("mixed",), "text to train on; may be repeated: a broad mix harms least", heading=TEXT
    )
    mixture: str = option(
        "proportional",
        "windows of each text: proportional to its length; dro: more where the student lags",
        names=MIXTURES,
        heading=TEXT,
    )
    keep_data: str = option(
        "", "share of windows to keep, learned in half of the tokens; or the kept.jsonl of a run", heading=TEXT
    )
    held_out: tuple[str, ...] = option(
        ("demo",), "text to judge by, better of another kind; may be repeated", heading=TEXT
    )
    guard: bool = option(True, "stop when a held-out text gets worse", heading=TEXT)
    objective: str = option(
        "distill", "distill: the teacher's probabilities; ce: the text itself; both", names=OBJECTIVES
    )
    # faster than `all`, and ahead of it on three texts (docs/LOG.md)
    trainable: str = option("decoder", ", ".join(TRAINABLE), names=TRAINABLE)
    states: str = option("auto", "align hidden states with the teacher's too: auto, on, off", names=STATES)
    lr: float | None = option(
        None, "peak learning rate; auto: the best of three", gt=0, lt=1, spelled=True, shown="auto"
    )
    batch_tokens: int | None = option(
        None, "tokens in a step, over all processes", ge=1, unit="count", shown=f"{STEPS} steps in all"
    )
    micro_batch: int = option(1, "windows in one forward; the rest accumulates", ge=1)
    seq_len: int = option(512, "tokens in a window", ge=2, heading=TEXT)
    warmup: float = option(0.05, "share of the steps; a cosine to zero follows", ge=0, lt=1)
    top_k: int = option(256, "tokens whose teacher probability is kept; others count as one", ge=1)
    rank: int = option(32, "of lora's adapters; of spp: blocks of rows", ge=1)
    merge: bool = option(True, "of lora: add the adapters to the weights; else write them, as a PEFT adapter")
    loftq: str = option("", "of --no-merge: the model before it had few bits, whose loss the adapters start with")
    # None: a sparse model is trained by spp only
    keep_zeros: bool | None = option(None, "of a sparse model: keep its zeros, or fill them; one must be said")
    pattern: str = option("", "of --masks: N zeros in every M weights of a row, like 2:4")
    masks: str = option("", "masks that move while it trains: ast, the largest weights stay (AST)", names=MASKS)
    mask_score: str = option("magnitude", f"of --masks: {', '.join(MASK_SCORES)}", names=MASK_SCORES)
    mask_decay: float | None = option(
        None, "of --masks: how strongly masked weights are pulled to zero", ge=0, lt=1, shown=f"{DECAY:g}"
    )
    bits: str = option("", "keep weights on the levels of so many, which `quantize` packs as they are", names=BITS)
    scales: str = option("block", "of --bits: one for each block of 32 inputs, or for each module", names=SCALES)
    contrast: float = option(0.0, "weight of the loss that tells a token's teacher state from others' (QuantGPT)", ge=0)
    dropout: bool = option(False, "train with the dropout of the model's config")
    precision: str = option("auto", ", ".join(PRECISIONS), names=PRECISIONS, heading=MACHINE)
    device: str = option("auto", "auto (an accelerator if there is one), cpu, cuda, mps, …", heading=MACHINE)
    family_row: str = option("", FAMILY_ROW, shown="derived", heading=MACHINE)
    seed: int = option(0, "of the order of the windows", ge=0, lt=2**63)

    @field_validator("keep_data", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        return str(value) if isinstance(value, float | Path) else value

    @field_validator("lr", mode="before")
    @classmethod
    def _rate(cls, value: Any) -> Any:
        return None if value == "auto" else value

    @model_validator(mode="after")
    def _fits_together(self) -> "Recovery":
        if self.tokens is None and self.minutes is None:
            raise SettingsError("how long? give --tokens 500k, or --minutes 30")
        if self.tokens is not None and self.minutes is not None:
            raise SettingsError("--tokens and --minutes are two budgets: give one")
        if self.distils and not self.teacher:
            raise SettingsError(
                f"--objective {self.objective} learns from the unpruned model: name it with --teacher, or use ce"
            )
        if self.objective == "ce" and self.states == "on":
            raise SettingsError("--states on aligns with a teacher's hidden states: use it with --objective distill")
        if not self.held_out and self.guard:
            raise SettingsError(
                "no --held-out text: nothing would show that training harms; name one, or pass --no-guard"
            )
        return self

    @model_validator(mode="after")
    def _of_texts(self) -> "Recovery":
        if self.keep_data and self.mixture == "dro":
            raise SettingsError("--keep-data and --mixture dro both say what is read: give one")
        if self.mixture == "dro" and len(self.text) < 2:
            raise SettingsError("--mixture dro shares the training among texts: name two or more, each with --text")
        if self.mixture == "dro" and not self.teacher:
            raise SettingsError("--mixture dro weighs texts by the loss beyond the teacher's: name one with --teacher")
        if self.keep_share is not None and not 0 < self.keep_share < 1:
            raise SettingsError(f"--keep-data {self.keep_data}: give a share between 0 and 1, or a kept.jsonl")
        return self

    @model_validator(mode="after")
    def _of_few_bits(self) -> "Recovery":
        if self.objective == "ce" and self.contrast:
            raise SettingsError("--contrast compares with a teacher's states: use it with --objective distill")
        if self.contrast and not self.bits:
            raise SettingsError("--contrast is a loss of training with few bits: give --bits too, or leave it out")
        if self.bits and self.trainable not in WHOLE:
            raise SettingsError(f"--bits trains whole weights on their levels: use --trainable {' or '.join(WHOLE)}")
        if self.scales == "module" and not self.bits:
            raise SettingsError("--scales says what shares a scale of --bits: give --bits too, or leave it out")
        if not self.merge and (self.trainable != "lora" or self.keep_zeros):
            raise SettingsError("--no-merge writes lora's adapters: use --trainable lora, without --keep-zeros")
        if self.loftq and self.merge:
            raise SettingsError(
                "--loftq is where adapters of a quantised model start: give --no-merge, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _of_masks(self) -> "Recovery":
        if not self.masks:
            given = {"--pattern": self.pattern, "--mask-score": self.mask_score != "magnitude"}
            given["--mask-decay"] = self.mask_decay is not None
            if said := next((flag for flag, is_given in given.items() if is_given), ""):
                raise SettingsError(f"{said} is of masks that move: give --masks ast too, or leave it out")
            return self
        if not self.pattern:
            raise SettingsError(f"--masks {self.masks}: how many zeros? give --pattern too, like 2:4")
        parse(self.pattern)
        if self.trainable not in WHOLE:
            raise SettingsError(f"--masks trains whole weights: use --trainable {' or '.join(WHOLE)}")
        if self.keep_zeros is not None:
            flag = "--keep-zeros" if self.keep_zeros else "--no-keep-zeros"
            raise SettingsError(f"{flag} says what becomes of zeros, which --masks moves: give one of them")
        if self.bits:
            raise SettingsError("--masks and --bits are two forms of the same weights: give one of them")
        return self

    @property
    def distils(self) -> bool:
        """Whether the teacher's predictions are learned from."""
        return self.objective != "ce"

    @property
    def decay(self) -> float:
        """How strongly masked weights are pulled to zero, once that is annealed."""
        return DECAY if self.mask_decay is None else self.mask_decay

    @property
    def keep_share(self) -> float | None:
        """The share of the training windows to keep, if that is to be learned; else None."""
        try:
            return float(self.keep_data)
        except ValueError:
            return None

    @property
    def opens_packed(self) -> bool:
        """Whether the student may be packed integers: its codes start the training, or stay as they are."""
        return bool(self.bits) or not self.merge

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
