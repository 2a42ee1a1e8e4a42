"""What is compared: a method with settings, as one word of a command says it.  Loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from billhook.errors import BillhookError, one_of
from billhook.methods import METHODS
from billhook.pruning.recipe import Recipe, recipe


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
        key = one_of("setting", key.strip().replace("-", "_"), Recipe.model_fields)
        if not given or key in ("method", "ratio", "params", "memory", "speedup"):
            raise BillhookError(f"contender {text!r}: write method:setting=value,… without a budget; lists with +")
        settings[key] = (
            tuple(value.split("+")) if key in ("axes", "clients", "vocab_from", "validation") else value.strip()
        )
    return Contender(text.strip(), settings)


def settled(one: Contender, ratio: float, common: Mapping[str, Any]) -> Recipe:
    """The recipe of a contender at a ratio; its own settings go before the `common` ones.

    Raises:
        BillhookError: an impossible value; names the contender.
    """
    try:
        return recipe(**{**common, **one.settings, "ratio": ratio})
    except BillhookError as error:
        raise BillhookError(f"{one.name}: {error}") from None
