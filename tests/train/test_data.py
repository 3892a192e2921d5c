import gzip
import json
import sys
from collections import Counter

import pytest
import torch

from engine.train.data import (
    Columns,
    Examples,
    drop_leaked,
    load_examples,
    load_folder,
    split_calibration,
    split_file,
)


def write(path, content):
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def examples(*texts, labels=None):
    labels = labels or [0] * len(texts)
    return Examples(list(texts), torch.tensor(labels), tuple(str(i) for i in range(max(labels) + 1)))


# --- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines(tmp_path, name):
    write(tmp_path / "labels.json", '["no", "yes"]')
    rows = jsonl({"text": "näh", "label": 0}, {"text": "aye\u2028aye", "label": "yes"}) + "\n"
    read = load_examples(write(tmp_path / name, rows))
    assert read.texts == ["näh", "aye\u2028aye"] and not read.is_pair
    assert read.label_ids.tolist() == [0, 1] and read.label_ids.dtype == torch.int64
    assert read.labels == ("no", "yes")


def test_pairs_and_columns(tmp_path):
    rows = jsonl({"text_a": "p", "text_b": "h", "label": 0}, {"text_a": "q", "text_b": "i", "label": 1})
    read = load_examples(write(tmp_path / "a.jsonl", rows))
    assert read.texts == [("p", "h"), ("q", "i")] and read.is_pair and read.labels == ("0", "1")
    table = "\ufeffpremise,gold,hypothesis\r\np,b,h\r\n\r\n\"q, \"\"r\"\"\ns\",a,i\r\n"
    columns = Columns(text_a="premise", text_b="hypothesis", label="gold")
    read = load_examples(write(tmp_path / "a.csv", table), columns=columns)
    assert read.texts == [("p", "h"), ('q, "r"\ns', "i")]
    assert read.labels == ("a", "b") and read.label_ids.tolist() == [1, 0]


def test_tsv_has_no_quotes(tmp_path):
    read = load_examples(write(tmp_path / "a.tsv.gz", 'text\tlabel\n"open quote\t1\nplain\t0\n'))
    assert read.texts == ['"open quote', "plain"] and read.label_ids.tolist() == [1, 0]


def test_digit_names_win_over_ids(tmp_path):
    (tmp_path / "b").mkdir()
    path = write(tmp_path / "a.csv", "text,label\nx,1\ny,3\n")
    assert load_examples(path, labels=["1", "2", "3"]).label_ids.tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"a\.csv:2: label '0'"):
        load_examples(write(tmp_path / "b" / "a.csv", "text,label\nx,0\n"), labels=["1", "2", "3"])
    with pytest.raises(ValueError, match="leave gaps below 3"):
        load_examples(path)


