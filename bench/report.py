"""Quality, depth and time of an engine on labelled rows, measured in the same runs; and how they are shown."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

import engine
from engine.api import Engine
from engine.bench.timer import Timing, format_seconds, interleave
from engine.console import show_table
from engine.results import Classification
from engine.train import statistics
from engine.train.data import HUB_PREFIX, SPLIT_NAMES, SUFFIXES, Examples, load_examples, split_file

FULL_DEPTH = "full depth"
WHAT_IS_TIMED = "from texts to labels: tokenisation, all layers that run, and the results in the caller's order"
_BAR_WIDTH = 40
# Bytes a second, SXM5, by the data sheets.
_BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}


# -- measuring ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One setting of one engine on one set of rows. f1: of label 1, for two classes only; threshold: None where exits
    are removed; timing: seconds for all rows together."""

    name: str
    threshold: float | None
    rows: int
    num_layers: int
    accuracy: float
    f1: float | None
    mean_depth: float
    saved_layers: float
    exit_histogram: dict[int, int]
    timing: Timing

    def to_dict(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self).items() if name not in ("timing", "exit_histogram")}
        histogram = {str(layer): count for layer, count in self.exit_histogram.items()}
        return {**fields, "exit_histogram": histogram, "wall_time": self.timing.to_dict()}


def full_depth(model: Engine) -> dict[str, Any]:
    """Arguments of ``Engine.run`` that remove all exits; the fastest way to run every layer."""
    return {"min_depth": model.config.num_layers}


def threshold_name(threshold: float) -> str:
    return f"threshold {threshold:g}"


def measure_points(
    model: Engine,
    examples: Examples,
    settings: Mapping[str, Mapping[str, Any]],
    *,
    repeats: int = 3,
    progress: Console | None = None,
    **shared: Any,
) -> dict[str, tuple[Point, Classification]]:
    """Run every setting ``repeats`` times in turns and judge what the runs returned.

    settings  name -> arguments of ``Engine.run``; ``shared`` goes to all of them. The first two run once more, ahead
              and unmeasured: settings differ in numbers only, so this warms up all of them
    progress  shows a bar, where it is a terminal
    """

    def competitor(arguments: Mapping[str, Any]) -> Callable[[], Classification]:
        return lambda: model.run(examples.texts, progress=False, **{**shared, **arguments})

    competitors = {name: competitor(arguments) for name, arguments in settings.items()}
    for warm_up in list(competitors.values())[:2]:
        warm_up()
    silent = progress is None or not progress.is_terminal
    # Drawn between the runs only: a thread that redraws ten times a second would take part in every one of them.
    with Progress(console=progress, transient=True, disable=silent, auto_refresh=False) as bar:
        task = bar.add_task("measuring", total=repeats * len(competitors))
        measured = interleave(
            competitors,
            repeats=repeats,
            warmup=0,
            device=model.device,
            after_each=lambda: bar.update(task, advance=1, refresh=True),
        )
    points = {}
    for name, run in measured.items():
        exits_removed = settings[name].get("min_depth") == model.config.num_layers
        threshold = None if exits_removed else settings[name].get("threshold", model.config.threshold)
        points[name] = (judge(name, threshold, examples, run.result, run.timing), run.result)
    return points


def judge(name: str, threshold: float | None, examples: Examples, result: Classification, timing: Timing) -> Point:
    """The figures of one run whose rows have known labels."""
    two_classes = len(examples.labels) == 2
    return Point(
        name=name,
        threshold=threshold,
        rows=len(examples),
        num_layers=result.stats.num_layers,
        accuracy=float((result.label_ids == examples.label_ids).double().mean()),
        f1=statistics.f1_binary(result.label_ids, examples.label_ids) if two_classes else None,
        mean_depth=result.stats.mean_depth,
        saved_layers=result.stats.saved_layers,
        exit_histogram=result.stats.exit_histogram,
        timing=timing,
    )


