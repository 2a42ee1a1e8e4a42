"""How a setting is declared: once, with its default, its help, its names and its limits.  Loads no torch.

A recipe validates by it, the command line is generated from it, and `billhook methods NAME` lists it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, get_origin

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

from billhook.errors import one_of
from billhook.runtime.units import BYTES, COUNT, amount


def option(
    default: Any,
    text: str,
    *,
    names: Mapping[str, str] | Iterable[str] = (),
    shown: str | None = None,
    **more: Any,
) -> Any:
    """A setting.

    Args:
        text: one line of help.
        names: the values that it takes, with what they mean; none: any of its type.
        shown: what help says of its default, where that is not the default itself.
        more: limits (gt, le, …); and for the command line `flag`, other than the setting's own name; `completes`, what
            the shell offers where `names` would be too narrow; `budget`, whether it says how much goes; `searching`,
            whether `billhook search` has it, not `billhook prune`; `unit`, count or bytes, where 100M or 250MB is
            understood; `spelled`, whether it may be a word as well as a number; `elsewhere`, whether it may be a
            `module:function` besides its names; `heading`, under which help lists it.
    """
    own = ("flag", "budget", "completes", "searching", "unit", "spelled", "heading", "elsewhere")
    extra = {"names": names, "shown": shown, **{name: more.pop(name, None) for name in own}}
    return Field(default, description=text, json_schema_extra=extra, **more)


class Part(BaseModel):
    """Some settings of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: Any) -> Any:
        """Texts as people write them: `ffn,heads`, `100M`; nothing is the default."""
        field = cls.model_fields[str(info.field_name)]
        unit = extra(field, "unit")
        if value is None or (value == "" and extra(field, "names")):
            return field.get_default()
        if isinstance(value, str) and get_origin(field.annotation) is tuple:
            return tuple(value.replace(",", " ").split()) if extra(field, "names") else (value,)
        if unit:
            return amount(value, {"count": COUNT, "bytes": BYTES}[unit], str(info.field_name).replace("_", "-"))
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _known(cls, value: Any, info: Any) -> Any:
        """One of its names, where a setting has names; each once, where it has several."""
        name = str(info.field_name)
        valid = extra(cls.model_fields[name], "names")
        if not valid:
            return value
        if isinstance(value, tuple):
            one = {"axes": "axis"}.get(name, name.removesuffix("s"))
            return tuple(one_of(one, each, valid) for each in dict.fromkeys(value))
        if not value or (":" in value and extra(cls.model_fields[name], "elsewhere")):
            return value
        return one_of(name, value, valid)


def extra(field: FieldInfo, name: str) -> Any:
    """What `option` was told of a setting besides its default and its limits."""
    said = field.json_schema_extra
    return said.get(name) if isinstance(said, dict) else None
