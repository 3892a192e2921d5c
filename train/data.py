"""Labelled text for classification: reading and splitting (engine.train.batching tokenises it).

Files are JSON lines (``.jsonl``), comma separated (``.csv``) or tab separated (``.tsv``), each also as ``.gz``,
UTF-8. CSV follows RFC 4180; TSV knows no quotes (as in GLUE). Every error in a file names file and physical line.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIXES = (".jsonl", ".csv", ".tsv", ".jsonl.gz", ".csv.gz", ".tsv.gz")
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}
HUB_PREFIX = "hub:"
Text = str | tuple[str, str]
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Columns:
    """Field names. A file holds pairs if its first row has both ``text_a`` and ``text_b``, else single texts."""

    text: str = "text"
    text_a: str = "text_a"
    text_b: str = "text_b"
    label: str = "label"


@dataclass(frozen=True, eq=False)
class Examples:
    """texts: all strings, or all pairs of strings. label_ids (N,) int64. labels: the name of every label id."""

    texts: list[str] | list[tuple[str, str]]
    label_ids: Tensor
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def is_pair(self) -> bool:
        return bool(self.texts) and isinstance(self.texts[0], tuple)

    def select(self, indices: Tensor) -> Examples:
        return Examples([self.texts[i] for i in indices.tolist()], self.label_ids[indices], self.labels)

    def sha256(self) -> str:
        """Of all texts, label ids and label names, in their order; wherever and in whatever format they are stored."""
        content = json.dumps([self.texts, self.label_ids.tolist(), self.labels])
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class DataFolder:
    train: Examples
    dev: Examples
    test: Examples | None
    labels: tuple[str, ...]


def load_examples(
    path: str | Path, labels: Sequence[str] | None = None, columns: Columns = Columns()
) -> Examples:
    """Read one file, or one split of a hub data set given as ``hub:owner/name[/configuration][:split]``.

    A label is an id (int) or a name. Names come from ``labels``, else from ``labels.json`` beside the file, else
    from the file: its sorted names, or "0".."max" where it has ids. The hub needs its prefix so that a mistyped
    path never becomes a download. ValueError names file and line (1-based; for the hub, the row).
    """
    if str(path).startswith(HUB_PREFIX):
        name, _, split = str(path)[len(HUB_PREFIX):].partition(":")
        return _hub_examples(_hub_dataset(name, split or "train"), str(path), labels, columns)
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: expected a file ending in one of {SUFFIXES}, or {HUB_PREFIX}owner/name")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; for a data set of the hub write {HUB_PREFIX}owner/name")
    if labels is None and (path.parent / "labels.json").exists():
        labels = _read_labels(path.parent / "labels.json")
    return _to_examples(read_rows(path), str(path), labels, columns)


def load_folder(
    path: str | Path, labels: Sequence[str] | None = None, columns: Columns = Columns()
) -> DataFolder:
    """Read ``train``, ``dev`` (or ``validation``) and, where there is one, ``test`` of a folder.

    Where neither ``labels`` nor ``labels.json`` gives the names, those of train hold for all three. Also takes
    ``hub:owner/name[/configuration]``; a hub test split without gold labels (all -1) counts as absent.
    """
    from_hub = str(path).startswith(HUB_PREFIX)
    splits = _hub_splits(str(path), columns) if from_hub else _folder_splits(Path(path))
    for name in ("train", "dev"):
        if splits[name] is None:
            raise ValueError(f"{path}: no {name} data; expected {' or '.join(SPLIT_NAMES[name])} with {SUFFIXES}")

    def load(source: Any, names: Sequence[str] | None) -> Examples:
        if isinstance(source, Path):
            return load_examples(source, names, columns)
        return _hub_examples(source, str(path), names, columns)

    train = load(splits["train"], labels)
    dev = load(splits["dev"], train.labels)
    test = None if splits["test"] is None else load(splits["test"], train.labels)
    for name, other in (("dev", dev), ("test", test)):
        if other is not None and other.is_pair != train.is_pair:
            raise ValueError(f"{path}: train and {name} must both hold single texts, or both pairs")
    return DataFolder(train, dev, test, train.labels)


def split_file(folder: str | Path, split: str) -> Path | None:
    """The file of ``split`` (train, dev or test) in a folder, None where there is none. ValueError for several."""
    if split not in SPLIT_NAMES:
        raise ValueError(f"split must be one of {', '.join(SPLIT_NAMES)}, got {split!r}")
    places = (Path(folder) / (name + suffix) for name in SPLIT_NAMES[split] for suffix in SUFFIXES)
    files = [place for place in places if place.is_file()]
    if len(files) > 1:
        raise ValueError(f"{folder}: which file is {split}? Keep one of {[file.name for file in files]}")
    return files[0] if files else None


def split_calibration(
    examples: Examples,
    share: float | None = None,
    count: int | None = None,
    seed: int = 0,
    stratified: bool = True,
) -> tuple[Examples, Examples]:
    """Carve a calibration part from train: (the rest, the calibration part), both in source order.

    Give ``share`` in (0, 1) or ``count``. Stratified takes every class in its proportion (largest remainder), and
    never the last row of a class while another can give. Texts that repeat in train may fall on both sides:
    ``drop_leaked(rest, calibration)`` removes them.
    """
    n = len(examples)
    if (share is None) == (count is None):
        raise ValueError(f"give either share or count, got share={share} and count={count}")
    if share is not None and not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1), got {share}")
    size = count if count is not None else round(n * (share or 0))
    if not 1 <= size < n:
        raise ValueError(f"the calibration part must hold 1..{n - 1} of {n} rows, got {size}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if stratified:
        groups = [order[examples.label_ids[order] == label] for label in examples.label_ids.unique()]
        quotas = [len(group) * size / n for group in groups]
        takes = [int(quota) for quota in quotas]
        # A class down to its last row goes to the end of the queue.
        queue = sorted(
            range(len(groups)),
            key=lambda g: (takes[g] + 1 >= len(groups[g]), takes[g] - quotas[g], g),
        )
        for g in queue[: size - sum(takes)]:
            takes[g] += 1
        chosen = torch.cat([group[:take] for group, take in zip(groups, takes, strict=True)])
    else:
        chosen = order[:size]
    held_out = torch.zeros(n, dtype=torch.bool)
    held_out[chosen] = True
    return examples.select((~held_out).nonzero()[:, 0]), examples.select(held_out.nonzero()[:, 0])


def drop_leaked(train: Examples, *others: Examples) -> tuple[Examples, int]:
    """Train without the rows whose text occurs in ``others``, and the number dropped.

    Texts are compared after NFKC, case folding and collapsing white space; a pair must match in both parts.
    """
    seen = {_normalise(text) for other in others for text in other.texts}
    keep = torch.tensor([_normalise(text) not in seen for text in train.texts], dtype=torch.bool)
    return train.select(keep.nonzero()[:, 0]), len(train) - int(keep.sum())


def _to_examples(
    rows: Iterator[tuple[str, Mapping[str, Any]]], source: str, labels: Sequence[str] | None, columns: Columns
) -> Examples:
    """``rows``: (place, row), with ``place`` as it shall stand in errors."""
    texts: list[Any] = []
    found: list[tuple[str, int | str]] = []
    fields: tuple[str, ...] = ()
    for place, row in rows:
        if not fields:
            fields = (columns.text_a, columns.text_b)
            fields = fields if all(field in row for field in fields) else (columns.text,)
        for field in (*fields, columns.label):
            if row.get(field) is None:
                raise ValueError(f"{place}: field {field!r} is missing; the row has {sorted(map(str, row))}")
        for field in fields:
            if not isinstance(row[field], str):
                raise ValueError(f"{place}: field {field!r} must be text, got {type(row[field]).__name__}")
            if _SURROGATE.search(row[field]):
                raise ValueError(f"{place}: field {field!r} has half a surrogate pair, which no tokenizer takes")
        label = row[columns.label]
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise ValueError(f"{place}: field {columns.label!r} must be an int or a name, got {label!r}")
        texts.append(tuple(row[field] for field in fields) if len(fields) == 2 else row[fields[0]])
        found.append((place, label))
    if not texts:
        raise ValueError(f"{source}: there are no rows")
    names = _infer_labels(found, source) if labels is None else _check_labels(labels, source)
    index: dict[int | str, int] = {i: i for i in range(len(names))}
    if not any(_is_id(name) for name in names):  # else the text "1" would be both a name and an id
        index |= {str(i): i for i in range(len(names))}
    index |= {name: i for i, name in enumerate(names)}
    for place, label in found:
        if label not in index:
            raise ValueError(f"{place}: label {label!r} is neither in 0..{len(names) - 1} nor one of {names[:20]}")
    return Examples(texts, torch.tensor([index[label] for _, label in found]), names)


def _infer_labels(found: Sequence[tuple[str, int | str]], source: str) -> tuple[str, ...]:
    if not all(_is_id(label) for _, label in found):
        place = next((place for place, label in found if isinstance(label, int)), None)
        if place is not None:
            raise ValueError(f"{place}: label ids and label names are mixed: give labels or a labels.json")
        return tuple(sorted({str(label) for _, label in found}))
    ids = {int(label): place for place, label in reversed(found)}
    for label, place in ids.items():
        if label < 0:
            raise ValueError(f"{place}: label {label} is negative; rows without a gold label cannot be used")
    if max(ids) != len(ids) - 1:
        raise ValueError(
            f"{source}: label ids {sorted(ids)[:20]} leave gaps below {max(ids)}: give labels or a labels.json"
        )
    return tuple(str(i) for i in range(len(ids)))


def _is_id(label: int | str) -> bool:
    return isinstance(label, int) or re.fullmatch(r"-?[0-9]{1,9}", label) is not None


def _check_labels(labels: Any, source: str) -> tuple[str, ...]:
    valid = isinstance(labels, (list, tuple)) and len(labels) and all(isinstance(name, str) for name in labels)
    if not valid or len(set(labels)) != len(labels):
        raise ValueError(f"{source}: labels must be a list of distinct names, got {labels!r}")
    return tuple(labels)


def _read_labels(path: Path) -> tuple[str, ...]:
    try:
        return _check_labels(json.loads(path.read_text(encoding="utf-8")), str(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None


def read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "jsonl":
        for number, line in enumerate(_lines(path), start=1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{place}: not a JSON line: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{place}: a row must be a JSON object, got {type(row).__name__}")
            yield place, row
        return
    if kind == "tsv":
        reader = csv.reader(_lines(path), strict=True, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(_lines(path), strict=True)
    header: list[str] = []
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{place}: not a row of the table: {error}") from None
        if cells is None:
            return
        if not header:
            header = cells
            if len(set(header)) != len(header):
                raise ValueError(f"{place}: the header repeats a column: {header}")
        elif cells and len(cells) != len(header):
            raise ValueError(f"{place}: {len(cells)} cells, but the header has {len(header)}: {header}")
        elif cells:
            yield place, dict(zip(header, cells, strict=True))


def _lines(path: Path) -> Iterator[str]:
    """Decoded physical lines. Split at the byte \\n only: text mode would also split inside some values."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8: {error}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}:{number + 1}: the gzip file is damaged or cut short: {error}") from None


