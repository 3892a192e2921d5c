"""The one timer of all benchmarks: warm-up, interleaved competitors, medians with p10 and p90."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Wall times of one competitor in seconds a call, in the order they were taken."""

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("a timing needs at least one measurement")

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def p10(self) -> float:
        return float(np.percentile(self.seconds, 10))

    @property
    def p90(self) -> float:
        return float(np.percentile(self.seconds, 90))

    def to_dict(self) -> dict[str, Any]:
        return {"median_s": self.median, "p10_s": self.p10, "p90_s": self.p90, "all_s": list(self.seconds)}


@dataclass(frozen=True)
class Measured(Generic[T]):
    """A timing, and what the last measured call returned."""

    timing: Timing
    result: T


def interleave(
    competitors: Mapping[str, Callable[[], T]],
    *,
    repeats: int = 3,
    warmup: int = 1,
    calls: int = 1,
    device: torch.device | str = "cpu",
    before: Callable[[], object] | None = None,
    after_each: Callable[[], object] | None = None,
) -> dict[str, Measured[T]]:
    """Time every competitor ``repeats`` times, all of them once a round.

    Every other round runs in reverse, so that a machine that slows down or speeds up favours nobody. Garbage collection
    is off while a clock runs; on CUDA the device is idle when it starts and when it stops.

    warmup      unmeasured rounds first
    calls       calls per measurement, for work too short for the clock; times are per call
    before      runs ahead of every measurement, outside the clock (e.g. flush a cache)
    after_each  runs behind every measurement and every warm-up, outside the clock (e.g. advance a progress bar)
    """
    for name, value, low in (("repeats", repeats, 1), ("warmup", warmup, 0), ("calls", calls, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
    synchronise = _synchroniser(torch.device(device))
    names = list(competitors)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    results: dict[str, T] = {}
    gc.collect()
    for number in range(-warmup, repeats):
        for name in names if number % 2 == 0 else reversed(names):
            if before is not None:
                before()
            elapsed, results[name] = _clocked(competitors[name], calls, synchronise)
            if number >= 0:
                seconds[name].append(elapsed / calls)
            if after_each is not None:
                after_each()
    return {name: Measured(Timing(tuple(seconds[name])), results[name]) for name in names}


def _clocked(call: Callable[[], T], calls: int, synchronise: Callable[[], object]) -> tuple[float, T]:
    collecting = gc.isenabled()
    gc.collect(1)  # young objects only: a full collection takes longer than most of what is timed
    gc.disable()
    try:
        synchronise()
        started = time.perf_counter()
        for _ in range(calls):
            result = call()
        synchronise()
        return time.perf_counter() - started, result
    finally:
        if collecting:
            gc.enable()


def _synchroniser(device: torch.device) -> Callable[[], object]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def format_seconds(*seconds: float) -> str:
    """One duration, or the range of two, in the unit that suits the last: 12.3 ms, 9.8 to 12.3 ms."""
    factor, unit = next(((f, u) for f, u in ((1.0, "s"), (1e3, "ms")) if seconds[-1] * f >= 1), (1e6, "us"))
    return " to ".join(f"{s * factor:.{2 if s * factor < 10 else 1}f}" for s in seconds) + f" {unit}"
