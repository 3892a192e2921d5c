"""The decoder's benchmark on a small random model: what it writes, and that its arithmetic is what it says."""

from __future__ import annotations

import json
import sys

import pytest

from engine.bench import decoder_cpu
from engine.loading import load_backbone, save_checkpoint
from tests.decoding.tiny import byte_tokenizer, tiny_decoder


@pytest.mark.parametrize("layers, mean", [(30, 15), (30, 10), (12, 6), (5, 2.5)])
def test_spread_has_its_mean(layers, mean):
    script = decoder_cpu.spread(layers, 200, mean)
    assert script[0] == layers and len(script) == 200 and 1 <= min(script) and max(script) <= layers
    assert sum(script[1:]) / 199 == pytest.approx(mean, abs=0.6)
    assert len(set(script[1:])) >= min(layers, 2 * mean) - 2


def test_a_whole_run(tmp_path, monkeypatch):
    folder = tmp_path / "lm"
    tiny_decoder(vocab=258, positions=1100).language_model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert load_backbone(folder).config.num_hidden_layers == 5
    output = tmp_path / "out.json"
    command = ["decoder_cpu", "--backbone", str(folder), "--new-tokens", "6", "--repeats", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    decoder_cpu.main()
    result = json.loads(output.read_text())
    timing = {row["name"]: row for row in result["rows"]["timing"]}
    assert len(result["figures"]) == 5 and result["backbone"]["sha256"]
    assert all(len(row["decode_s"]) == 2 and row["ms_per_token"] > 0 for row in timing.values())
    full, half = (timing[name]["decode_s"] for name in ("exits removed", "all at L/2"))
    share, found = result["rows"]["head_share"], next(f for f in result["figures"] if f["name"].startswith("all at"))
    ratios = sorted(a / b for a, b in zip(full, half, strict=True))
    assert found["mean_depth"] == 2
    assert found["value"] == pytest.approx(sum(ratios) / 2 * (share + (1 - share) * 2 / 5))


def test_the_question_is_a_chat_where_there_is_a_template():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(decoder_cpu.prompt_ids(tokenizer)) == f"u:{decoder_cpu.QUESTION};a:"
    tokenizer.chat_template = None
    assert tokenizer.decode(decoder_cpu.prompt_ids(tokenizer)) == decoder_cpu.QUESTION


def test_a_checkpoint_decides_for_itself(tmp_path, monkeypatch):
    save_checkpoint(tiny_decoder(vocab=258, positions=300, seed=3), tmp_path / "ck", byte_tokenizer())
    output = tmp_path / "out.json"
    options = ["--checkpoint", str(tmp_path / "ck"), "--new-tokens", "6", "--repeats", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["decoder_cpu", *options])
    decoder_cpu.main()
    result = json.loads(output.read_text())
    assert result["checkpoint"] == "ck" and result["backbone"] is None
    assert result["prompt"] == f"u:{decoder_cpu.QUESTION};a:"
    found = [f for f in result["figures"] if "(trained exits)" in f["name"]]
    assert [f["name"].partition(":")[0] for f in found] == [
        "its policies decide, threshold 0.5",
        "its policies decide, threshold 0.2",
        "its policies decide, threshold 0.05",
    ]
    assert found[2]["mean_depth"] <= found[0]["mean_depth"]
