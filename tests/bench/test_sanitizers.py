"""All sanitizers over all kernels: what is read from their reports. A script stands for compute-sanitizer."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from engine.bench import sanitizers

RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _rows_kernel+0x1df0 in gpu_qkv.py:191
=========     and Write access at _rows_kernel+0x1df0 in gpu_qkv.py:191 [6 hazards]
=========
triton qkv: ran
========= RACECHECK SUMMARY: 9 hazards displayed (9 errors, 0 warnings)
"""


def test_reports_are_read():
    assert sanitizers.read_report(RACE) == {"errors": 9, "places": ["Write rows gpu_qkv.py:191"]}
    assert sanitizers.read_report("========= ERROR SUMMARY: 0 errors\n") == {"errors": 0}
    much = (
        "========= ERROR SUMMARY: 255 errors\n========= ERROR SUMMARY: 155 errors were not printed. Use --print-limit\n"
    )
    assert sanitizers.read_report(much) == {"errors": 255}
    kernel = "void consistentee::cuda::product_kernel<(bool)0, (bool)0, 4>(consistentee::cuda::ProductArgs)"
    one = f"========= Error: Race reported between Write access at {kernel}+0x150\n"
    one += "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    assert sanitizers.read_report(one) == {"errors": 1, "places": ["Write product"]}
    kernel = "void consistentee::cuda::product_kernel<(bool)0, 4>(consistentee::cuda::ProductArgs)"
    lined = f"========= Error: Race reported between Read access at {kernel}+0x150 in product.cu:27\n{one}"
    assert sanitizers.read_report(lined) == {"errors": 1, "places": ["Read product product.cu:27", "Write product"]}
    assert sanitizers.read_report("killed") == {"errors": None}


def test_reports_of_libraries_are_told_apart():
    """Errors without a kernel count as ours, and are told."""
    line = "========= Uninitialized __global__ memory read of size 2 bytes\n=========     at {}+0x560\n"
    line += "=========     by thread (0,0,0) in block (0,0,0)\n========= \n"
    foreign = "void at::native::vectorized_elementwise_kernel<(int)8, at::native::CUDAFunctor_add<c10::Half>>(int, T2)"
    own = "void consistentee::cuda::product_kernel<(bool)0, (bool)0, 4>(consistentee::cuda::ProductArgs)"
    said = 3 * line.format(foreign) + 2 * line.format(own) + "========= Program hit cudaErrorInvalidValue\n"
    said += "========= ERROR SUMMARY: 6 errors\n"
    assert sanitizers.read_report(said) == {
        "errors": 3, "elsewhere": {"vectorized_elementwise": 3}, "placeless": {"Program hit cudaErrorInvalidValue": 1}
    }  # fmt: skip
    unnamed = line.format("void <unnamed>::softmax_warp_forward<float, (int)2>(float *, int)")
    assert sanitizers.read_report(unnamed + "========= ERROR SUMMARY: 1 error\n") == {
        "errors": 0, "elsewhere": {"softmax_warp_forward": 1}
    }  # fmt: skip
    race = "========= Error: Race reported between Read access at cudnn_sdpa_kernel0_0+0x300\n"
    race += "=========     and Write access at cudnn_sdpa_kernel0_0+0x6890 [16 hazards]\n========= \n"
    said = RACE.replace("SUMMARY: 9", "SUMMARY: 10") + race  # ten reports, of which the text has one and this one
    found = sanitizers.read_report(said)
    assert found == {"errors": 9, "places": ["Write rows gpu_qkv.py:191"], "elsewhere": {"cudnn_sdpa_kernel0_0": 1}}


def test_the_error_is_told_and_not_the_frames_behind_it():
    """torch prints frames of C++ behind what it says."""
    said = "========= COMPUTE-SANITIZER\nTraceback (most recent call last):\ntorch.AcceleratorError: CUDA error: busy\n"
    said += "Exception raised from f at g.cpp:3 (most recent call first):\nframe #0: c10::Error()\n\nframe #1: _start\n"
    said += "========= Error: process didn't terminate successfully\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizers.last_words(said) == "torch.AcceleratorError: CUDA error: busy"
    assert sanitizers.last_words("") == "" and sanitizers.last_words("killed\n\n") == "killed"


def stand_in(folder, body: str):
    script = folder / "sanitizer"
    script.write_text(f"#!{sys.executable}\nimport sys\ntool, group = sys.argv[2], sys.argv[-1]\n{body}\n")
    script.chmod(0o755)
    return str(script)


def run(folder, body: str, *more: str):
    output = folder / "found.json"
    call = ["--sanitizer", stand_in(folder, body), "--tools", "memcheck", "racecheck", "--groups", "packing", "graph"]
    sanitizers.main([*call, "--jobs", "2", "--output", str(output), *more])
    return json.loads(output.read_text())


def test_a_table_of_tools_and_groups(tmp_path, capsys):
    found = run(tmp_path, f"""
print(f"{{group}}: ran")
race = tool == "racecheck" and group == "graph"
print({RACE!r} if race else "========= ERROR SUMMARY: 0 errors")
""")  # fmt: skip
    rows = {(row["tool"], row["group"]): row for row in found["rows"]}
    assert len(rows) == 4 and {key for key, row in rows.items() if row["errors"]} == {("racecheck", "graph")}
    assert [(f["value"], f["met"], f["groups"]) for f in found["figures"]] == [(0, True, []), (9, False, ["graph"])]
    assert "Write rows gpu_qkv.py:191" in capsys.readouterr().out