def labelled_examples(data: str | Path, labels: Sequence[str], split: str = "test") -> Examples:
    """Rows with the label ids of a checkpoint whose classes are ``labels``.

    data   a file, a folder or hub:owner/name; split: which part of a folder or hub data set
    Where the data names its classes itself (labels.json, or on the hub), ids are translated by name, not trusted to
    agree.
    """
    source = _split_source(data, split)
    if isinstance(source, Path) and not (source.parent / "labels.json").is_file():
        return load_examples(source, labels)
    examples = load_examples(source)
    if examples.labels == tuple(map(str, range(len(examples.labels)))):  # ids without names
        return load_examples(source, labels)
    unknown = [examples.labels[i] for i in examples.label_ids.unique().tolist() if examples.labels[i] not in labels]
    if unknown:
        raise ValueError(
            f"{source} has rows labelled {_some(unknown)}, the checkpoint's classes are "
            f"{_some(labels)}: evaluate on data with these classes"
        )
    place = {name: i for i, name in enumerate(labels)}
    ids = torch.tensor([place.get(name, -1) for name in examples.labels])[examples.label_ids]
    return Examples(examples.texts, ids, tuple(labels))


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _split_source(data: str | Path, split: str) -> str | Path:
    """The file of a split; a hub name with its split."""
    if split not in SPLIT_NAMES:
        raise ValueError(f"split must be one of {', '.join(SPLIT_NAMES)}, got {split!r}")
    if str(data).startswith(HUB_PREFIX):
        named = ":" in str(data)[len(HUB_PREFIX) :]
        return str(data) if named else f"{data}:{SPLIT_NAMES[split][-1]}"  # the hub says "validation"
    path = Path(data)
    if not path.is_dir():
        return path
    file = split_file(path, split)
    if file is None:
        raise ValueError(
            f"{path} must hold one {split} file ({' or '.join(SPLIT_NAMES[split])} with one of {', '.join(SUFFIXES)}), "
            "it holds none: name the file itself, or another --split"
        )
    return file


def environment() -> dict[str, Any]:
    """Software and machine that figures were measured with."""
    import transformers

    return {
        "consistentee": engine.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({"triton": metadata.version("triton")} if find_spec("triton") else {}),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def memory_bandwidth(device: torch.device | str) -> float:
    """Of a GPU's memory, in bytes a second; of a device that is not in the table an H100's."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((value for card, value in _BANDWIDTHS.items() if card in name), _BANDWIDTHS["H100"])


def _commit() -> str | None:
    """The commit of a source checkout, "+" for changes on top; None for an installed package.

    CONSISTENTEE_COMMIT says it for a copy whose own record is not that of its files.
    """
    if stated := os.environ.get("CONSISTENTEE_COMMIT"):
        return stated
    return commit_of(Path(engine.__file__).parent.parent)


def commit_of(root: Path) -> str | None:
    """The commit of the checkout at ``root``, "+" for changes on top; None where it is none."""
    if not (root / ".git").exists():
        return None
    try:
        call = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


# -- what the host calls -------------------------------------------------------------------------------------------


def calls_inside(events: Iterable[Any], name: str) -> list[str]:
    """CUDA's functions that the host called, by a profiler's events, while it was inside any span of that name."""
    # A span that launches something stands in the record a second time, where the device ran it.
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    spans = [event.time_range for event in on_host if event.name == name]
    return [
        event.name
        for event in on_host
        if event.name.startswith("cu") and any(span.start <= event.time_range.start < span.end for span in spans)
    ]


def may_wait(call: str) -> bool:
    """Whether a function of CUDA may come back only after the device has done what was asked for before.

    Copies and fills without "Async" may; who frees memory waits for all that could use it.
    """
    return "Synchronize" in call or call in ("cudaMemcpy", "cudaMemcpy2D", "cudaMemset", "cudaFree", "cudaFreeHost")


# -- showing -----------------------------------------------------------------------------------------------------


def show_points(console: Console, points: Sequence[Point], title: str = "") -> None:
    """A table with one line a point. The first point is what the others' times are compared with."""
    base = points[0]
    with_f1 = base.f1 is not None
    header = ["setting", "accuracy", *(["F1"] if with_f1 else []), "mean depth", "saved layers"]
    header += ["time", "p10 to p90", f"t_{base.name.split()[0]} / t"]
    rows = []
    for p in points:
        row = [p.name, f"{p.accuracy:.4f}", *([f"{p.f1:.4f}"] if p.f1 is not None else [])]
        row += [f"{p.mean_depth:.2f}", f"{100 * p.saved_layers:.1f} %"]
        row += [format_seconds(p.timing.median), format_seconds(p.timing.p10, p.timing.p90)]
        rows.append([*row, f"{base.timing.median / p.timing.median:.2f}"])
    show_table(console, header, rows, title=title, left=("setting",))


def show_histogram(console: Console, histogram: Mapping[int, int], title: str) -> None:
    """One bar a layer: rows that left there."""
    total, most = max(sum(histogram.values()), 1), max(histogram.values(), default=0) or 1
    block = "█" if console.is_terminal and (console.encoding or "").lower().startswith("utf") else "#"
    rows = [
        [str(layer), str(count), f"{100 * count / total:.1f} %", block * round(_BAR_WIDTH * count / most)]
        for layer, count in histogram.items()
    ]
    show_table(console, ["exit layer", "rows", "share", ""], rows, title=title, left=("",))