def _folder_splits(path: Path) -> dict[str, Path | None]:
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; expected one with train and dev files, or {HUB_PREFIX}owner/name")
    return {split: split_file(path, split) for split in SPLIT_NAMES}


def _hub_dataset(name: str, split: str | None) -> Any:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+){0,2}", name):
        raise ValueError(f"{HUB_PREFIX}{name}: expected {HUB_PREFIX}owner/name[/configuration][:split]")
    try:
        from datasets import load_dataset  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError(
            "reading from the hub needs the `datasets` package: pip install 'consistentee[train]', or give files"
        ) from None
    parts = name.split("/")
    return load_dataset("/".join(parts[:2]), *parts[2:], split=split)


def _hub_splits(path: str, columns: Columns) -> dict[str, Any]:
    data = _hub_dataset(path[len(HUB_PREFIX):], None)
    splits = {split: next((data[n] for n in names if n in data), None) for split, names in SPLIT_NAMES.items()}
    test = splits["test"]
    if test is not None and (columns.label not in test.column_names or set(test[columns.label]) == {-1}):
        splits["test"] = None
    return splits


def _hub_examples(dataset: Any, source: str, labels: Sequence[str] | None, columns: Columns) -> Examples:
    if labels is None:
        labels = getattr(dataset.features.get(columns.label), "names", None)
    rows = ((f"{source}, row {number}", row) for number, row in enumerate(dataset, start=1))
    return _to_examples(rows, source, labels, columns)


def _normalise(text: Text) -> Text:
    if isinstance(text, tuple):
        return _normalise(text[0]), _normalise(text[1])  # type: ignore[return-value]
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
