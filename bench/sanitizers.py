"""All sanitizers over all kernels, side by side, and what they said.

    python -m engine.bench.sanitizers [--output bench/results/sanitizers.json] [--jobs 8]

Every tool of compute-sanitizer runs every group of ``sanitize`` in a process of its own, those of ``ALONE`` after the
others and one at a time. A row has the number of errors (of hazards, for racecheck), for a race the places in the
source that the tool names, and apart from them what is reported of kernels of torch and of NVIDIA's libraries
(``elsewhere``). The result file is written after every row; those still to come stand in it without number.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from engine.bench import sanitize
from engine.bench.encoder_profile import short_name
from engine.bench.record import RESULTS, figure, write_result

# Conditional nodes under memcheck (2025.3.1): beside other processes the first launch mostly ends in an illegal address
# that no kernel is charged with; alone it is clean, and so are 14 processes with 60 rounds each without the tool.
ALONE = ("graph", "nodes")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Behind a conditional node the tool's table of barriers overflows, and the launch fails. One of 16 384 fails it, too.
OPTIONS = {("synccheck", "nodes"): ("--num-cuda-barriers", "4096")}
# Group "passes" has the same kernels without a node.
LEFT_OUT = {("racecheck", "nodes"): "racecheck crashes on the host at the first launch of a node with such kernels"}
# Beyond its limit for printing a tool says once more how many "were not printed".
_SUMMARY = re.compile(r"SUMMARY: (\d+) (?:errors?|hazards?)\b(?! were not)")
_ERROR = re.compile(r"[\w.]*(?:Error|Exception): ")
_PLACE = re.compile(r"(Write|Read) access at (.+?)\+0x[0-9a-f]+(?: in (\S+?:\d+))?")
_REPORT = re.compile(r"(?:^=+ +at|Race reported between \w+ access at) (.+?)\+0x", re.MULTILINE)  # one a report
# Of no kernel: what a copy reads, what a call is refused.
_PLACELESS = re.compile(r"^=+ (?!COMPUTE-|Error: |.*SUMMARY)([A-Z].*)\n(?!=+ +at )", re.MULTILINE)
# All others are libraries'. initcheck does not see what cuBLAS writes by the copy engine, and charges who reads it.
_OURS = re.compile(r"\bconsistentee::|^_\w+_kernel\w*$")
_PRINTED = "1000000"  # reports: without its limit all of them can be told apart


def read_report(text: str) -> dict[str, Any]:
    """errors but for libraries' kernels (None where the tool came to no end); where there are some, by which accesses
    of the source races were reported, elsewhere: {kernel: reports} of libraries', and placeless: {what: reports} of
    errors that no kernel is charged with."""
    summaries = _SUMMARY.findall(text)
    accesses = [access for access in _PLACE.findall(text) if _OURS.search(access[1])]
    places = sorted({f"{kind} {short_name(kernel)} {place}".strip() for kind, kernel, place in accesses})
    elsewhere = Counter(short_name(kernel) for kernel in _REPORT.findall(text) if not _OURS.search(kernel))
    row: dict[str, Any] = {"errors": sum(map(int, summaries)) - elsewhere.total() if summaries else None}
    placeless = Counter(re.sub(r"0x[0-9a-f]+", "0x", what) for what in _PLACELESS.findall(text))
    for name, found in (("places", places), ("elsewhere", dict(elsewhere)), ("placeless", dict(placeless))):
        if found:
            row[name] = found
    return row


def stop(process: subprocess.Popen) -> None:
    """End a process and all it started: a tool that is killed alone leaves its Python behind, on the device."""
    with contextlib.suppress(ProcessLookupError):  # ended by itself meanwhile
        os.killpg(process.pid, signal.SIGKILL)


def run_one(
    sanitizer: str, tool: str, group: str, timeout_s: float, running: set[subprocess.Popen] | None = None
) -> dict[str, Any]:
    """One tool over one group. What stopped it, where something did, is in ``problem``.

    running  holds the process while it runs, for who may have to ``stop`` it
    """
    row: dict[str, Any] = {"tool": tool, "group": group}
    if (tool, group) in LEFT_OUT:
        return row | {"errors": None, "left_out": LEFT_OUT[tool, group]}
    running = set() if running is None else running
    # Blocks of torch's caching allocator hide overruns, and what an earlier owner has written.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--print-limit", _PRINTED, "--show-backtrace", "no", *OPTIONS.get((tool, group), ())]
    call = [sanitizer, "--tool", tool, *options, sys.executable, "-m", "engine.bench.sanitize", "--only", group]
    started = time.perf_counter()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    with subprocess.Popen(call, env=environment, start_new_session=True, **pipes) as process:
        running.add(process)
        try:
            said = "".join(process.communicate(timeout=timeout_s))
        except subprocess.TimeoutExpired:
            stop(process)
            return row | {"errors": None, "problem": f"did not end within {timeout_s:g} s"}
        finally:
            running.discard(process)
    row |= read_report(said) | {"seconds": round(time.perf_counter() - started, 1)}
    if f"{group}: ran" not in said:
        row |= {"errors": None, "problem": last_words(said) or f"exit status {process.returncode}"}
    return row


def run_several(jobs: int, calls: Mapping[int, Callable[..., dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(place, row) of each call as it ends, ``jobs`` at a time. Whatever ends this ends their processes, too."""
    running: set[subprocess.Popen] = set()
    with ThreadPoolExecutor(jobs) as pool:
        turns = {pool.submit(call, running): place for place, call in calls.items()}
        try:
            for turn in as_completed(turns):
                yield turns[turn], turn.result()
        except BaseException:  # sessions of their own do not hear of Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(running):
                stop(process)
            raise


