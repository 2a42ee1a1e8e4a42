"""What `quantize` is asked for.  Loads no torch."""

from dataclasses import dataclass
from importlib.util import find_spec

from billhook.choices import (
    BITS,
    BITS_BY,
    CONTAINERS,
    EMBEDDING_TYPES,
    GRID_TYPES,
    NOT_GGML,
    OPERATOR_STREAMS,
    QUANTIZERS,
    TERNARY,
    WITH_MINIMUM,
)
from billhook.errors import BillhookError, SettingsError, one_of

MIXED, KEPT = "mixed", "kept"
EXTRA = "install the extra: pip install 'billhook[quantize]'"


@dataclass(frozen=True)
class Wanted:
    """What `quantize` is asked for.

    Raises:
        BillhookError: settings that cannot go together.
    """

    bits: str = ""  # 2, 4, 5, 8, a type, mixed; '' is 4, or mixed where there is a budget
    memory: int | None = None  # bytes that all weights may take
    format: str = "gguf"
    method: str = "gptq"
    allocation: str = ""  # how bits are chosen by layer; '' is sensitivity, where there is a budget
    stream: str = "sequential"
    embedding: str = ""  # '' is Q8_0, or F16 where the folder of compressed-tensors has to hold it
    calibration: str = "mixed"
    samples: int = 64
    probes: int = 8
    seq_len: int = 512
    seed: int = 0
    imatrix: bool = False  # whether what enters each weight will be written for llama.cpp

    def __post_init__(self) -> None:
        one_of("format", self.format, CONTAINERS)
        one_of("method", self.method, QUANTIZERS)
        one_of("allocation", self.allocation or "sensitivity", BITS_BY)
        one_of("stream", self.stream, OPERATOR_STREAMS)
        one_of("bits", self.bits or MIXED, (*BITS, *GRID_TYPES, MIXED))
        self._check_bits()
        if self.embedding:
            one_of("embedding", self.embedding, EMBEDDING_TYPES)
        if self.folder:
            if self.embedding == "Q8_0":
                raise SettingsError("--embedding Q8_0: compressed-tensors holds linear weights alone: leave it out")
            if not self.mixed and self.grid in WITH_MINIMUM:
                raise SettingsError(
                    f"--bits {self.bits}: compressed-tensors has whole numbers of a scale alone: use --bits 4, 5 or 8, "
                    "or --format gguf"
                )
            if find_spec("compressed_tensors") is None:
                raise BillhookError(f"--format {self.format} is read back by compressed-tensors: {EXTRA}")
        if self.imatrix and self.method != "gptq":
            raise SettingsError(
                f"--imatrix is summed while gptq reads calibration text: leave out --method {self.method}"
            )
        if min(self.samples, self.probes) < 1 or self.seq_len < 2:
            raise SettingsError("--samples and --probes are at least 1, and --seq-len at least 2")

    def _check_bits(self) -> None:
        if (self.bits == MIXED) != (self.memory is not None) and self.bits:
            raise SettingsError(
                "--bits mixed wants --memory, what all weights may take, and other bits want none: they say it themselves"
            )
        if self.grid in NOT_GGML and self.file:
            raise SettingsError(
                f"--bits {self.bits}: ggml has no type of three levels in blocks of 32: use --bits 2, or --format "
                "compressed-tensors"
            )
        if self.allocation and not self.mixed:
            raise SettingsError(
                "--allocation chooses bits by layer within a budget: give --memory too, or leave it out"
            )
        if self.allocation == "search" and find_spec("optuna") is None:
            raise BillhookError("--allocation search needs the extra: pip install 'billhook[search]'")
        if self.mixed and self.method == KEPT:
            raise SettingsError("--method kept is of weights on one type's levels: leave it out, or --memory")

    @property
    def mixed(self) -> bool:
        return self.memory is not None

    @property
    def grid(self) -> str:
        """The type of every weight, where they all have one."""
        if self.bits == "2" and self.file:
            return TERNARY
        return BITS.get(self.bits or "4", self.bits)

    @property
    def folder(self) -> bool:
        return self.format != "gguf"

    @property
    def file(self) -> bool:
        return self.format != "compressed-tensors"

    @property
    def tables(self) -> str:
        """The type of embedding and head."""
        return self.embedding or ("F16" if self.folder else "Q8_0")

    @property
    def reads(self) -> bool:
        """Whether it reads calibration text."""
        return self.method == "gptq" or self.mixed
