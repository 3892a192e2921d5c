import io

import pytest
from rich.console import Console

from engine.console import printable, say, show_table


def shown(*arguments, terminal=False, width=60, **options):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    show_table(console, *arguments, **options)
    return console.file.getvalue()


def test_in_a_pipe_columns_are_aligned_and_never_cut():
    long = "word " * 50 + "end"
    text = shown(["name", "n", "text"], [["a", "10", long], ["bcdefg", "2", "x"]], left=("name", "text"), title="T")
    assert text.splitlines() == ["T", "name     n  text", f"a       10  {long}", "bcdefg   2  x"]


def test_on_a_terminal_figures_are_never_wrapped():
    text = shown(["setting", "time"], [["x " * 60, "123.4 ms"]], terminal=True, width=40)
    assert "123.4 ms" in text
    assert all(len(line) <= 40 for line in text.splitlines())


@pytest.mark.parametrize("terminal", [False, True])
def test_markup_and_control_characters_are_only_text(terminal):
    text = shown(["text"], [["[red]a[/red]\x1b[2J\tb\u202ec"]], terminal=terminal, left=("text",))
    assert "[red]a[/red] [2J b c" in text


def test_a_table_without_rows_keeps_its_heading():
    assert shown(["a", "b"], []).split() == ["a", "b"]


def test_say_and_printable():
    console = Console(file=io.StringIO(), width=10)
    say(console, "[b]a line longer than the console[/b]")
    assert console.file.getvalue() == "[b]a line longer than the console[/b]\n"
    assert printable(" a\r\nb\x00c  ") == "a b c"
