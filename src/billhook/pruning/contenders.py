"""What is compared: a method with settings, as one word of a command says it.  Loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from billhook.errors import BillhookError, SettingsError, one_of
from billhook.methods import METHODS
from billhook.planning.recipe import SIZES, Recipe
from billhook.pruning.recipe import OF_PARTS, own_setting, recipe


@dataclass(frozen=True)
class Contender:
    """A method with what the user set of it; `name` is what was written."""

    name: str
    settings: Mapping[str, Any]

    @property
    def method(self) -> str:
        return self.settings["method"]


def contender(text: str) -> Contender:
    """`fasp`, or `fasp:score=wanda,stream=dense`: any setting of a recipe, as its flag or YAML key says it.

    Raises:
        BillhookError: there is no such method or setting.
    """
    name, _, rest = text.strip().partition(":")
    settings: dict[str, Any] = {"method": one_of("method", name, METHODS)}
    for part in filter(None, (one.strip() for one in rest.split(","))):
        key, given, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if not given or key in ("method", *SIZES):
            raise SettingsError(f"contender {text!r}: write method:setting=value,… without a budget; lists with +")
        key = key if key in OF_PARTS else own_setting(METHODS[settings["method"]], key)
        settings[key] = value.strip() if key == "calibration" else _listed(value.strip())
    return Contender(text.strip(), settings)


def _listed(value: str) -> Any:
    """Several values stand with +."""
    return tuple(value.split("+")) if "+" in value else value


def settled(one: Contender, ratio: float, common: Mapping[str, Any]) -> Recipe:
    """The recipe of a contender at a ratio;
    its own settings go before the `common` ones, of which it takes those it has.

    Raises:
        BillhookError: an impossible value; names the contender.
    """
    try:
        shared = {
            name: value
            for name, value in common.items()
            if name in OF_PARTS or name in METHODS[one.method].Settings.model_fields
        }
        return recipe(**{"look": False, **shared, **one.settings, "ratio": ratio})  # a comparison judges by itself
    except BillhookError as error:
        raise SettingsError(f"{one.name}: {error}") from None