def test_what_a_tool_cannot_look_at_is_told(tmp_path, capsys):
    """It has no number, and takes none from the groups that were looked at."""
    body = """
options = ["--num-cuda-barriers", "4096"]
assert (tool, group) != ("racecheck", "nodes")
assert (options == sys.argv[7:9]) == ((tool, group) == ("synccheck", "nodes")), sys.argv
print(f"{group}: ran")
print("========= ERROR SUMMARY: 0 errors")
"""
    found = run(tmp_path, body, "--tools", "racecheck", "synccheck", "--groups", "packing", "nodes")
    rows = {(row["tool"], row["group"]): row for row in found["rows"]}
    assert rows["racecheck", "nodes"]["errors"] is None and "crashes" in rows["racecheck", "nodes"]["left_out"]
    assert [row["errors"] for key, row in rows.items() if key != ("racecheck", "nodes")] == [0, 0, 0]
    assert [(f["name"], f["value"], f["met"]) for f in found["figures"]] == [
        ("racecheck: errors over 1 groups", 0, True),
        ("synccheck: errors over 2 groups", 0, True),
    ]
    assert "racecheck nodes: None racecheck crashes" in capsys.readouterr().out


def test_every_row_is_written_when_it_is_there(tmp_path, monkeypatch, capsys):
    """Who still has to run has no number, so that a run that is cut short does not look clean."""
    written, write = [], sanitizers.write_result

    def also(path, figures, rows):
        write(path, figures, rows)
        written.append(json.loads(path.read_text()))

    monkeypatch.setattr(sanitizers, "write_result", also)
    run(tmp_path, "print(f'{group}: ran'); print('========= ERROR SUMMARY: 0 errors')")
    open_rows = [sum(row.get("problem") == "not run yet" for row in one["rows"]) for one in written]
    assert open_rows == [3, 2, 1, 0, 0]
    assert not all(f["met"] for f in written[0]["figures"]) and all(f["met"] for f in written[-1]["figures"])
    assert capsys.readouterr().out.count("found.json") == 1


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ended(pid: int) -> bool:
    until = time.monotonic() + 10
    while runs(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not runs(pid)


def parent(folder) -> str:
    """A stand-in that starts a process of its own, as the tools do, and says which."""
    script, new = folder / "parent", folder / "pid.new"  # moved: who sees the file finds the number in it
    script.write_text(f"#!/bin/sh\nsleep 120 &\necho $! > '{new}'\nmv '{new}' '{folder / 'pid'}'\nwait\n")
    script.chmod(0o755)
    return str(script)


def test_who_takes_too_long_leaves_nothing_behind(tmp_path):
    row = sanitizers.run_one(parent(tmp_path), "memcheck", "packing", 1.0)
    assert row["errors"] is None and row["problem"] == "did not end within 1 s"
    assert ended(int((tmp_path / "pid").read_text()))


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    """The interruption comes with memcheck's row, which is there once racecheck has started a process of its own."""
    parent(tmp_path)
    body = f"""
import os, time
if tool == "racecheck":
    os.execv({str(tmp_path / "parent")!r}, ["parent"])
while not os.path.exists({str(tmp_path / "pid")!r}):
    time.sleep(0.01)
"""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sanitizers, "write_result", interrupted)
    call = ["--sanitizer", stand_in(tmp_path, body), "--tools", "memcheck", "racecheck", "--groups", "packing"]
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sanitizers.main([*call, "--jobs", "2", "--output", str(tmp_path / "found.json")])
    assert time.monotonic() - began < 60
    assert ended(int((tmp_path / "pid").read_text()))


def test_graphs_have_the_device_for_themselves(tmp_path):
    run(tmp_path, f"""
import os, time
mine = f"{{tool}} {{group}}.runs"
open(os.path.join({str(tmp_path)!r}, mine), "w").close()
time.sleep(0.3)
others = [name for name in os.listdir({str(tmp_path)!r}) if name.endswith(".runs") and name != mine]
print("others: " + ", ".join(others) if group == "graph" and others else f"{{group}}: ran")
os.remove(os.path.join({str(tmp_path)!r}, mine))
print("========= ERROR SUMMARY: 0 errors")
""")  # fmt: skip
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert all(row["errors"] == 0 for row in rows), rows


@pytest.mark.parametrize(
    "body, more, problem",
    [
        ("print('nothing to sanitize: there is no CUDA device', file=sys.stderr); sys.exit(1)", (), "no CUDA device"),
        ("print('========= ERROR SUMMARY: 0 errors'); print(f'{group}: left out, no triton')", (), "left out"),
        ("print('========= Error: Device not supported.')", (), "Device not supported"),
        ("import time; time.sleep(30)", ("--timeout", "0.5"), "did not end within 0.5 s"),
    ],
)
def test_who_was_not_looked_at_is_not_clean(tmp_path, body, more, problem):
    found = run(tmp_path, body, *more)
    assert all(row["errors"] is None and problem in row["problem"] for row in found["rows"])
    assert all(f["value"] is None and not f["met"] for f in found["figures"])


def test_without_a_sanitizer(capsys, tmp_path):
    with pytest.raises(SystemExit):
        sanitizers.main(["--sanitizer", str(tmp_path / "none"), "--output", str(tmp_path / "found.json")])
    assert "is not there: install the CUDA toolkit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sanitizers.main(["--jobs", "0"])
    assert "jobs must be at least 1" in capsys.readouterr().err
