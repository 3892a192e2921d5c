"""Rows from lines of text: what is piped into ``consistentee run``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

Row = str | tuple[str, str]


def read_rows(lines: Iterable[bytes], pair: bool) -> list[Row]:
    """Rows of all lines that are not blank; every error names its line.

    A line is a text, or a JSON object with "text" (or "text_a" and "text_b"). ``pair``: rows are pairs, plain lines
    hold a tab between the two. Rows must all be single texts, or all pairs.
    """
    rows: list[Row] = []
    blank: list[int] = []
    objects = 0
    for number, line in enumerate(lines, start=1):
        place = f"stdin, line {number}"
        text = _decode(line, number, place)
        if not text.strip():
            blank.append(number)
            continue
        record = _json_object(text)
        if record is not None:
            objects += 1
            row = _from_object(record, pair, place)
        elif objects and text.lstrip().startswith("{"):
            raise ValueError(f"{place}: starts like the JSON objects before it, but is none")
        else:
            row = _from_text(text, pair, place)
        if rows and isinstance(row, tuple) != isinstance(rows[0], tuple):
            raise ValueError(f"{place}: rows must all be single texts, or all pairs; the first row is the other kind")
        rows.append(row)
    if blank:
        lines_were = "1 empty line" if len(blank) == 1 else f"{len(blank)} empty lines"
        print(f"skipped {lines_were} of stdin, the first is line {blank[0]}", file=sys.stderr)
    return rows


def _decode(line: bytes, number: int, place: str) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8: {error}") from None


def _json_object(line: str) -> dict[str, Any] | None:
    """The object that a line holds; None for any other line, which is a text even where it starts with a brace."""
    if not line.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _from_object(record: dict[str, Any], pair: bool, place: str) -> Row:
    fields = ("text_a", "text_b") if pair or "text" not in record else ("text",)
    for field in fields:
        if not isinstance(record.get(field), str):
            needed = '"text_a" and "text_b"' if pair else '"text", or "text_a" and "text_b",'
            raise ValueError(f"{place}: a JSON object must have {needed} as strings; it has {sorted(record)}")
    return record["text"] if len(fields) == 1 else (record["text_a"], record["text_b"])


def _from_text(line: str, pair: bool, place: str) -> Row:
    if not pair:
        return line
    parts = line.split("\t")
    if len(parts) != 2:
        raise ValueError(f"{place}: --pair needs two texts with one tab between them, got {len(parts) - 1} tabs")
    return parts[0], parts[1]
