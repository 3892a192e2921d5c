from dataclasses import replace

import pytest

from engine.bench.plots import check_path, plot_accuracy_time
from engine.bench.report import Point
from engine.bench.timer import Timing

pytest.importorskip("matplotlib")
POINT = Point("full depth", None, 100, 4, 0.9, None, 4.0, 0.0, {2: 0, 4: 100}, Timing((1.0, 1.1, 1.3)))
CURVE = [
    replace(POINT, name=f"threshold {t}", threshold=t, accuracy=0.5 + t / 2, timing=Timing((t, t + 0.1)))
    for t in (0.2, 0.5, 0.8)
]


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_writes_a_figure(tmp_path, suffix, magic):
    path = plot_accuracy_time({"full depth": [POINT], "exits": CURVE}, tmp_path / f"new/figure.{suffix}", title="T")
    assert path.read_bytes().startswith(magic)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_axes_name_their_units(tmp_path):
    path = plot_accuracy_time({"exits": CURVE}, tmp_path / "figure.svg", title="T", subtitle="S")
    comments = path.read_text()  # matplotlib keeps every text as a comment beside its glyphs
    for text in ("wall time for 100 rows (s), median of 2 runs", "accuracy (% of rows)", "<!-- 0.5 -->", "exits"):
        assert text in comments


def test_refuses(tmp_path):
    with pytest.raises(ValueError, match="no points"):
        plot_accuracy_time({"exits": []}, tmp_path / "figure.png", title="T")
    with pytest.raises(ValueError, match=r"sets of \[50, 100\]"):
        plot_accuracy_time({"a": [POINT], "b": [replace(POINT, rows=50)]}, tmp_path / "figure.png", title="T")
    for name in ("figure", "figure.jpg", "figure.txt"):
        with pytest.raises(ValueError, match="must end in .png"):
            check_path(name)
