import pytest

from engine.lines import read_rows


def rows(text, pair=False):
    return read_rows((text if isinstance(text, bytes) else text.encode()).splitlines(keepends=True), pair)


def test_texts_keep_their_inner_and_outer_blanks():
    assert rows(" a \tb\r\nc") == [" a \tb", "c"]


def test_a_byte_order_mark_is_no_text():
    assert rows(b"\xef\xbb\xbfa\nb\n") == ["a", "b"]


def test_objects_and_plain_lines_may_be_mixed():
    assert rows('plain\n{"text": "b"}\n  {"text": "c", "id": 1}\n') == ["plain", "b", "c"]


def test_braces_alone_do_not_make_an_object():
    assert rows("{braces} in a text\n[1]\n") == ["{braces} in a text", "[1]"]
    with pytest.raises(ValueError, match="line 2: starts like"):
        rows('{"text": "a"}\n{braces}\n')


def test_pairs():
    assert rows('a\tb\n{"text_a": "c", "text_b": "d"}\n', pair=True) == [("a", "b"), ("c", "d")]
    assert rows('{"text_a": "c", "text_b": "d"}\n') == [("c", "d")]
    for text in ("a\n", "a\tb\tc\n", '{"text": "a"}\n', '{"text_a": "a", "text_b": 1}\n'):
        with pytest.raises(ValueError, match="stdin, line 1: "):
            rows(text, pair=True)


def test_blank_lines_are_skipped_aloud(capsys):
    assert rows("a\n\n \nb\n") == ["a", "b"]
    assert capsys.readouterr() == ("", "skipped 2 empty lines of stdin, the first is line 2\n")
