"""Figures as files, drawn without a display (Agg)."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.bench.report import Point
from engine.loading import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")


def plot_accuracy_time(
    curves: Mapping[str, Sequence[Point]], path: str | Path, *, title: str, subtitle: str = ""
) -> Path:
    """Accuracy against wall time; a curve joins its points in their order, or is a star where it has one. Bars span p10
    to p90.

    Every point is one experiment: its accuracy was judged on the runs that were timed. All points of a figure must come
    from the same rows, because the axis is the time for all of them. Returns the path written.
    """
    path = Path(path)
    check_path(path)
    points = [point for curve in curves.values() for point in curve]
    if not points:
        raise ValueError("there are no points to draw")
    rows = {point.rows for point in points}
    if len(rows) > 1:
        raise ValueError(f"points of one figure must come from the same rows, got sets of {sorted(rows)}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, curve in curves.items():
        _draw_curve(axes, name, curve)
    repeats = {len(point.timing.seconds) for point in points}
    axes.set_xlabel(f"wall time for {rows.pop()} rows (s), median of {'/'.join(map(str, sorted(repeats)))} runs")
    axes.set_ylabel("accuracy (% of rows)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(curves), frameon=False)
    figure.suptitle(title)
    axes.set_title(subtitle, fontsize="small")
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write it whole or not at all, in the format of the name; returns the path."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=150)
    write_file(path, buffer.getvalue())
    return path


def check_path(path: str | Path) -> None:
    """ValueError or ImportError where no figure can be written under this name: ask before a long measurement."""
    if Path(path).suffix[1:].lower() not in FORMATS:
        raise ValueError(f"a figure's name must end in .{', .'.join(FORMATS)}, got {str(path)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("figures need matplotlib: pip install 'consistentee[bench]'")


def _draw_curve(axes, name: str, curve: Sequence[Point]) -> None:
    times = [p.timing.median for p in curve]
    spread = [[p.timing.median - p.timing.p10 for p in curve], [p.timing.p90 - p.timing.median for p in curve]]
    single = len(curve) == 1
    style = {"marker": "*", "markersize": 14, "linestyle": "none"} if single else {"marker": "o", "markersize": 4}
    bars = {"xerr": spread, "elinewidth": 0.8, "ecolor": "0.7", "capsize": 2}
    axes.errorbar(times, [100 * p.accuracy for p in curve], label=name, **bars, **style)
    for k, p in enumerate(curve):
        if p.threshold is not None:
            label, where = f"{p.threshold:g}", (p.timing.median, 100 * p.accuracy)
            offset = (4, (-10, 5)[k % 2])  # neighbours on different sides: they often stand close
            axes.annotate(label, where, xytext=offset, textcoords="offset points", fontsize="x-small")
