"""Where a pass's time goes: what each kernel is charged with, and how rows of it are told."""

from __future__ import annotations

import json
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch

from engine.bench import encoder_h100, encoder_profile, encoder_session
from engine.bench.encoder_figures import OURS
from engine.bench.encoder_profile import Span, shares, short_name, table, typical
from tests.tiny import profiler_event

PRODUCT = "void consistentee::cuda::product_kernel<{}, {}, false, 31>(consistentee::cuda::ProductArgs)"


def test_names_without_what_is_around_them():
    assert short_name("_exit_norm_kernel") == "exit_norm" and short_name("_first_token_kernel_0d1d") == "first_token"
    assert short_name("void consistentee::(anonymous namespace)::survivors_kernel<1024>(int*, int)") == "survivors"
    assert short_name(PRODUCT.format("true", "false")) == "product"
    assert short_name(PRODUCT.format("false", "true")) == "product + gelu"
    assert short_name(PRODUCT.format("(bool)0", "(bool)1")) == "product + gelu"
    assert short_name("Memset (Device)") == "Memset" and short_name("Memcpy DtoD (Device -> Device)") == "Memcpy DtoD"


def event(name, start, end, device="CUDA"):
    return profiler_event(name, start, end, device)


def test_copies_and_fills_are_work_and_waits_are_not():
    found = encoder_profile._spans([
        event("cudaGraphLaunch", 0.0, 9.0, "CPU"),
        event("Memset (Device)", 1.0, 2.0),
        event("_rows_kernel", 2.0, 4.0),
        event("Memcpy DtoD (Device -> Device)", 5.0, 8.0),
        event("Stream Sync", 4.0, 9.0),
        event("Context Sync", 0.0, 9.0),
    ])  # fmt: skip
    kernels, idle = shares(found)
    assert {name: row["us"] for name, row in kernels.items()} == {"Memcpy DtoD": 3.0, "rows": 2.0, "Memset": 1.0}
    assert idle == 1.0


@pytest.fixture
def on_device(monkeypatch):
    """A session with a device that is not there; what each setting's passes are stands in ``passes``."""
    executor = SimpleNamespace(replayer=lambda *_: "a replay", _stream="a stream")
    subject = SimpleNamespace(layers=4, engine=SimpleNamespace(executor=executor))
    session = SimpleNamespace(device=torch.device("cuda", 0))
    passes: list = []

    def timed(session, competitor, calls):
        assert (competitor.on_device, competitor.stream) == ("a replay", "a stream")
        return 7e-6

    monkeypatch.setattr(encoder_profile, "run_ours", lambda *_: None)
    monkeypatch.setattr(encoder_profile, "prepared", lambda *_: ("rows", "options"))
    monkeypatch.setattr(encoder_profile, "_recorded", lambda *_: passes.pop(0))
    monkeypatch.setattr(encoder_session, "_queued_seconds", timed)
    batch = SimpleNamespace(lengths=[5, 3])
    return executor, passes, lambda: encoder_profile.profile_rows(session, subject, batch, {"part": "profile"})


def test_one_odd_replay_costs_one_row(on_device, capsys):
    _, passes, rows = on_device
    one = [Span("a", 0.0, 4.0)]
    passes += [[one, one], [one, [Span("b", 0.0, 4.0)]], [one, one]]
    first, odd, last = rows()
    assert first["competitor"] == odd["competitor"] == OURS
    assert odd["error"].startswith("ValueError: passes of one batch must launch the same") and "kernels" not in odd
    assert first["pass_us"] == last["pass_us"] == 4.0 and last["setting"] == "half depth"
    assert "profile nobody leaves: ValueError" in capsys.readouterr().out


def test_whatever_fails_on_the_device_is_a_row(on_device, monkeypatch):
    def failing(*_):
        raise UserWarning("the graph executor cannot serve here")

    monkeypatch.setattr(encoder_profile, "run_ours", failing)
    assert [row["error"] for row in on_device[2]()] == ["UserWarning: the graph executor cannot serve here"] * 3


