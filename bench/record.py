"""Result files: what was measured, on what, when, and which bars it meets."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.bench.report import environment
from engine.console import show_table
from engine.loading import write_file

RESULTS = Path(__file__).resolve().parent / "results"
_MACHINE = ("processor", "cpu_capability", "cpus", "threads", "gpu")


def figure(name: str, value: float | None, unit: str, bar: str, met: bool, **more: Any) -> dict[str, Any]:
    """One row of a table of figures to reach."""
    return {"name": name, "value": value, "unit": unit, "bar": bar, "met": bool(met), **more}


def _json(result: dict[str, Any]) -> str:
    """Indented to the second level, so that a row of figures is a line."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list):
            lines = ",\n  ".join(json.dumps(item, allow_nan=False) for item in value)
            parts.append(f"{json.dumps(key)}: [\n  {lines}\n ]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    return "{\n " + ",\n ".join(parts) + "\n}"


def write_result(path: Path, figures: list[dict[str, Any]], rows: Any, **more: Any) -> None:
    """Write a result file with its environment and show its figures."""
    found = environment()
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": found.pop("commit"),
        "machine": {name: found.pop(name) for name in _MACHINE if name in found},
        "versions": found,
        "figures": figures,
        **more,
        "rows": rows,
    }
    write_file(path, _json(result) + "\n")
    lines = [
        [
            f["name"],
            "-" if f["value"] is None else f"{f['value']:.3f}",
            f["unit"],
            f["bar"],
            "yes" if f["met"] else "NO",
        ]
        for f in figures
    ]
    show_table(Console(), ["figure", "value", "unit", "bar", "met"], lines, title=str(path.name))


def merged(
    paths: Sequence[Path], key: Sequence[str], rank: Callable[[Mapping[str, Any]], int] = lambda row: 0
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of several result files, and what ``write_result`` is to say of their machine.

    Of rows that are alike in all fields of ``key`` the one of the highest rank stays, of equals the latest file's; each
    says of which commit it is. ValueError for a file without rows.
    """
    kept: dict[tuple, dict[str, Any]] = {}
    runs = []
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or not {"rows", "machine", "versions", "commit", "date"} <= set(result):
            raise ValueError(f"{path} must be a result file with rows, machine, versions, commit and date")
        own = {name: result[name] for name in ("date", "commit", "machine", "versions")} | {"file": path.name}
        runs += result.get("runs", [own])  # a file that is itself several
        for row in result["rows"]:
            row = {"commit": result["commit"], **row}
            place = tuple(row.get(name) for name in key)
            if place not in kept or rank(row) >= rank(kept[place]):
                kept[place] = row
    about = {name: runs[-1][name] for name in ("date", "machine", "versions")}
    commits = [run["commit"] for run in runs if run["commit"]]
    # A copy of the tree without its history knows no commit: then it is this tree's.
    return list(kept.values()), about | {"commit": commits[-1] if commits else environment()["commit"], "runs": runs}


def same_in_all(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """What result files that are to be merged say of ``names``. ValueError where they were not asked the same."""
    for name in names:
        if any(one[name] != results[0][name] for one in results):
            raise ValueError(f"{name} differs between the files: {', '.join(str(one[name]) for one in results)}")
    return {name: results[0][name] for name in names}
