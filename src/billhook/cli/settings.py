"""Options of commands, made from the settings of recipes and methods.  Loads no torch."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from pydantic.fields import FieldInfo

from billhook.cli.options import BUDGET, CALIBRATION, LAYOUT, MACHINE, METHOD, OUTPUT, TRAINING, option
from billhook.methods import METHODS
from billhook.planning.method import Method
from billhook.planning.recipe import FLAT, PARTS
from billhook.runtime.options import extra

HEADINGS = {"budget": BUDGET, "shape": LAYOUT, "calibration": CALIBRATION, "compute": MACHINE}
SEVERAL, OF_ZEROS = "Several methods", "Methods that make zeros"
# headings in the order of help, after the arguments; "" are those of methods
ORDER = (None, BUDGET, METHOD, TRAINING, "", LAYOUT, CALIBRATION, OUTPUT, MACHINE)
FEW = 2  # methods that a heading names


@dataclass(frozen=True)
class Setting:
    """One setting as an option of the command line."""

    name: str  # in a flat recipe
    field: FieldInfo
    heading: str
    owners: tuple[Method, ...] = ()  # methods that have it; none: it is of every recipe

    @property
    def flags(self) -> tuple[str, ...]:
        """How it is written, `--no-` beside it for a switch."""
        flag = extra(self.field, "flag") or self.name.replace("_", "-")
        return (f"--{flag}", f"--no-{flag}") if bool in self.kinds else (f"--{flag}",)

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types of its values."""
        return self.field.annotation, *get_args(self.field.annotation)

    @property
    def names(self) -> Mapping[str, str] | Iterable[str]:
        """The values that the shell offers."""
        return extra(self.field, "completes") or extra(self.field, "names") or ()

    @property
    def repeated(self) -> bool:
        """Whether the option may be given several times: several texts."""
        return get_origin(self.field.annotation) is tuple and not extra(self.field, "names")

    @property
    def default(self) -> str:
        """What help says it is unless it is given: for each method, where methods differ."""
        said: dict[str, list[str]] = {}
        for owner in self.owners:
            said.setdefault(shown(owner.Settings.model_fields[self.name]), []).append(owner.name)
        if len(said) < 2:
            return shown(self.field)
        first, *others = sorted(said, key=lambda value: -len(said[value]))
        return "; ".join([first, *(f"{', '.join(said[value])} {value}" for value in others)])

    @property
    def words(self) -> str:
        """Its help: for each method, where methods differ in what they mean by it."""
        said: dict[str, list[str]] = {}
        for owner in self.owners:
            said.setdefault(str(owner.Settings.model_fields[self.name].description), []).append(owner.name)
        if len(said) < 2:
            return str(self.field.description)
        few = {words: f"{', '.join(names)}: " * (len(names) <= FEW) for words, names in said.items()}
        return "; ".join(f"{whose}{words}" for words, whose in few.items())

    def parameter(self) -> inspect.Parameter:
        """The parameter of a command's function that stands for it; None: not given."""
        read = [kind for kind in (float, int, bool) if kind in self.kinds]
        written = extra(self.field, "unit") or extra(self.field, "spelled") or get_origin(self.field.annotation) is dict
        kind = str if written or not read else read[0]
        typed = list[str] | None if self.repeated else kind | None
        said = option(
            self.heading,
            self.words,
            "/".join(self.flags),
            names=self.names,
            show_default=self.default or False,
        )
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[typed, said]
        )


def shown(field: FieldInfo) -> str:
    """A setting's default as help shows it, '' where there is none."""
    if (said := extra(field, "shown")) is not None:
        return said
    value = field.get_default()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value in (None, {}) else f"{value:g}" if isinstance(value, float) else str(value)


def shared() -> list[Setting]:
    """The settings of every recipe."""
    called: dict[str, str] = {inner: name for name, inner in FLAT.items()}
    return [
        Setting(called.get(name) or name, field, HEADINGS[part])
        for part, fields in PARTS.items()
        for name, field in fields.model_fields.items()
    ]


def of_methods(methods: Iterable[Method], searching: bool = True) -> list[Setting]:
    """The settings of methods, each once; those of a search only if asked for."""
    owners: dict[str, list[Method]] = {}
    for method in methods:
        for name, field in method.Settings.model_fields.items():
            if searching or not extra(field, "searching"):
                owners.setdefault(name, []).append(method)
    return [
        Setting(name, having[0].Settings.model_fields[name], heading(having), tuple(having))
        for name, having in owners.items()
    ]


def heading(owners: list[Method]) -> str:
    """The heading under which help lists a setting of some methods."""
    if len(owners) <= FEW:
        return f"--method {', '.join(method.name for method in owners)}"
    return OF_ZEROS if all(method.zeros for method in owners) else SEVERAL


def heading_of(field: FieldInfo, other: str) -> str:
    """The heading that a setting names, or else `other`."""
    return extra(field, "heading") or other


def with_settings(methods: Iterable[str] = (), searching: bool = True) -> Callable[..., Callable[..., None]]:
    """Give a command the options of recipes and of some methods, all if none is named."""
    return with_options([*shared(), *of_methods([METHODS[name] for name in methods or METHODS], searching)])


def with_options(every: Iterable[Setting]) -> Callable[..., Callable[..., None]]:
    """Give a command an option for every setting.

    The function is called with those that were given as its `settings`; its own parameters go before settings of the
    same name.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "settings"]
        made = [setting.parameter() for setting in every if setting.name not in {p.name for p in own}]
        names = {parameter.name for parameter in made}

        @functools.wraps(function)
        def command(**given: Any) -> None:
            settings = {name: value for name, value in given.items() if name in names and value not in (None, [])}
            function(**{name: value for name, value in given.items() if name not in names}, settings=settings)

        parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *made]
        parameters.sort(key=lambda parameter: _rank(parameter.annotation))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del command.__wrapped__  # type: ignore[attr-defined]
        return command

    return decorate


def _rank(annotation: Any) -> int:
    """The place of an option's heading in help; arguments come first."""
    heading = annotation.__metadata__[0].rich_help_panel
    return ORDER.index(heading if heading in ORDER else "")