GOOD = jsonl({"text": "x", "label": 0})
JSON_FAULTS = [
    ("{not json\n", "not a JSON line"),
    ("[1, 2]\n", "must be a JSON object, got list"),
    (jsonl({"text": "x"}), "field 'label' is missing"),
    (jsonl({"label": 1}), "field 'text' is missing"),
    (jsonl({"text": None, "label": 1}), "field 'text' is missing"),
    (jsonl({"text": 5, "label": 1}), "field 'text' must be text, got int"),
    ('{"text": "\\ud800", "label": 1}\n', "surrogate"),
    (jsonl({"text": "x", "label": 1.0}), "must be an int or a name, got 1.0"),
    (jsonl({"text": "x", "label": True}), "must be an int or a name, got True"),
    (jsonl({"text": "x", "label": 2}), r"label 2 is neither in 0\.\.1"),
    (jsonl({"text": "x", "label": -1}), r"label -1 is neither in 0\.\.1"),
    (jsonl({"text": "x", "label": "maybe"}), "label 'maybe' is neither"),
    (b'{"text": "\xff", "label": 1}\n', "not UTF-8"),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("fault, message", JSON_FAULTS)
def test_faults_name_file_and_physical_line(tmp_path, fault, message, suffix):
    fault = fault if isinstance(fault, bytes) else fault.encode()
    path = write(tmp_path / ("a" + suffix), GOOD.encode() + b"\n" + GOOD.encode() + fault + GOOD.encode())
    with pytest.raises(ValueError, match=rf"a{suffix}:4: .*{message}"):
        load_examples(path, labels=["no", "yes"])


@pytest.mark.parametrize(
    "table, line, message",
    [
        ('text,label\n"two\nlines",0\nshort\n', 4, "1 cells, but the header has 2"),
        ('text,label\nx,0\n"never closed,1\ny,0\n', 3, "not a row of the table"),
        ("text,label\nx,0\n\ny,maybe\n", 4, "label 'maybe'"),
        ("text,text\nx,0\n", 1, "repeats a column"),
        ("sentence,label\nx,0\n", 2, "field 'text' is missing"),
    ],
)
def test_csv_faults_name_the_line_where_the_row_starts(tmp_path, table, line, message):
    with pytest.raises(ValueError, match=rf"a\.csv:{line}: .*{message}"):
        load_examples(write(tmp_path / "a.csv", table), labels=["no", "yes"])


def test_other_file_faults(tmp_path):
    with pytest.raises(ValueError, match="there are no rows"):
        load_examples(write(tmp_path / "a.jsonl", ""))
    with pytest.raises(ValueError, match="expected a file ending in"):
        load_examples(write(tmp_path / "a.txt", "x"))
    with pytest.raises(FileNotFoundError, match="hub:owner/name"):
        load_examples(tmp_path / "absent.jsonl")
    whole = gzip.compress(GOOD.encode() * 5000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz:\d+: .*cut short"):
        load_examples(tmp_path / "cut.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_text(GOOD)
    with pytest.raises(ValueError, match=r"plain\.jsonl\.gz:1: .*damaged"):
        load_examples(tmp_path / "plain.jsonl.gz")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: label ids and label names are mixed"):
        load_examples(write(tmp_path / "a.jsonl", jsonl({"text": "x", "label": "a"}, {"text": "x", "label": 0})))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: label -1 is negative"):
        load_examples(write(tmp_path / "a.jsonl", jsonl({"text": "x", "label": -1}) * 2))
    write(tmp_path / "labels.json", '{"no": 0}')
    with pytest.raises(ValueError, match=r"labels\.json: labels must be a list of distinct names"):
        load_examples(write(tmp_path / "a.jsonl", GOOD))


# --- folders and the hub ---------------------------------------------------------------------------------------


def test_folder(tmp_path):
    write(tmp_path / "train.jsonl.gz", jsonl({"text": "x", "label": "b"}, {"text": "y", "label": "a"}))
    write(tmp_path / "validation.csv", "text,label\nz,b\n")
    folder = load_folder(tmp_path)
    assert folder.labels == ("a", "b") and folder.test is None
    assert folder.dev.label_ids.tolist() == [1]  # train's names, although dev alone would give ("b",)
    write(tmp_path / "dev.csv", "text,label\nz,b\n")
    with pytest.raises(ValueError, match=r"which file is dev\? Keep one of \['dev.csv', 'validation.csv'\]"):
        load_folder(tmp_path)


def test_split_file(tmp_path):
    dev = write(tmp_path / "validation.tsv.gz", "text\tlabel\nz\t0\n")
    assert split_file(tmp_path, "dev") == split_file(str(tmp_path), "dev") == dev
    assert split_file(tmp_path, "train") is None and split_file(tmp_path / "absent", "train") is None
    write(tmp_path / "dev.jsonl", GOOD)
    with pytest.raises(ValueError, match="which file is dev"):
        split_file(tmp_path, "dev")
    with pytest.raises(ValueError, match="split must be one of train, dev, test, got 'validation'"):
        split_file(tmp_path, "validation")


def test_sha256_is_of_the_content():
    one = examples("a", "b", labels=[0, 1])
    assert one.sha256() == examples("a", "b", labels=[0, 1]).sha256()
    others = [examples("b", "a", labels=[0, 1]), examples("a", "b", labels=[1, 0]), examples(("a", "b"), labels=[1]),
              examples("a", "b", labels=[0, 2]), Examples(one.texts, one.label_ids, ("no", "yes"))]
    assert len({x.sha256() for x in [one, *others]}) == 6


def test_folder_faults(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        load_folder(tmp_path / "absent")
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(ValueError, match="no dev data"):
        load_folder(tmp_path)
    write(tmp_path / "dev.jsonl", jsonl({"text_a": "x", "text_b": "y", "label": 0}))
    with pytest.raises(ValueError, match="both hold single texts, or both pairs"):
        load_folder(tmp_path)


def test_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    splits = datasets.DatasetDict({
        name: datasets.Dataset.from_dict({"sentence": ["x", "y"], "label": labels}, features=features)
        for name, labels in (("train", [1, 0]), ("validation", [1, 1]), ("test", [-1, -1]))
    })
    asked = []

    def load_dataset(*parts, split):
        asked.append((*parts, split))
        return splits[split] if split else splits

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read = load_examples("hub:owner/name/sst2:validation", columns=Columns(text="sentence"))
    assert asked == [("owner/name", "sst2", "validation")]
    assert read.labels == ("bad", "good") and read.label_ids.tolist() == [1, 1]
    folder = load_folder("hub:owner/name", columns=Columns(text="sentence"))
    assert folder.train.label_ids.tolist() == [1, 0] and folder.test is None
    with pytest.raises(ValueError, match="hub:owner/name:test, row 1: label -1"):
        load_examples("hub:owner/name:test", columns=Columns(text="sentence"))


def test_hub_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'consistentee\[train\]'"):
        load_examples("hub:owner/name")


# --- splitting -------------------------------------------------------------------------------------------------


def test_split_is_stratified_deterministic_and_a_partition():
    labels = [0] * 60 + [1] * 30 + [2] * 10
    whole = examples(*(f"row {i}" for i in range(100)), labels=labels)
    rest, held_out = split_calibration(whole, share=0.2, seed=1)
    assert Counter(held_out.label_ids.tolist()) == {0: 12, 1: 6, 2: 2}
    assert sorted(rest.texts + held_out.texts) == sorted(whole.texts)
    assert held_out.texts == sorted(held_out.texts, key=whole.texts.index) and held_out.labels == whole.labels
    assert split_calibration(whole, share=0.2, seed=1)[1].texts == held_out.texts
    assert split_calibration(whole, share=0.2, seed=2)[1].texts != held_out.texts


def test_split_leaves_the_last_row_of_a_class_in_train():
    whole = examples(*map(str, range(25)), labels=[0] * 12 + [1] * 12 + [2])  # shares of 15: 7.2, 7.2, 0.6
    assert Counter(split_calibration(whole, count=15)[1].label_ids.tolist()) == {0: 8, 1: 7}


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("count", [1, 7, 50, 99])
def test_split_gives_exactly_the_count(count, stratified):
    whole = examples(*map(str, range(100)), labels=[i % 7 for i in range(100)])
    rest, held_out = split_calibration(whole, count=count, stratified=stratified)
    assert (len(rest), len(held_out)) == (100 - count, count)


@pytest.mark.parametrize("options", [{}, {"share": 0.5, "count": 1}, {"share": 1.0}, {"count": 0}, {"count": 4}])
def test_split_refuses(options):
    with pytest.raises(ValueError):
        split_calibration(examples("a", "b", "c", "d"), **options)


def test_drop_leaked():
    train = examples("Hello  World", "kept", "Straße", "ﬁne", "hello", labels=[0, 1, 0, 0, 0])
    kept, dropped = drop_leaked(train, examples("hello world", "STRASSE"), examples("fine"))
    assert kept.texts == ["kept", "hello"] and dropped == 3
    assert kept.label_ids.tolist() == [1, 0] and kept.labels == train.labels
    pairs = examples(("A", "b"), ("b", "a"))
    assert drop_leaked(pairs, examples(("a", "B")))[0].texts == [("b", "a")]
    assert drop_leaked(train)[1] == 0
