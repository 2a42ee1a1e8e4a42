"""Settings of cuts that refit what stays."""

from collections.abc import Mapping
from typing import Any

from pydantic import field_validator

from billhook.choices import AXIS_STREAMS, GRADIENT_SCORES, SCORES
from billhook.cuts.settings import Narrowing
from billhook.planning.method import MethodSettings
from billhook.runtime import plug_ins
from billhook.runtime.options import option


def damping(default: float) -> Any:
    """A ridge."""
    return option(default, "ridge of least squares, as a share of the Gram's mean diagonal", gt=0, le=1)


def correction(default: float) -> Any:
    """A share of what the layers before have cost."""
    return option(default, "share of the error of the layers before that a refit makes up", ge=0, le=1)


def restoration(default: bool) -> Any:
    """Whether what stays is refitted."""
    return option(default, "refit the kept weights by least squares")


def stream(default: str, names: Mapping[str, str]) -> Any:
    """What a layer sees."""
    return option(default, "what a layer sees; empty: the method's own", names=names)


class ScoredSettings(MethodSettings):
    """By what units go, or by what they start to learn."""

    score: str = option(
        Narrowing.score,
        f"{', '.join(SCORES)}, or by gradients",
        names={**SCORES, **GRADIENT_SCORES, **dict.fromkeys(plug_ins.names("scores"), "of another package")},
        elsewhere=True,
    )

    @field_validator("score", mode="before")
    @classmethod
    def _own_score(cls, value: Any) -> Any:
        return plug_ins.path_of(value) if callable(value) else value

    @property
    def cut(self) -> Narrowing:
        """As a cut takes it that restores nothing; scores from gradients are measured before it."""
        score = Narrowing.score if self.score in GRADIENT_SCORES else self.score
        return Narrowing(score, restoration=False, stream="dense")


class NarrowingSettings(ScoredSettings):
    """What may be chosen of `billhook.cuts.narrowing`; why these defaults: docs/LOG.md."""

    stream: str = stream(Narrowing.stream, AXIS_STREAMS)
    damping: float = damping(Narrowing.damping)
    restoration: bool = restoration(Narrowing.restoration)
    correction: float = correction(Narrowing.correction)

    @property
    def cut(self) -> Narrowing:
        """As the cut takes them."""
        return Narrowing(super().cut.score, self.damping, self.restoration, self.correction, self.stream)
