import io
import json

import pytest
from rich.console import Console

import engine
from engine.bench import demo
from engine.loading import save_checkpoint
from tests import tiny

pytest.importorskip("matplotlib")


def printed(checkpoint, output, rows):
    console = Console(file=io.StringIO(), width=100)
    result = demo.run_demo(str(checkpoint), str(output), rows, console, Console(file=io.StringIO()))
    return result, console.file.getvalue()


def check(result, text, output, rows):
    assert result.full.rows == result.chosen.rows == rows
    assert result.full.saved_layers == 0
    assert [p.threshold for p in result.curve] == sorted({*demo.THRESHOLDS, result.chosen.threshold})
    assert result.chosen in result.curve
    for figure in (
        f"{result.full.accuracy:.4f} at full depth, {result.chosen.accuracy:.4f} with exits",
        f"saved layers     {100 * result.chosen.saved_layers:.1f} %",
        f"t_full / t_exit  {result.full.timing.median / result.chosen.timing.median:.2f}",
        "tokenisation",
        str(output),
    ):
        assert figure in text
    assert text.count("      gold ") == min(rows, demo.EXAMPLES)
    assert output.read_bytes().startswith(b"\x89PNG")


def test_demo_of_an_untrained_model(tmp_path):
    labels = json.loads((demo.DATA / "labels.json").read_text())
    model = tiny.tiny_model(labels=tuple(labels))
    checkpoint = save_checkpoint(model, tmp_path / "tiny", tiny.tiny_tokenizer())
    check(*printed(checkpoint, tmp_path / "curve.png", 12), tmp_path / "curve.png", 12)
    with pytest.raises(ValueError, match="between 1 and 1000"):
        printed(checkpoint, tmp_path / "curve.png", 1001)


def test_demo_of_the_shipped_checkpoint(tmp_path):
    try:
        engine.load(demo.find_checkpoint(demo.CHECKPOINT))
    except OSError as error:
        pytest.skip(f"{demo.CHECKPOINT} cannot be loaded here: {error}")
    result, text = printed(demo.CHECKPOINT, tmp_path / "curve.png", 40)
    check(result, text, tmp_path / "curve.png", 40)
    assert result.full.accuracy > 0.7 and result.chosen.saved_layers > 0


def test_the_demo_has_a_name_for_a_checkpoint_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "__file__", str(tmp_path / "site" / "engine" / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="in a checkout of the repository, or give --checkpoint"):
        demo.find_checkpoint(demo.CHECKPOINT)
    (tmp_path / "site" / demo.CHECKPOINT).mkdir(parents=True)
    assert demo.find_checkpoint(demo.CHECKPOINT) == str(tmp_path / "site" / demo.CHECKPOINT)
    assert demo.find_checkpoint("user/model") == "user/model"


def test_examples_mix_early_middle_and_late():
    assert demo.example_rows([6, 1, 3, 1, 2, 5, 4]) == [1, 4, 2, 5, 0]
    assert demo.example_rows([2] * 5 + [4] * 5) == [0, 1, 2, 5, 6]
    assert demo.example_rows([3] * 9) == [0, 1, 2, 3, 4]
    assert demo.example_rows([3, 1]) == [1, 0]
    assert demo.example_rows([1, 4, 4, 4, 4, 4]) == [0, 1, 2, 3, 4]
    assert demo.example_rows([]) == []
