"""Pydantic's validation errors, in one line."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from billhook.errors import BillhookError, SettingsError, one_of

Settled = TypeVar("Settled", bound=BaseModel)


def checked(model: type[Settled], settings: Mapping[str, Any]) -> Settled:
    """Validate `settings` as a `model`.

    Raises:
        BillhookError: an unknown setting or an impossible value; names the first one.
    """
    for name in settings:
        one_of("setting", name, model.model_fields)
    try:
        return model(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        if "ctx" in first and isinstance(inner := first["ctx"].get("error"), BillhookError):
            raise inner from None
        name = ".".join(map(str, first["loc"])).replace("_", "-")
        value = "" if first["type"] == "missing" else f" {first['input']!r}"
        raise SettingsError(f"{name}{value}: {first['msg'].lower().replace('tuple', 'list')}") from None
