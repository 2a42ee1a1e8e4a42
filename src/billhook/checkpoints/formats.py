"""What `export` is asked for.  Loads no torch."""

from dataclasses import dataclass

from billhook.choices import FORMATS, QUANTIZE
from billhook.errors import SettingsError, one_of


@dataclass(frozen=True)
class Wanted:
    """What `export` is asked for.

    Raises:
        BillhookError: settings that cannot go together.
    """

    format: str = "gguf"
    quantize: str = ""  # type of a GGUF's matrices; '' is F16
    merge: bool = False  # whether shapes that no stock class has become stock ones first
    overwrite: bool = False

    def __post_init__(self) -> None:
        one_of("format", self.format, FORMATS)
        if self.quantize:
            one_of("quantize", self.quantize, QUANTIZE)
        if self.quantize and self.format != "gguf":
            raise SettingsError(f"--quantize {self.quantize} is a type of a GGUF: leave out --format {self.format}")
