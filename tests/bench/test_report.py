import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import engine
from engine.bench import report
from engine.bench.report import (
    environment,
    full_depth,
    judge,
    labelled_examples,
    measure_points,
    memory_bandwidth,
    show_histogram,
    show_points,
)
from engine.bench.timer import Timing
from engine.train.data import Examples
from tests import tiny

LABELS = tiny.LABELS


@pytest.fixture(scope="module")
def model(checkpoint):
    return engine.load(checkpoint)


@pytest.fixture(scope="module")
def examples():
    return Examples(tiny.random_texts(30), torch.arange(30) % len(LABELS), LABELS)


def shown(show, *arguments, terminal=False):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    show(console, *arguments)
    return console.file.getvalue()


def test_points_are_judged_on_the_runs_that_were_timed(model, examples):
    settings = {"full depth": full_depth(model), "low": {"threshold": 0.2}, "default": {}}
    points = measure_points(model, examples, settings, repeats=2)
    assert list(points) == list(settings)
    assert [point.threshold for point, _ in points.values()] == [None, 0.2, 0.5]
    for name, (point, result) in points.items():
        again = model.run(examples.texts, **settings[name])
        tiny.assert_same(result, again)
        assert point.accuracy == (again.label_ids == examples.label_ids).float().mean()
        assert point.mean_depth == again.stats.mean_depth and len(point.timing.seconds) == 2
        assert json.loads(json.dumps(point.to_dict()))["name"] == name
    assert points["full depth"][0].exit_histogram[tiny.NUM_LAYERS] == 30


def test_judge_gives_f1_for_two_classes_only(model, examples):
    result = model.run(examples.texts)
    timing = Timing((1.0,))
    assert judge("x", 0.5, examples, result, timing).f1 is None
    two = Examples(examples.texts, result.label_ids.clamp(max=1), ("no", "yes"))
    assert 0 <= judge("x", 0.5, two, result, timing).f1 <= 1


def test_label_ids_are_translated_by_name(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": "query"}\n')
    (tmp_path / "labels.json").write_text(json.dumps(["index", "query", "never used"]))
    examples = labelled_examples(tmp_path, LABELS)
    assert [LABELS[i] for i in examples.label_ids.tolist()] == ["index", "query"]
    assert examples.labels == LABELS
    (tmp_path / "labels.json").write_text(json.dumps(["spam", "query"]))
    with pytest.raises(ValueError, match="rows labelled spam"):
        labelled_examples(tmp_path, LABELS)


def test_labels_without_names_are_the_checkpoints(tmp_path):
    file = tmp_path / "rows.tsv"
    file.write_text("text\tlabel\na\t2\nb\tquery\n")
    assert labelled_examples(file, LABELS).label_ids.tolist() == [2, 0]
    file.write_text("text\tlabel\na\t3\n")
    with pytest.raises(ValueError, match=r"label '3' is neither in 0\.\.2"):
        labelled_examples(file, LABELS)


def test_labels_of_the_hub_are_translated_by_name(monkeypatch):
    asked = []

    def load(source, labels=None):
        asked.append((source, labels))
        return Examples(["a", "b"], torch.tensor([0, 1]), names if labels is None else tuple(labels))

    monkeypatch.setattr(report, "load_examples", load)
    names = ("join", "query")
    assert labelled_examples("hub:user/data", LABELS, "dev").label_ids.tolist() == [1, 0]
    names = ("0", "1")
    assert labelled_examples("hub:user/data:gold", LABELS).label_ids.tolist() == [0, 1]
    hub, gold = "hub:user/data:validation", "hub:user/data:gold"
    assert asked == [(hub, None), (gold, None), (gold, LABELS)]


def test_the_split_of_a_folder_is_found_or_explained(tmp_path):
    (tmp_path / "validation.csv").write_text("text,label\na,0\n")
    assert len(labelled_examples(tmp_path, LABELS, "dev")) == 1
    with pytest.raises(ValueError, match="one test file .*it holds none"):
        labelled_examples(tmp_path, LABELS)
    (tmp_path / "dev.jsonl").write_text('{"text": "a", "label": 0}\n')
    with pytest.raises(ValueError, match=r"which file is dev\? Keep one of \['dev.jsonl', 'validation.csv'\]"):
        labelled_examples(tmp_path, LABELS, "dev")


@pytest.mark.parametrize(
    "card, found", [("NVIDIA H100 80GB HBM3", 3.35e12), ("NVIDIA H200", 4.8e12), ("NVIDIA A100", 3.35e12)]
)
def test_the_bandwidth_is_the_cards_own(monkeypatch, card, found):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert memory_bandwidth("cuda") == found and memory_bandwidth(torch.device("cpu")) == 3.35e12


def test_environment_is_json_and_names_no_folder():
    record = json.dumps(environment())
    assert json.loads(record)["torch"] == torch.__version__
    for folder in (Path.cwd(), Path.home(), Path(engine.__file__).parent, Path(torch.__file__).parent):
        assert str(folder) == "/" or str(folder) not in record


@pytest.mark.parametrize("terminal", [False, True])
def test_tables_hold_every_figure(model, examples, terminal):
    settings = {"full depth": full_depth(model), "threshold 0.5": {}}
    points = [point for point, _ in measure_points(model, examples, settings, repeats=1).values()]
    text = shown(show_points, points, "title", terminal=terminal)
    for point in points:
        line = next(line for line in text.splitlines() if point.name in line)
        assert f"{point.accuracy:.4f}" in line and f"{point.mean_depth:.2f}" in line
    ratio = points[0].timing.median / points[1].timing.median
    assert f"{ratio:.2f}" in text
    histogram = shown(show_histogram, points[1].exit_histogram, "title", terminal=terminal)
    assert all(str(count) in histogram for count in points[1].exit_histogram.values())


def test_histogram_of_no_rows():
    assert "0.0 %" in shown(show_histogram, {1: 0, 2: 0}, "nothing")
