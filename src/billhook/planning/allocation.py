"""How the budget is spread over the layers, as the user says it: `--allocation`.  Loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.choices import ALLOCATIONS
from billhook.errors import SettingsError, one_of

NEED_CURVES = ("global", "standardised", "sensitivity")


@dataclass(frozen=True)
class Allocation:
    """A parsed `--allocation`."""

    name: str  # a name in ALLOCATIONS; `skip` and `file` stand alone
    spared: tuple[int, int] = (0, 0)
    keep: Mapping[int, Mapping[str, int]] | None = None  # what a file says: layer -> kind -> units to keep

    @property
    def uneven(self) -> bool:
        """Whether layers come out different."""
        return self.name != "equal"


def parse(text: str) -> Allocation:
    """`equal`, `global`, `sensitivity`, `skip:4,2` or the path of a file.

    Raises:
        BillhookError: it is none of these, or the file cannot be read.
    """
    if text == "auto":
        raise SettingsError("allocation auto is a method of its own: leave it out, and use --method auto")
    name, _, rest = text.partition(":")
    if name == "skip":
        try:
            first, last = (int(n) for n in rest.split(","))
            if min(first, last) < 0:
                raise ValueError
        except ValueError:
            raise SettingsError(
                f"allocation {text!r}: write skip:4,2 to spare the first four and last two layers"
            ) from None
        return Allocation("skip", (first, last))
    if Path(text).suffix in (".yaml", ".yml", ".json"):
        return Allocation("file", keep=_read(Path(text)))
    one_of(
        "allocation", text, [one for one in ALLOCATIONS if one.islower() and ":" not in one] + ["skip:4,2", "FILE.yaml"]
    )
    return Allocation(text)


def _read(path: Path) -> dict[int, dict[str, int]]:
    from billhook.runtime.yaml_files import read_yaml

    content = read_yaml(path, f"allocation file {path}")
    try:
        return {
            int(layer): {str(kind): _count(units) for kind, units in said.items()} for layer, said in content.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise SettingsError(
            f"allocation file {path}: write it as {{0: {{ffn: 1536}}, 1: {{ffn: 960}}, …}} ({error})"
        ) from None


def _count(units: Any) -> int:
    if isinstance(units, bool) or not isinstance(units, int):
        raise ValueError(f"{units!r} is no number of units")
    return units
