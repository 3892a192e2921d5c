"""``consistentee run`` on a decoder: prompts from arguments, lines or a person; answers as they come."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from engine.decoding.requests import SEEDS
from engine.generation import DecoderEngine, TokenStream

_SHALLOW, _DEEP = (0, 170, 80), (220, 60, 40)
_RESET = "/reset"


def answer_prompts(
    lm: DecoderEngine, prompts: list[str], options: dict[str, Any], raw: bool, as_json: bool, show_exits: bool
) -> None:
    """Continue every prompt on stdout: all at once as JSON objects, or one after the other as tokens come."""
    if as_json:
        out = lm.run([_prompt(lm, [_message("user", p)], raw) for p in prompts], progress=False, **options)
        for k, prompt in enumerate(prompts):
            record = {
                "prompt": prompt,
                "text": out.texts[k],
                "token_ids": out.token_ids[k],
                "exit_layers": out.exit_layers[k],
                "finish_reason": out.finish_reasons[k],
            }
            print(json.dumps(record))
        return
    console = Console()
    for k, prompt in enumerate(prompts):
        if k:
            console.print()
            options = {**options, "seed": (options["seed"] + 1) % SEEDS}  # as in one run: row k draws from seed + k
        _tell(console, lm, lm.stream(_prompt(lm, [_message("user", prompt)], raw), **options), show_exits)


def chat(lm: DecoderEngine, options: dict[str, Any], raw: bool, show_exits: bool) -> None:
    """A conversation on a terminal, until end of file. Ctrl-C ends an answer, /reset forgets what has been said.

    A message that cannot be answered, most often because all of them have become too long, is not kept.
    """
    lm.stream([0], **options).close()  # a wrong option is said before anybody is asked
    console = Console()
    messages: list[dict[str, str]] = []
    console.print(Text(f"{lm!r}\nan empty line ends the chat, {_RESET} begins it anew", style="dim"))
    while (asked := _ask(console)).strip():
        if asked.strip() == _RESET:
            messages = []
            continue
        said = [*messages, _message("user", asked)]
        try:
            tokens = lm.stream(_prompt(lm, said, raw), **options)
        except ValueError as error:
            advice = f"this message is not kept: send a shorter one, or {_RESET}"
            console.print(Text(f"error: {error}\n{advice}", style="red"), soft_wrap=True)
            continue
        messages = [*said, _message("assistant", _tell(console, lm, tokens, show_exits))]


def _ask(console: Console) -> str:
    try:
        return console.input("> ")
    except EOFError:
        return ""


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _prompt(lm: DecoderEngine, messages: list[dict[str, str]], raw: bool) -> Any:
    """Chat messages where the tokenizer has a template, else the last one's text."""
    if raw or getattr(lm.tokenizer, "chat_template", None) is None:
        return messages[-1]["content"]
    return messages


def _tell(console: Console, lm: DecoderEngine, stream: TokenStream, show_exits: bool) -> str:
    """Print a continuation token by token; returns its text."""
    text, layers = "", []
    with stream as tokens:
        try:
            for token in tokens:
                text += token.text
                layers.append(token.exit_layer)
                style = _style(token.exit_layer, lm.config.num_layers) if show_exits else ""
                console.print(Text(token.text, style=style), end="", soft_wrap=True, highlight=False)
        except KeyboardInterrupt:
            pass
    console.print()
    if show_exits and len(layers) > 1:
        console.print(*_legend(layers[1:], lm.config.num_layers), soft_wrap=True, highlight=False)
    return text


def _style(layer: int, num_layers: int) -> Style:
    share = (layer - 1) / max(num_layers - 1, 1)
    mixed = (round(a + (b - a) * share) for a, b in zip(_SHALLOW, _DEEP, strict=True))
    return Style(color=Color.from_rgb(*mixed))


def _legend(layers: list[int], num_layers: int) -> Iterator[Text]:
    mean = sum(layers) / len(layers)
    yield Text("[")
    for layer in sorted({1, num_layers // 2, num_layers}):
        yield Text(f"layer {max(layer, 1)}", style=_style(max(layer, 1), num_layers))
    yield Text(f"| mean depth {mean:.1f} of {num_layers} over {len(layers)} decoded tokens]")


def read_prompts() -> list[str] | None:
    """Lines that are piped in, blank ones left out; None on a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    lines = (line.rstrip("\r\n") for line in sys.stdin)
    return [line for line in lines if line.strip()]
