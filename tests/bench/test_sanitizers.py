"""All sanitizers over all kernels: what is read from their reports. A script stands for compute-sanitizer."""

from __future__ import annotations

import json
import sys

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
    assert sanitizers.read_report("killed") == {"errors": None}


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
