"""What the rows of ``encoder_h100`` say: its figures, several runs in one, a table, a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.bench import encoder_competitors as peers
from engine.bench import record
from engine.bench.plots import check_path, save_figure
from engine.bench.record import figure
from engine.console import show_table

OURS = "ours"
MODEL = "bert-base"
MIXES = ("sst2", "stackoverflow", "rte")
_KEY = ("part", "model", "mix", "batch", "competitor", "setting")
Rows = Sequence[Mapping[str, Any]]


def _rows(rows: Rows, **wanted: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _one(rows: Rows, **wanted: Any) -> Mapping[str, Any]:
    """The row, or an empty one where it is absent or has no times."""
    found = [row for row in _rows(rows, **wanted) if not {"error", "left_out"} & set(row)]
    return found[-1] if found else {}


def _against(rows: Rows, names: Iterable[str], **wanted: Any) -> dict[str, Any]:
    """The least time over ours among competitors, by both clocks; None where one of them was not tried, or failed.

    Who cannot serve (left out) is not the best, and is named with the reason.
    """
    times, left_out, failed, missing = {}, {}, {}, []
    for name in names:
        found = _rows(rows, competitor=name, setting="full depth", **wanted)
        measured = _one(found)
        if "over_ours" in measured:
            times[name] = measured["over_ours"]
        elif found and not measured:
            reason, into = ("error", failed) if "error" in found[-1] else ("left_out", left_out)
            into[name] = found[-1][reason]
        else:
            missing.append(name)
    kinds = ("missing", missing), ("failed", failed), ("left_out", left_out)
    more: dict[str, Any] = {name: value for name, value in kinds if value}
    if missing or failed or not times:
        return {"value": None, **more}
    best = min(times, key=lambda name: times[name]["device"])
    host = min(times, key=lambda name: times[name]["host"])
    return {
        "value": times[best]["device"],
        "best": best,
        "host_to_host": times[host]["host"],
        "best_host_to_host": host,
        **more,
    }


def _bar(
    name: str, value: float | None, unit: str, bar: str, also: float | None = None, **more: Any
) -> dict[str, Any]:
    """A figure whose bar is ">= 1.3", "<= 5 s" or "0". also: what must meet the bar beside the value."""
    sign, _, limit = bar.rpartition("= ")
    limit = float(limit.split()[0])

    def meets(x: float) -> bool:
        return {">": x >= limit, "<": x <= limit, "": x == limit}[sign]

    met = value is not None and meets(value) and (also is None or meets(also))
    return figure(name, value, unit, bar, met, **more)


def figures(rows: Rows, model: str = MODEL) -> list[dict[str, Any]]:
    """All figures, from rows of one run or several. Ratios are those of one run, in which both sides took turns."""
    return [*_full(rows, model), *_mixes(rows, model), *_exits(rows, model), *_other(rows, model)]


def _full(rows: Rows, model: str) -> list[dict[str, Any]]:
    found = []
    for batch, bar in ((1, ">= 1.7"), (8, ">= 1.3"), (32, ">= 1.3"), (128, ">= 1.25")):
        more = _against(rows, peers.FULL_DEPTH, part="full", model=model, batch=batch)
        if batch == 128:
            more["batch_512"] = _against(rows, peers.FULL_DEPTH, part="full", model=model, batch=512)
        name = f"full depth vs best competitor, batch {batch}"
        # The bar of a single row is one of the device alone; the others' hold from host to host, too.
        also = None if batch == 1 else more.get("host_to_host")
        found.append(_bar(name, more.pop("value"), "ratio of times", bar, also, **more))
    return found


def _mixes(rows: Rows, model: str) -> list[dict[str, Any]]:
    found = []
    for name, names, bar in (
        ("real mix vs best padded", peers.PADDED, ">= 2"),
        ("real mix vs compiled packed", (peers.PACKED,), ">= 1.1"),
    ):
        mixes = {
            mix: _against(rows, names, part="mixes", model=model, mix=mix) for mix in MIXES
        }
        values = [against["value"] for against in mixes.values()]
        worst = None if None in values else min(values)
        also = None if worst is None else min(against["host_to_host"] for against in mixes.values())
        found.append(_bar(name, worst, "ratio of times", bar, also, host_to_host=also, mixes=mixes))
    return found


def _exits(rows: Rows, model: str) -> list[dict[str, Any]]:
    def of(batch: int, ratio: str) -> dict[str, Any]:
        row = _one(rows, part="exits", model=model, batch=batch, competitor=OURS)
        value = row.get(ratio, {})
        more = {"mean_depth": row["mean_depth"]} if row and ratio == "realised" else {}
        if more and "decided_realised" in row:
            decided = {"value": "device", "host_to_host": "host"}
            more["policies_decide"] = {name: row["decided_realised"].get(clock) for name, clock in decided.items()}
            more["policies_decide"]["mean_depth"] = row["decided_depth"]
        return {"value": value.get("device"), "host_to_host": value.get("host"), **more}

    found = []
    for name, ratio, bars in (
        ("nobody leaves / exits removed", "nobody_over_removed", ("<= 1.15", "<= 1.10", "<= 1.05", "<= 1.05")),
        ("realised over arithmetic", "realised", (">= 0.80", ">= 0.85", ">= 0.92", ">= 0.92")),
    ):
        for batch, bar in zip((1, 8, 32, 128), bars, strict=True):
            more = of(batch, ratio)
            if batch == 128:
                more["batch_512"] = of(512, ratio)
            found.append(_bar(f"{name}, batch {batch}", more.pop("value"), "ratio", bar, **more))
    return found


def _other(rows: Rows, model: str) -> list[dict[str, Any]]:
    sync = _one(rows, part="sync", model=model)
    launches = sync.get("graph_launches")
    waits = sync.get("synchronisations")
    name = "host synchronisations inside a pass"
    counted = _bar(name, waits, "calls", "0", graph_launches=launches)
    counted["met"] = counted["met"] and launches == 1
    warm, cold = (
        _one(rows, part="capture", model=model, setting=f"{cache} cache").get("seconds") for cache in ("warm", "cold")
    )
    return [counted, _bar("load + capture, warm cache", warm, "s", "<= 5 s", cold_cache=cold)]


# -- several runs --------------------------------------------------------------------------------------------------


def merged(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """``record.merged``; of rows of the same thing the one with times stays, else the latest file's. ValueError where
    rows are of different GPUs: each has a file of its own."""
    rows, about = record.merged(paths, _KEY, _rank)
    cards = sorted({row["gpu"] for row in rows if row.get("gpu") is not None})
    if len(cards) > 1:
        raise ValueError(f"rows of one file must be of one GPU, got {' and '.join(cards)}")
    return rows, about


def _rank(row: Mapping[str, Any]) -> int:
    return 0 if "left_out" in row else 1 if "error" in row else 2


# -- showing -------------------------------------------------------------------------------------------------------


def show_rows(rows: Rows) -> None:
    """A line a competitor and shape: milliseconds by both clocks."""

    def ms(row: Mapping[str, Any], clock: str) -> str:
        return f"{row[clock]['median'] * 1e3:.3f}" if clock in row else "-"

    lines = []
    for row in rows:
        shape = f"{row.get('mix') or ''} {row.get('batch', '')}".strip()
        head = [row["part"], row["model"], shape]
        for setting in ("removed", "nobody", "half"):
            if setting in row:
                lines.append([*head, f"ours, {setting}", *(ms(row[setting], c) for c in ("device_s", "host_s")), ""])
        if "host_s" in row:
            ratios = row.get("over_ours", {})
            over = " / ".join(f"{ratios[c]:.2f}" if c in ratios else "-" for c in ("device", "host")) if ratios else ""
            name = row["competitor"] + (", half" if row["setting"] == "half depth" else "")
            lines.append([*head, name, ms(row, "device_s"), ms(row, "host_s"), over])
        reason = row.get("error") or row.get("left_out")
        if reason:
            lines.append([*head, row["competitor"], "-", "-", reason[:40]])
    if lines:
        header = ["part", "model", "batch", "competitor", "device ms", "host ms", "over ours"]
        show_table(Console(), header, lines, title="medians", left=("part", "model", "competitor", "over ours"))


def plot_times(rows: Rows, path: str | Path) -> Path:
    """Time against batch, ours and the competitors', by both clocks; bars span p10 to p90. Returns the path written."""
    path = Path(path)
    check_path(path)
    measured = [row for row in rows if row["part"] == "full" and "device_s" in row]
    if not measured:
        raise ValueError("there is nothing to draw: no row of part full has times")
    models = list(dict.fromkeys(row["model"] for row in measured))
    model = MODEL if MODEL in models else models[0]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(drawing)
    clocks = {"device_s": "inputs on the device", "host_s": "from padded ids to results, on the host"}
    for axes, (clock, title) in zip(drawing.subplots(1, 2, sharey=True), clocks.items(), strict=True):
        for name in (OURS, *peers.FULL_DEPTH):
            points = sorted(_rows(measured, model=model, competitor=name), key=lambda row: row["batch"])
            if not points:
                continue
            times = [p[clock]["median"] * 1e3 for p in points]
            below = [t - p[clock]["p10"] * 1e3 for t, p in zip(times, points, strict=True)]
            above = [p[clock]["p90"] * 1e3 - t for t, p in zip(times, points, strict=True)]
            label = "ours, exits removed" if name == OURS else peers.TITLES[name]
            label = None if clock == "host_s" else label  # once in the legend
            style = {"linewidth": 2.2 if name == OURS else 1.2, "marker": "o", "markersize": 4, "capsize": 2}
            axes.errorbar([p["batch"] for p in points], times, yerr=[below, above], label=label, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({row["batch"] for row in measured})
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.set_xlabel("rows a batch")
        axes.grid(alpha=0.3)
        axes.set_title(title, fontsize="small")
    drawing.axes[0].set_ylabel("time (ms), median")
    one = measured[-1]
    drawing.suptitle(f"{model}, full depth, {one['longest']} tokens a row, {one['gpu'] or 'CPU'}")
    drawing.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return save_figure(drawing, path)
