"""How rows may leave in one call: from the caller's keywords to checked per-row values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.config import EarlyExitConfig
from engine.criteria import Criterion
from engine.criteria.base import check_threshold
from engine.executors import ExitOptions

_SCALARS = (int, float, type(None))
_REMEMBERED = 256


class OptionsReader:
    """Reads threshold, min_depth, max_depth and exit_layers for one model; ValueError or TypeError names what is wrong."""

    def __init__(self, config: EarlyExitConfig):
        self.config = config
        self._remembered: dict[tuple, ExitOptions] = {}

    def options(
        self, n: int, criterion: Criterion, threshold: Any, min_depth: Any, max_depth: Any, exit_layers: Any
    ) -> ExitOptions:
        """Options of ``n`` rows. The same plain values for the same number of rows give the same (read-only) record."""
        values = (threshold, min_depth, max_depth)
        if exit_layers is not None or not all(isinstance(value, _SCALARS) for value in values):
            return self._read(n, criterion, threshold, min_depth, max_depth, exit_layers)
        key = (n, criterion, *values, *map(type, values))  # types: 1, 1.0 and True are equal, not equally allowed
        if key not in self._remembered:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = self._read(n, criterion, threshold, min_depth, max_depth, exit_layers)
        return self._remembered[key]

    def _read(self, n: int, criterion: Criterion, threshold, min_depth, max_depth, exit_layers) -> ExitOptions:
        num_layers, exits = self.config.num_layers, self.config.exit_layers
        thresholds = _per_row("threshold", self.config.threshold if threshold is None else threshold, n, torch.float32)
        check_threshold(criterion, thresholds)
        least = _per_row("min_depth", 1 if min_depth is None else min_depth, n, torch.int32)
        most = _per_row("max_depth", num_layers if max_depth is None else max_depth, n, torch.int32)
        script = None
        if min_depth is not None:
            _check_layers("min_depth", least, 1, num_layers)
        if max_depth is not None:
            _check_layers("max_depth", most, exits[0], num_layers, ", where the first exit stands,")
            # Rows leave through exits: the deepest one that is not beyond the limit.
            places = torch.tensor(exits, dtype=torch.int32)
            most = places[torch.searchsorted(places, most, right=True) - 1]
        if min_depth is not None and max_depth is not None and bool((least > most).any()):
            row = int(torch.nonzero(least > most)[0])
            raise ValueError(
                f"row {row} may not leave before layer {int(least[row])} (min_depth) but must have left by "
                f"{int(most[row])} (the deepest exit within max_depth): exits stand at {list(exits)}"
            )
        if exit_layers is not None:
            if criterion.name != "scripted":
                raise ValueError(f"exit_layers is for the scripted criterion, got criterion {criterion.name!r}")
            script = _per_row("exit_layers", exit_layers, n, torch.int32)
            known = torch.isin(script, torch.tensor(exits, dtype=torch.int32))
            if not bool(known.all()):
                row = int(torch.nonzero(~known)[0])
                raise ValueError(f"exit_layers[{row}] is {int(script[row])}, exits stand at {list(exits)}")
        elif criterion.name == "scripted":
            raise ValueError("the scripted criterion needs exit_layers: one layer, or one per row")
        return ExitOptions(
            criterion=criterion,
            threshold=thresholds,
            min_depth=least,
            max_depth=most,
            exit_layers=script,
            shallowest=1 if min_depth is None or n == 0 else int(least.min()),
            deepest=num_layers if max_depth is None or n == 0 else int(most.max()),
            uniform=_uniform(min_depth) and _uniform(max_depth),
            leave_rates=self._leave_rates(criterion, thresholds, script),
        )

    def _leave_rates(self, criterion: Criterion, thresholds: Tensor, script: Tensor | None) -> dict[int, float]:
        if script is not None:
            return scripted_leave_rates(script, self.config.exit_layers)
        threshold = self.config.threshold if not len(thresholds) else float(thresholds.median())
        return self.config.expected_leave_rates(threshold)


def scripted_leave_rates(script: Tensor, exit_layers: tuple[int, ...]) -> dict[int, float]:
    """{layer: share of the rows reaching it that leave there} of a script, exactly."""
    left = script.tolist()
    rates = {}
    for layer in exit_layers[:-1]:
        reach = sum(x >= layer for x in left)
        rates[layer] = sum(x == layer for x in left) / reach if reach else 0.0
    return rates


def _uniform(value: Any) -> bool:
    return value is None or isinstance(value, int)


def _per_row(name: str, value: Any, n: int, dtype: torch.dtype) -> Tensor:
    """One value or one per row -> [n] on the host."""
    number = (int, float) if dtype.is_floating_point else int
    if isinstance(value, number) and not isinstance(value, bool):
        return torch.full((n,), value, dtype=dtype)
    if isinstance(value, (str, bytes)) or not isinstance(value, (Iterable, Tensor)):
        kind = "a number" if dtype.is_floating_point else "an integer"
        raise TypeError(f"{name} must be {kind}, or one per row, got {type(value).__name__}: {value!r}")
    try:
        tensor = torch.as_tensor(value if isinstance(value, Tensor) else list(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must hold one number per row: {error}") from error
    if tensor.dim() == 0:
        tensor = tensor.expand(n)
    if tuple(tensor.shape) != (n,):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, the batch has {n} rows: give one value, or {n}")
    if not dtype.is_floating_point and n and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
    return tensor.detach().to("cpu", dtype)


def _check_layers(name: str, layers: Tensor, low: int, high: int, why_low: str = "") -> None:
    bad = (layers < low) | (layers > high)
    if bool(bad.any()):
        row = int(torch.nonzero(bad)[0])
        raise ValueError(f"{name} must lie between {low}{why_low} and {high}, got {int(layers[row])} (row {row})")


def select_rows(options: ExitOptions, indices: list[int]) -> ExitOptions:
    """The options of some of the rows."""
    index = torch.tensor(indices)
    least, most = options.min_depth[index], options.max_depth[index]
    return replace(
        options,
        threshold=options.threshold[index],
        min_depth=least,
        max_depth=most,
        exit_layers=None if options.exit_layers is None else options.exit_layers[index],
        shallowest=int(least.min()),
        deepest=int(most.max()),
    )


def move_options(options: ExitOptions, device: torch.device) -> ExitOptions:
    script = options.exit_layers
    return replace(
        options,
        threshold=options.threshold.to(device),
        min_depth=options.min_depth.to(device),
        max_depth=options.max_depth.to(device),
        exit_layers=None if script is None else script.to(device),
    )