def test_a_row_has_the_time_without_a_profiler_and_the_graphs_nodes(on_device):
    executor, passes, rows = on_device
    one = [Span("a", 0.0, 4.0)]
    passes += [[one]] * 6
    assert all(row["device_us"] == pytest.approx(7.0) and "graph_nodes" not in row for row in rows())
    nodes = (SimpleNamespace(graph=SimpleNamespace(num_nodes=n)) for n in (3, 9))
    executor._programs = OrderedDict(zip("xy", nodes, strict=True))
    assert [row["graph_nodes"] for row in rows()] == [9, 9, 9]


def test_shares_and_gaps_add_up_to_the_pass():
    """b starts inside a and waits for it; c follows behind a gap; d ends before c does, and is free."""
    spans = [
        Span("c", 13.0, 20.0),
        Span("a", 1.0, 5.0),
        Span("b", 2.0, 9.0),
        Span("d", 14.0, 19.0),
        Span("a", 20.5, 22.0),
    ]
    kernels, idle = shares(spans)
    assert idle == pytest.approx(4.0 + 0.5)
    assert kernels == {
        "d": {"launches": 1, "us": pytest.approx(6.0)},
        "a": {"launches": 2, "us": pytest.approx(4.0 + 1.5)},
        "b": {"launches": 1, "us": pytest.approx(4.0)},
        "c": {"launches": 1, "us": pytest.approx(1.0)},
    }
    assert list(kernels) == ["d", "a", "b", "c"]
    assert idle + sum(row["us"] for row in kernels.values()) == pytest.approx(22.0 - 1.0)
    assert shares([]) == ({}, 0.0)


def test_a_kernel_that_starts_in_front_of_an_earlier_end_has_no_gap():
    kernels, idle = shares([Span("a", 0.0, 10.0), Span("b", 10.0, 12.0), Span("b", 11.0, 11.5)])
    assert idle == 0.0 and kernels["b"] == {"launches": 2, "us": pytest.approx(2.0)}


def test_typical_is_the_median_of_passes_alike():
    passes = [({"a": {"launches": 2, "us": us}, "b": {"launches": 1, "us": 9.0}}, idle) for us, idle in
              ((1.0, 0.0), (5.0, 2.0), (3.0, 1.0))]  # fmt: skip
    found = typical(passes)
    assert found["kernels"] == {"b": {"launches": 1, "us": 9.0}, "a": {"launches": 2, "us": 3.0}}
    assert found["idle_us"] == 1.0 and found["launches"] == 3 and found["pass_us"] == 13.0
    with pytest.raises(ValueError, match="must launch the same kernels"):
        typical([*passes, ({"a": {"launches": 1, "us": 1.0}, "b": {"launches": 1, "us": 9.0}}, 0.0)])


def test_a_table_has_a_line_a_kernel():
    one = typical([({"a": {"launches": 2, "us": 3.0}}, 0.5)])
    rows = [
        {"batch": 1, "setting": "exits removed", "device_us": 3.25, **one},
        {"batch": 8, "setting": "half depth", **typical([({"b": {"launches": 1, "us": 7.0}}, 0.0)])},
        {"batch": 8, "setting": "nobody leaves", "left_out": "no device"},
    ]
    assert table(rows).splitlines() == [
        "| us (launches) | 1, exits removed | 8, half depth |",
        "| --- | --- | --- |",
        "| b |  | 7.0 (1) |",
        "| a | 3.0 (2) |  |",
        "| nothing runs | 0.5 | 0.0 |",
        "| pass | 3.5 (2) | 7.0 (1) |",
        "| pass, not profiled | 3.2 |  |",
    ]


def test_without_a_device_it_says_so(tmp_path):
    output = tmp_path / "profile.json"
    call = [
        "--device",
        "cpu",
        "--tiny",
        "--rounds",
        "1",
        "--only",
        "profile",
        "--batches",
        "2",
        "--output",
        str(output),
    ]
    encoder_h100.main(call)
    rows = json.loads(output.read_text())["rows"]
    assert [row["setting"] for row in rows] == ["exits removed", "nobody leaves", "half depth"]
    assert all("needs a CUDA device" in row["left_out"] for row in rows)
