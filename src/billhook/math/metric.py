"""The points of OptiShear's space: which transformations a score has.  Loads no torch."""

from dataclasses import dataclass

from billhook.errors import SettingsError, one_of

FUNCTIONS = ("identity", "sqrt", "square", "exp", "log", "sigmoid", "softmax")
SCALES = ("none", "row", "column", "both", "sum", "mean", "frobenius")  # divisors: the sum of a row, of a column, …
ALIKE = {"row": "none", "sum": "none", "mean": "none", "frobenius": "none", "exp": "softmax"}  # same order within a row


@dataclass(frozen=True)
class Metric:
    """A point of the space; as it stands, Wanda's."""

    alpha: str = "none"
    f1: str = "identity"
    beta: str = "none"
    f2: str = "identity"

    def __str__(self) -> str:
        return ",".join((self.alpha, self.f1, self.beta, self.f2))

    @property
    def canonical(self) -> "Metric":
        """The representative of all points that order every row alike."""
        return Metric(*(ALIKE.get(name, name) for name in (self.alpha, self.f1, self.beta, self.f2)))


def parse(text: str) -> Metric:
    """`none,identity,none,sqrt`: alpha, F1, beta, F2.

    Raises:
        BillhookError: there are not four names, or one is unknown.
    """
    names = [name.strip() for name in text.split(",")]
    if len(names) != 4:
        raise SettingsError(f"--metric {text!r}: name alpha, F1, beta and F2, like {Metric()}, which is Wanda's")
    for name, valid in zip(names, (SCALES, FUNCTIONS) * 2, strict=True):
        one_of("part of a metric", name, valid)
    return Metric(*names)
