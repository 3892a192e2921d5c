"""Where a pass's time goes, kernel by kernel, from a profiler's record of its graph.

Kernels start while the one in front of them ends and wait on the device for what they need, so their own durations
overlap and add up to more than the pass. What counts is by how much each moves the end of the pass: from the end of the
kernel that ended before it to its own end. These shares and the gaps in which nothing ran add up to the pass that was
PROFILED, exactly, and to no other: profiling may change a pass. ``device_us`` is the time of the same replay without a
profiler, by events on the device: where it is far from ``pass_us``, shares say little about it.

Copies and fills on the device ("Memcpy DtoD", "Memset") have shares like kernels. ``graph_nodes`` counts the nodes of
the graph, those of bodies that did not run, too; ``launches`` what ran.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

from engine.bench import encoder_session
from engine.bench.encoder_competitors import Batch, Competitor, one_line
from engine.bench.encoder_figures import OURS
from engine.bench.encoder_session import Session, Subject, check_served, half_depth, prepared, run_ours

_REPLAYS = 9
_CALLS = 10  # in a row, of a replay that is timed without a profiler
_PRODUCT = "product"


class Span(NamedTuple):
    """One kernel, copy or fill on the device; microseconds."""

    name: str
    start: float
    end: float


def short_name(name: str) -> str:
    """Of a kernel, without namespaces, arguments and templates: but of a product, whether it applies GELU."""
    bare = re.sub(r"^void\s+|\(anonymous namespace\)::|<unnamed>::", "", name)
    plain = re.split(r"[<(]", bare, maxsplit=1)[0].rpartition("::")[2]
    plain = re.sub(r"_0d\w*$", "", plain).removesuffix("_kernel").strip("_ ")
    if plain != _PRODUCT:
        return plain
    flags = re.findall(r"true|false|\(bool\)[01]", name)
    return f"{_PRODUCT} + gelu" if len(flags) > 1 and flags[1] in ("true", "(bool)1") else _PRODUCT


def shares(spans: Iterable[Span]) -> tuple[dict[str, dict[str, float]], float]:
    """({kernel: launches, us}, us in which none ran) of one pass; together what it took from first start to end."""
    ordered = sorted(spans, key=lambda span: (span.end, span.start))
    gaps = _gaps(ordered)
    kernels: dict[str, dict[str, float]] = {}
    ended = min((span.start for span in ordered), default=0.0)
    for span in ordered:
        idle = sum(end - start for start, end in gaps if ended <= start < span.end)
        row = kernels.setdefault(short_name(span.name), {"launches": 0, "us": 0.0})
        row["launches"] += 1
        row["us"] += span.end - ended - idle
        ended = span.end
    return dict(sorted(kernels.items(), key=lambda item: -item[1]["us"])), sum(end - start for start, end in gaps)


def _gaps(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """Stretches between the first start and the last end in which no kernel ran."""
    found: list[tuple[float, float]] = []
    ended = None
    for span in sorted(spans, key=lambda span: span.start):
        if ended is not None and span.start > ended:
            found.append((ended, span.start))
        ended = span.end if ended is None else max(ended, span.end)
    return found


def typical(passes: Sequence[tuple[Mapping[str, Mapping[str, float]], float]]) -> dict[str, Any]:
    """Medians over passes of the same kernels. ValueError where passes differ in what they launched."""
    first = {name: row["launches"] for name, row in passes[0][0].items()}
    for kernels, _ in passes[1:]:
        found = {name: row["launches"] for name, row in kernels.items()}
        if found != first:
            raise ValueError(f"passes of one batch must launch the same kernels, got {first} and {found}")
    us = {name: median(kernels[name]["us"] for kernels, _ in passes) for name in first}
    return {
        "kernels": {name: {"launches": first[name], "us": us[name]} for name in sorted(us, key=us.get, reverse=True)},
        "idle_us": median(idle for _, idle in passes),
        "pass_us": median(idle + sum(row["us"] for row in kernels.values()) for kernels, idle in passes),
        "launches": sum(first.values()),
    }


def profile_rows(session: Session, subject: Subject, batch: Batch, where: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Exits removed, exits that never fire, and half of the depth (of one row: it leaves in the middle)."""
    rows, layers = len(batch.lengths), subject.layers
    script = half_depth(rows, layers)
    cases = {
        "exits removed": {"min_depth": layers},
        "nobody leaves": {"threshold": 1.0},
        "half depth": {"criterion": "scripted", "exit_layers": script[len(script) // 2]},
    }
    found = []
    for setting, case in cases.items():
        row = {**where, "competitor": OURS, "setting": setting}
        if session.device.type != "cuda":
            found.append(row | {"left_out": f"needs a CUDA device, the model is on {session.device}"})
            continue
        try:
            found.append(row | _profile(session, subject, batch, case))
        except Exception as error:  # one setting without a profile is not the end of the run
            found.append(row | {"error": one_line(error)})
            print(f"{where['part']} {setting}: {one_line(error)}", flush=True)
    return found


def _profile(session: Session, subject: Subject, batch: Batch, case: Mapping[str, Any]) -> dict[str, Any]:
    run_ours(subject.engine, batch, case)
    check_served(subject.engine)
    executor = subject.engine.executor
    replay = executor.replayer(*prepared(subject.engine, batch, case))
    found = typical([shares(spans) for spans in _recorded(session, replay)])
    alone = Competitor(on_device=replay, from_host=lambda _: replay(), stream=executor._stream)
    seconds = [encoder_session._queued_seconds(session, alone, _CALLS) for _ in range(_REPLAYS)]
    return found | {"device_us": 1e6 * median(seconds)} | _graph_nodes(executor)


def _graph_nodes(executor: Any) -> dict[str, int]:
    """Of the program that the executor used last, where it says so."""
    program = next(reversed(getattr(executor, "_programs", {}).values()), None)  # the last used is moved to the end
    nodes = getattr(getattr(program, "graph", None), "num_nodes", None)
    return {} if nodes is None else {"graph_nodes": nodes}


def _spans(events: Iterable[Any]) -> list[Span]:
    """What ran on the device, by a profiler's events. Waits of a stream or the device stand there, too: nothing ran."""
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Context", "Stream", "Event"))
    ]


def _recorded(session: Session, replay: Any) -> list[list[Span]]:
    for _ in range(3):
        replay()
    passes = []
    for _ in range(_REPLAYS):
        session.synchronise()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            replay()
            session.synchronise()
        spans = _spans(profile.events())
        if not spans:
            raise RuntimeError("the profiler recorded no kernel: it may lack the right to read the device's counters")
        passes.append(spans)
    return passes


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """As Markdown: a kernel a line, a setting a column; microseconds, and launches."""
    measured = [row for row in rows if "kernels" in row]
    names = list(dict.fromkeys(name for row in measured for name in row["kernels"]))
    total = {name: sum(row["kernels"].get(name, {"us": 0.0})["us"] for row in measured) for name in names}
    lines = ["| us (launches) | " + " | ".join(f"{row['batch']}, {row['setting']}" for row in measured) + " |"]
    lines.append("| --- |" + " --- |" * len(measured))
    for name in sorted(names, key=total.get, reverse=True):
        cells = (row["kernels"].get(name) for row in measured)
        lines.append(f"| {name} | " + " | ".join(f"{c['us']:.1f} ({c['launches']})" if c else "" for c in cells) + " |")
    lines.append("| nothing runs | " + " | ".join(f"{row['idle_us']:.1f}" for row in measured) + " |")
    lines.append("| pass | " + " | ".join(f"{row['pass_us']:.1f} ({row['launches']})" for row in measured) + " |")
    times = (f"{row['device_us']:.1f}" if "device_us" in row else "" for row in measured)
    lines.append("| pass, not profiled | " + " | ".join(times) + " |")
    return "\n".join(lines)
