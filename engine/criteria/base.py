"""The protocol between executors and criteria.

A criterion owns per-row state, tensors whose first dimension is the row. The executor compacts them together with the
rows, so an entry always belongs to the row at the same place of the current batch. Depth limits are the executor's:
they hold for every criterion.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class ExitReading(NamedTuple):
    """What an exit offers to the decision about n rows; None where the criterion did not ask for it.

    layer          1 ... L
    first_tokens   [n, H] hidden state of each row's first token after this layer
    policy_logits  [n] fp32, z; sigmoid(z) is the exit probability
    class_logits   [n, C] fp32, of the internal classifier
    """

    layer: int
    first_tokens: Tensor
    policy_logits: Tensor | None
    class_logits: Tensor | None


@dataclass(frozen=True)
class Swept:
    """The value that trades accuracy for depth: its range, and which way is deeper."""

    low: float
    high: float
    higher_is_deeper: bool


class Criterion(ABC):
    """When a row leaves.

    needs_policy, needs_classifier  what the executor must compute at every exit before ``decide``
    stateless                       what ``decide`` says depends on nothing it saw at earlier exits, and it writes
                                    nothing into its state: exits where no row may leave yet are then skipped, and one
                                    ``begin`` serves many runs. With state, every exit is read
    swept                           range and direction of ``threshold``; None where there is nothing to sweep
    policy_threshold                name of a state entry, fp32 [n]: ``decide`` says policy_logits > that entry, at
                                    every layer, and changes nothing. Executors may then compare for themselves
    """

    name: str
    needs_policy: bool = False
    needs_classifier: bool = False
    stateless: bool = False
    swept: Swept | None = None
    policy_threshold: str | None = None

    def may_decide(self, layer: int) -> bool:
        """Whether rows may leave at ``layer`` at all; where not, the exit is not even read."""
        return True

    @abstractmethod
    def begin(self, threshold: Tensor, exit_layers: Tensor | None) -> dict[str, Tensor]:
        """Fresh per-row state. threshold [n] fp32, as the caller gave it; exit_layers [n] int32 for ``scripted``."""

    @abstractmethod
    def decide(self, reading: ExitReading, state: dict[str, Tensor]) -> Tensor:
        """bool [n], true where the row leaves now. Runs on the rows' device and reads nothing back."""


def first_outside(values: Tensor, low: float, high: float) -> int | None:
    """Place of the first of these [n] that is not in low ... high, as no NaN is; None where all are. On the host."""
    found = values.numpy()  # of few of them numpy knows sooner
    if len(found) == 0 or (low <= found.min() and found.max() <= high):
        return None
    return next(i for i, value in enumerate(found) if not low <= value <= high)


def check_threshold(criterion: Criterion, threshold: Tensor) -> None:
    """ValueError where a threshold lies outside the criterion's range. threshold [n], on the host."""
    if criterion.swept is None:
        return
    low, high = criterion.swept.low, criterion.swept.high
    row = first_outside(threshold, low, high)
    if row is not None:
        raise ValueError(
            f"threshold must lie in [{low:g}, {high:g}] for the {criterion.name} criterion, got "
            f"{float(threshold[row]):g} (row {row})"
        )


BUILT_IN: dict[str, Criterion] = {}  # filled where the package is imported


def make_criterion(name: str | Criterion) -> Criterion:
    """A criterion by name (one shared object: all state is per row and per run), or the one given."""
    if isinstance(name, str):  # asked first: whether something is an instance of an abstract class takes longer
        if name in BUILT_IN:
            return BUILT_IN[name]
    elif isinstance(name, Criterion):
        return name
    raise ValueError(f"criterion must be one of {', '.join(BUILT_IN)} or a Criterion, got {name!r}")
