"""Rows leave where the caller says: any exit distribution, on any weights, at the real cost of deciding."""

from __future__ import annotations

from torch import Tensor

from engine.criteria.base import Criterion, ExitReading


class Scripted(Criterion):
    """Leave at the given layer. The policy is computed all the same, so that a timing includes it."""

    name = "scripted"
    needs_policy = True
    stateless = True

    def begin(self, threshold: Tensor, exit_layers: Tensor | None) -> dict[str, Tensor]:
        if exit_layers is None:
            raise ValueError("the scripted criterion needs exit_layers: one layer per row")
        return {"exit_layers": exit_layers}

    def decide(self, reading: ExitReading, state: dict[str, Tensor]) -> Tensor:
        return state["exit_layers"] <= reading.layer
