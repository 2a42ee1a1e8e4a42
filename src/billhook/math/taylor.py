"""Importance of units by a Taylor expansion of the loss, from sums of weight times gradient.

S = w * dL/dw for every entry of a slot, L the mean loss of one window n, and A_n = sum of S over the entries of a unit:
minus the first-order change of L when the slot loses the unit.  With the empirical Fisher for the Hessian,
H ~ sum_n g_n g_n^T, the second-order change is 1/2 A_n^2 for the unit as a whole and 1/2 S^2 for a single entry.  All
sums run over the windows: scores compare only if they come from the same windows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from billhook.errors import BillhookError
from billhook.tensors import Scores


@dataclass
class UnitSums:
    """Sums over the windows for each unit of an axis, from one slot, float64."""

    signed: Scores  # sum_n A_n
    absolute: Scores  # sum_n |A_n|
    squared: Scores  # sum_n A_n^2
    element_absolute: Scores  # sum_n sum |S|
    element_squared: Scores  # sum_n sum S^2
    mean_absolute: Scores | None = None  # sum |w * sum_n g_n|, if it was asked for


@dataclass(frozen=True)
class GradientSums:
    """The sums of one axis: of its writers, by parameter (weights and biases separately), and of its reader."""

    windows: int
    writers: Mapping[str, UnitSums]
    reader: UnitSums

    @property
    def slots(self) -> tuple[UnitSums, ...]:
        return (*self.writers.values(), self.reader)

    def reader_only(self) -> "GradientSums":
        """The sums without the writers', for a score of the reader alone."""
        return replace(self, writers={})


def taylor1_vector(sums: GradientSums) -> Scores:
    """s_u = sum over slots of |sum_n A_n|: LLM-Pruner's vector-wise first order (arXiv:2305.11627), |w . dL/dw|.

    The modulus is taken over the whole unit; LLM-Pruner takes it row by row, which is the same if a unit has one row.
    In a converged model sum_n A_n is near 0 whatever the unit is worth.  In units of the loss: compares across layers
    for one kind of axis, across kinds only with `reader_only` (slots repeat each other: up and down agree).
    """
    return torch.stack([slot.signed.abs() for slot in sums.slots]).sum(0)


def taylor1_element(sums: GradientSums) -> Scores:
    """s_u = sum over entries of |w * sum_n g_n|: LLM-Pruner's element-wise first order (arXiv:2305.11627), "Element1".

    An upper bound of the loss change that grows with the entries of a unit: compares across layers of equal shapes, not
    across kinds of axes.

    Raises:
        BillhookError: the sums were gathered without the mean gradient.
    """
    sums_of_slots = [slot.mean_absolute for slot in sums.slots if slot.mean_absolute is not None]
    if len(sums_of_slots) < len(sums.slots):
        raise BillhookError(
            "taylor1_element needs the gradient summed over the windows: gather with mean_gradient=True"
        )
    return torch.stack(sums_of_slots).sum(0)


def taylor1_window(sums: GradientSums) -> Scores:
    """s_u = sum_n sum over entries of |w * g_n|:
    an upper bound of taylor1_element that keeps no gradient between windows.

    Compares as taylor1_element does.
    """
    return torch.stack([slot.element_absolute for slot in sums.slots]).sum(0)


def taylor2_element(sums: GradientSums) -> Scores:
    """s_u = sum_n sum over entries of (w * g_n)^2: second order with a diagonal Fisher, LLM-Pruner's (arXiv:2305.11627)
    "Element2", w^2 H_ww without the 1/2.

    In units of the loss as far as the diagonal approximation holds.  Entries of one unit are far from independent, so
    it says less about large units: compares across layers of equal shapes, not across kinds of axes.
    """
    return torch.stack([slot.element_squared for slot in sums.slots]).sum(0)


def taylor2_vector(sums: GradientSums) -> Scores:
    """s_u = sum over slots of sum_n A_n^2: the squared contribution (sum g w)^2 of Molchanov et al. (arXiv:1906.10771).

    Compares across layers for one kind of axis; across kinds use `gate_fisher`, its reader's part.
    """
    return torch.stack([slot.squared for slot in sums.slots]).sum(0)


def gate_fisher(sums: GradientSums) -> Scores:
    """s_u = sum_n (dL_n/dm_u)^2 at m = 1, m_u a gate on the unit: the mask Fisher of Kwon et al. (arXiv:2204.09656).

    The reader is linear in a unit, so dL/dm_u = A of the reader, exactly.  The score is twice the loss change of
    closing one gate: compares across layers and kinds.
    """
    return sums.reader.squared


def gate_sensitivity(sums: GradientSums) -> Scores:
    """s_u = sum_n |dL_n/dm_u| at m = 1: the expected sensitivity to a head mask of Michel et al. (arXiv:1905.10650).

    First order in the gate.  In units of the loss: compares across layers and kinds; the paper still divides by the l2
    norm of each layer's scores.
    """
    return sums.reader.absolute


FROM_GRADIENTS: dict[str, Callable[[GradientSums], Scores]] = {
    "taylor1_vector": taylor1_vector,
    "taylor1_element": taylor1_element,
    "taylor1_window": taylor1_window,
    "taylor2_element": taylor2_element,
    "taylor2_vector": taylor2_vector,
    "gate_fisher": gate_fisher,
    "gate_sensitivity": gate_sensitivity,
}
NEED_MEAN_GRADIENT = frozenset(
    {"taylor1_element"}
)  # scores that need a second copy of the weights while sums are gathered
