"""``consistentee run`` on a decoder, and what the other commands say of one."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
from rich.console import Console
from rich.text import Text

import engine
from engine import chat as chat_module
from engine.generation import DecoderEngine, StreamedToken
from engine.loading import save_checkpoint
from tests.decoding.tiny import save_talker
from tests.test_cli import call, refused

PROMPTS = ["why is", "the sky"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_talker(tmp_path_factory.mktemp("lm") / "lm")


@pytest.fixture(scope="module")
def lm(checkpoint):
    return engine.load(checkpoint, device="cpu")


def chats(prompts):
    return [[{"role": "user", "content": p}] for p in prompts]


def test_json(checkpoint, lm):
    want = lm.run(chats(PROMPTS), max_new_tokens=9, temperature=0.7, seed=4, threshold=0.3)
    arguments = "--max-new-tokens", 9, "--temperature", 0.7, "--seed", 4, "--threshold", 0.3, "--json"
    piped = call("run", checkpoint, *arguments, stdin="\n".join(PROMPTS) + "\n\n")
    for result in (call("run", checkpoint, *PROMPTS, *arguments), piped):
        records = [json.loads(line) for line in result.stdout.splitlines()]
        assert [r["prompt"] for r in records] == PROMPTS
        assert [r["text"] for r in records] == want.texts and [r["token_ids"] for r in records] == want.token_ids
        assert [r["exit_layers"] for r in records] == want.exit_layers
        assert [r["finish_reason"] for r in records] == want.finish_reasons


def visible(text):
    """Random bytes hold all kinds of blanks and control characters, which a console may change."""
    return "".join(c for c in text if c.isprintable() and not c.isspace())


@pytest.mark.parametrize("raw", [False, True])
def test_answers_are_streamed(checkpoint, lm, raw):
    prompts = PROMPTS if raw else chats(PROMPTS)
    options = dict(max_new_tokens=12, temperature=1.0, stop=["zz"])
    want = lm.run(prompts, **options)
    flags = ["--raw"] if raw else []
    out = call("run", checkpoint, *PROMPTS, "--max-new-tokens", 12, "--temperature", 1.0, "--stop", "zz", *flags).stdout
    assert visible(out) == "".join(map(visible, want.texts)) != ""


def test_exits_are_shown(checkpoint, lm):
    depths = lm.run(chats(["hi"]), max_new_tokens=9).exit_layers[0][1:]
    out = call("run", checkpoint, "hi", "--max-new-tokens", 9, "--show-exits").stdout
    mean = sum(depths) / len(depths)
    assert out.splitlines()[-1].endswith(f"| mean depth {mean:.1f} of 5 over 8 decoded tokens]")


@pytest.mark.parametrize("flags", [["--show-exits"], []], ids=["shown", "not shown"])
def test_exits_are_colours_on_a_terminal(checkpoint, monkeypatch, flags):
    """One for each depth; none of it without the flag."""
    said = [("first", 5), (" shallow", 1), (" deep", 5), (" middle", 3), (" again", 1)]

    @contextmanager
    def stream(lm, prompt, **options):
        yield [StreamedToken(text, 7, layer, 0.9) for text, layer in said]

    def terminal():  # as Console() is in front of a person
        return Console(force_terminal=True, color_system="truecolor", no_color=False, width=80)

    monkeypatch.setattr(chat_module, "Console", terminal)
    monkeypatch.setattr(DecoderEngine, "stream", stream)
    answer, *legend = call("run", checkpoint, "hi", *flags).stdout.splitlines()
    shown = Text.from_ansi(answer)
    assert shown.plain == "first shallow deep middle again"
    colours = {shown.plain[span.start : span.end]: span.style.color for span in shown.spans}
    if not flags:
        assert not any(colours.values()) and not legend
        return
    assert list(colours) == [text for text, _ in said], "a token is not one colour"
    by_depth = {layer: colours[text] for text, layer in said}
    assert all(colours[text] == by_depth[layer] for text, layer in said)
    assert len(set(by_depth.values())) == 3 and None not in by_depth.values()
    legend = Text.from_ansi(legend[0])
    named = {legend.plain[span.start : span.end]: span.style.color for span in legend.spans}
    assert named["layer 1"] == by_depth[1] and named["layer 5"] == by_depth[5]


def talk(lm, monkeypatch, *asked):
    """A chat of these messages; returns the prompts that they came to."""
    lines, given, stream = iter([*asked, ""]), [], lm.stream
    monkeypatch.setattr(chat_module, "_ask", lambda console: next(lines))
    monkeypatch.setattr(lm, "stream", lambda prompt, **o: (given.append(list(prompt)), stream(prompt, **o))[1])
    chat_module.chat(lm, {"max_new_tokens": 4, "seed": 0}, raw=False, show_exits=False)
    return given[1:]  # the first one only asks whether the options are right


def test_a_chat_keeps_its_messages(lm, monkeypatch, capsys):
    given = talk(lm, monkeypatch, "hi", "and?")
    assert [m["role"] for m in given[1]] == ["user", "assistant", "user"]
    assert given[1][0]["content"] == "hi" and given[1][2]["content"] == "and?"
    assert given[1][1]["content"] == lm.run([given[0]], max_new_tokens=4).texts[0]
    assert "an empty line ends the chat" in capsys.readouterr().out


def test_a_message_that_is_too_long_is_not_kept(lm, monkeypatch, capsys):
    given = talk(lm, monkeypatch, "hi", "x" * 200, "and?", "/reset", "bye")
    assert [m["content"] for m in given[2] if m["role"] == "user"] == ["hi", "and?"]
    assert given[2][:2] == given[1][:2] and len(given[2]) == 3
    assert given[3] == chats(["bye"])[0]
    said = capsys.readouterr().out
    assert said.count("error: prompt 0 has ") == 1 and "this message is not kept: send a shorter one, or /reset" in said


def test_a_chat_with_wrong_options_does_not_begin(lm, monkeypatch):
    monkeypatch.setattr(chat_module, "_ask", lambda console: pytest.fail("somebody was asked"))
    with pytest.raises(ValueError, match="top_p must be above 0"):
        chat_module.chat(lm, {"top_p": 2.0, "seed": 0}, raw=False, show_exits=False)


def test_seeds_of_the_prompts_wrap(checkpoint, lm):
    options = dict(max_new_tokens=5, temperature=1.0)
    want = [lm.run(chats(["hi"]), seed=seed, **options).texts[0] for seed in (2**64 - 1, 0)]
    out = call("run", checkpoint, "hi", "hi", "--max-new-tokens", 5, "--temperature", 1.0, "--seed", 2**64 - 1).stdout
    assert visible(out) == "".join(map(visible, want)) and want[0] != want[1]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["run", "CKPT", "hi", "--pair"], "--pair: for classifiers, and this checkpoint is a decoder"),
        (["run", "CKPT", "hi", "--top-p", "2"], "top_p must be above 0 and at most 1, got 2.0"),
        (["run", "CKPT", "hi", "--executor", "fast"], "executor must be one of auto, packed, reference, graph"),
        (["run", "CKPT", "x" * 200], "and may become"),
        (["eval", "CKPT", "--data", "x.jsonl"], "eval is for classifiers"),
        (["explain", "CKPT", "hi"], "explain is for classifiers"),
    ],
)
def test_what_is_refused(checkpoint, arguments, says):
    assert says in refused(*[checkpoint if a == "CKPT" else a for a in arguments])


def test_a_classifier_refuses_what_is_for_decoders(tmp_path):
    from tests import tiny

    folder = save_checkpoint(tiny.tiny_model(), tmp_path / "c", tiny.tiny_tokenizer())
    said = refused("run", folder, "hi", "--top-k", 3, "--show-exits")
    assert "--top-k, --show-exits: for decoders, and this checkpoint is a classifier" in said


def test_info(checkpoint):
    out = call("info", checkpoint).stdout
    assert "llama, 5 layers, hidden size 32" in out and "lora, rank 3 on the hidden" in out
    facts = json.loads(call("info", checkpoint, "--json").stdout)
    assert facts["early_exit"]["head"] == "lora" and facts["model_type"] == "llama"
