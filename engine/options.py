"""How rows may leave in one call: from the caller's keywords to checked per-row values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import EarlyExitConfig
from engine.criteria import Criterion
from engine.criteria.base import check_threshold, first_outside
from engine.executors import ExitOptions

_SCALARS = (int, float, type(None))
_REMEMBERED = 256


class OptionsReader:
    """Reads threshold, min_depth, max_depth and exit_layers; ValueError or TypeError names what is wrong."""

    def __init__(self) -> None:
        # With the config and the criterion that an entry was made for: while they are held, their ids stay theirs.
        self._remembered: dict[tuple, tuple[EarlyExitConfig, ExitOptions]] = {}

    def options(
        self,
        config: EarlyExitConfig,
        n: int,
        criterion: Criterion,
        threshold: Any,
        min_depth: Any,
        max_depth: Any,
        exit_layers: Any,
    ) -> ExitOptions:
        """Options of ``n`` rows. The same plain values for the same number of rows give the same (read-only) record."""
        values = (threshold, min_depth, max_depth)
        if exit_layers is not None or not all(isinstance(value, _SCALARS) for value in values):
            return _read(config, n, criterion, threshold, min_depth, max_depth, exit_layers)
        # With types, because 1, 1.0 and True are equal and not equally allowed.
        key = (id(config), id(criterion), n, *values, *map(type, values))
        found = self._remembered.get(key)
        if found is None:
            found = config, _read(config, n, criterion, threshold, min_depth, max_depth, exit_layers)
            if len(self._remembered) >= _REMEMBERED:
                self._remembered = {}
            self._remembered[key] = found
        return found[1]


def _read(
    config: EarlyExitConfig, n: int, criterion: Criterion, threshold, min_depth, max_depth, exit_layers
) -> ExitOptions:
    num_layers, exits = config.num_layers, config.exit_layers
    thresholds = per_row("threshold", config.threshold if threshold is None else threshold, n, torch.float32)
    check_threshold(criterion, thresholds)
    least, most = depth_limits(num_layers, exits, n, min_depth, max_depth)
    script = None
    if exit_layers is not None:
        if criterion.name != "scripted":
            raise ValueError(f"exit_layers is for the scripted criterion, got criterion {criterion.name!r}")
        script = per_row("exit_layers", exit_layers, n, torch.int64)
        layers, known = script.tolist(), set(exits)  # torch.isin takes longer up to a thousand rows
        if not known.issuperset(layers):
            row = next(i for i, layer in enumerate(layers) if layer not in known)
            raise ValueError(f"exit_layers[{row}] is {layers[row]}, exits stand at {list(exits)}")
    elif criterion.name == "scripted":
        raise ValueError("the scripted criterion needs exit_layers: one layer, or one per row")
    return ExitOptions(
        criterion=criterion,
        threshold=thresholds,
        min_depth=least.int(),
        max_depth=most.int(),
        exit_layers=None if script is None else script.int(),
        shallowest=1 if min_depth is None or n == 0 else int(least.min()),
        deepest=num_layers if max_depth is None or n == 0 else int(most.max()),
        uniform=_uniform(min_depth) and _uniform(max_depth),
        exits=exits[:-1],
        expect=partial(_leave_rates, config, thresholds, script),
    )


def depth_limits(
    num_layers: int, exits: tuple[int, ...], n: int, min_depth: Any, max_depth: Any
) -> tuple[Tensor, Tensor]:
    """min_depth and max_depth of each row, int64 [n]; the latter as the deepest exit that is not beyond it."""
    least = per_row("min_depth", 1 if min_depth is None else min_depth, n, torch.int64)
    most = per_row("max_depth", num_layers if max_depth is None else max_depth, n, torch.int64)
    if min_depth is not None:
        _check_layers("min_depth", least, 1, num_layers)
    if max_depth is not None:
        _check_layers("max_depth", most, exits[0], num_layers, ", where the first exit stands,")
        # Rows leave through exits: the deepest one that is not beyond the limit.
        places = torch.tensor(exits)
        most = places[torch.searchsorted(places, most.contiguous(), right=True) - 1]
    if min_depth is not None and max_depth is not None and bool((least > most).any()):
        row = int(torch.nonzero(least > most)[0])
        raise ValueError(
            f"row {row} may not leave before layer {int(least[row])} (min_depth) but must have left by "
            f"{int(most[row])} (the deepest exit within max_depth): exits stand at {list(exits)}"
        )
    return least, most


def _leave_rates(config: EarlyExitConfig, thresholds: Tensor, script: Tensor | None) -> dict[int, float]:
    if script is not None:
        return scripted_leave_rates(script, config.exit_layers)
    return config.expected_leave_rates(float(thresholds.median()) if len(thresholds) else config.threshold)


def scripted_leave_rates(script: Tensor, exit_layers: tuple[int, ...]) -> dict[int, float]:
    """{layer: share of the rows reaching it that leave there} of a script, exactly."""
    leaving = torch.bincount(script, minlength=exit_layers[-1] + 1).tolist()
    reach = len(script)
    rates = {}
    for layer in exit_layers[:-1]:
        rates[layer] = leaving[layer] / reach if reach else 0.0
        reach -= leaving[layer]
    return rates


def _uniform(value: Any) -> bool:
    return value is None or isinstance(value, int)


def per_row(name: str, value: Any, n: int, dtype: torch.dtype) -> Tensor:
    """One value or one per row -> [n] on the host."""
    # Most often it is a number or a list of numbers; else the long way, which takes four times as long.
    kinds = {int, float} if dtype.is_floating_point else {int}
    if type(value) in kinds and abs(value) < 1 << 31:
        return torch.full((n,), value, dtype=dtype)
    if type(value) is list and len(value) == n > 0 and kinds.issuperset(map(type, value)):
        with suppress(OverflowError):  # which the long way names
            return torch.from_numpy(np.array(value, np.float64 if dtype.is_floating_point else np.int64)).to(dtype)
    kind = "a number" if dtype.is_floating_point else "an integer"
    if isinstance(value, (str, bytes, Mapping)):
        raise TypeError(f"{name} must be {kind}, or one per row, got {type(value).__name__}: {value!r}")
    try:
        tensor = torch.as_tensor(list(value) if isinstance(value, Iterable) and not hasattr(value, "shape") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must be {kind}, or one per row, got {type(value).__name__}: {error}") from None
    if tensor.dtype == torch.bool or tensor.is_complex() or (tensor.is_floating_point() > dtype.is_floating_point):
        if tensor.numel():
            raise TypeError(f"{name} must be {kind}, or one per row, got {tensor.dtype}: {value!r}")
    if tensor.dim() == 0:
        tensor = tensor.expand(n)
    if tuple(tensor.shape) != (n,):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, the batch has {n} rows: give one value, or {n}")
    return tensor.detach().to("cpu", dtype)


def _check_layers(name: str, layers: Tensor, low: int, high: int, why_low: str = "") -> None:
    row = first_outside(layers, low, high)
    if row is not None:
        raise ValueError(f"{name} must lie between {low}{why_low} and {high}, got {int(layers[row])} (row {row})")


def select_rows(options: ExitOptions, rows: slice | Tensor) -> ExitOptions:
    """The options of some of the rows: a slice, or their indices."""
    least, most = options.min_depth[rows], options.max_depth[rows]
    return replace(
        options,
        threshold=options.threshold[rows],
        min_depth=least,
        max_depth=most,
        exit_layers=None if options.exit_layers is None else options.exit_layers[rows],
        shallowest=int(least.min()),
        deepest=int(most.max()),
    )