def last_words(text: str) -> str:
    """What a process that failed says of it: Python's last error, behind which frames and notes may stand; or the
    tool's, or the last line."""
    told = [line for line in text.splitlines() if line.strip()]
    own = [line for line in told if not line.startswith("=====")]
    errors = [line for line in own if _ERROR.match(line)]
    refusals = [line for line in told if line.startswith("========= Error:")]
    return (errors or refusals or own or [""])[-1][:300]


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Errors of each tool over all groups that it can look at. No value where one of them was not looked at."""
    found = []
    for tool in dict.fromkeys(row["tool"] for row in rows):
        own = [row for row in rows if row["tool"] == tool and "left_out" not in row]
        whole = all(row["errors"] is not None for row in own)
        errors = sum(row["errors"] for row in own) if whole else None
        groups = [row["group"] for row in own if row["errors"]]
        found.append(
            figure(f"{tool}: errors over {len(own)} groups", errors, "reports", "0", errors == 0, groups=groups)
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--groups", nargs="+", choices=tuple(sanitize.RUNS), default=list(sanitize.RUNS))
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes at a time")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of one process")
    parser.add_argument("--sanitizer", help="default: compute-sanitizer on the path, or in /usr/local/cuda/bin")
    parser.add_argument("--output", type=Path, default=RESULTS / "sanitizers.json")
    o = parser.parse_args(arguments)
    if o.jobs < 1 or o.timeout <= 0:
        parser.error(f"jobs must be at least 1 and timeout above 0, got {o.jobs} and {o.timeout:g}")
    sanitizer = shutil.which(o.sanitizer or "compute-sanitizer")
    if o.sanitizer is None and sanitizer is None:
        sanitizer = shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        parser.error(
            f"{o.sanitizer or 'compute-sanitizer'} is not there: install the CUDA toolkit, or name it by --sanitizer"
        )
    todo = [(tool, group) for tool in o.tools for group in o.groups]
    # Who has not had its turn when the run is cut short must not look clean.
    rows = [{"tool": tool, "group": group, "errors": None, "problem": "not run yet"} for tool, group in todo]
    places = range(len(todo))
    together, alone = [i for i in places if todo[i][1] not in ALONE], [i for i in places if todo[i][1] in ALONE]
    for jobs, turn in ((o.jobs, together), (1, alone)):
        calls = {i: partial(run_one, sanitizer, *todo[i], o.timeout) for i in turn}
        with contextlib.closing(run_several(jobs, calls)) as ended:
            for place, row in ended:
                rows[place] = row
                with contextlib.redirect_stdout(io.StringIO()):  # the table of figures is for the end
                    write_result(o.output, figures(rows), rows)
                if row["errors"] != 0:
                    why = row.get("problem", row.get("left_out", ""))
                    print(f"{row['tool']} {row['group']}: {row['errors']} {why}", flush=True)
                    print("".join(f"  {at}\n" for at in row.get("places", [])), end="", flush=True)
    write_result(o.output, figures(rows), rows)


if __name__ == "__main__":
    main()
