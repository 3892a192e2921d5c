"""Decoder on a GPU at LLaMA's shapes: what exits cost and save, against full depth, eager copying and Hugging Face.

    python -m engine.bench.decoder_h100 [--shape 7b] [--batches 1 8 32 64]
    python -m engine.bench.decoder_h100 --batches 1 --gpt-fast FOLDER
    python -m engine.bench.decoder_h100 --checkpoint checkpoints/dolly-smollm2 --output FILE
    python -m engine.bench.decoder_h100 --merge FILE ...

writes ``bench/results/decoder_h100.json``. Weights are random: time does not depend on them. Exits stand at every layer
and are scripted, each exit's policy is computed all the same. Prompts of 128 tokens, 256 new ones; competitors take
turns in one run, a time is that of decoding, draws included, the prompts' own pass left out (of Hugging Face's calls:
the time of a call for fewer tokens taken off). ``--gpt-fast`` adds gpt-fast at batch 1, from a checkout of it; where it
fails, its row says why. With ``--checkpoint`` weights are real and its policies decide, on prompts of random tokens.
``--merge`` puts the rows of several files into one; each says of which commit it is.

Ceiling of a step: the bytes of the layers that any of its rows visits, of keys and values of the rows that visit them
and of the head, at the memory's bandwidth.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from engine.bench import gpt_fast
from engine.bench.decoder_cpu import spread
from engine.bench.encoder_competitors import one_line
from engine.bench.record import RESULTS, figure, merged, same_in_all, write_result
from engine.bench.report import memory_bandwidth
from engine.config import DecoderExitConfig
from engine.decoding.packed import cache_shape
from engine.generation import DecoderEngine
from engine.loading import load_model
from engine.models.decoder import MultiExitDecoder

SHAPES = {
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=32, vocab_size=32000),
    "13b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
                num_key_value_heads=40, vocab_size=32000),
    "tiny": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=101),
}  # fmt: skip
REMOVED, NOBODY, HALF = "exits removed", "nobody leaves", "spread, mean depth L/2"
TRAINED, EAGER = "trained model's exits", "eager copying, mean depth L/2"
DECIDED = "its policies decide"
THEIRS = "Hugging Face, static cache, compiled"
GPT_FAST = "gpt-fast"


def random_decoder(shape: str, device: torch.device, dtype: torch.dtype, positions: int) -> MultiExitDecoder:
    """Exits at every layer of a random LLaMA whose activations keep their size from layer to layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES[shape]
    config = LlamaConfig(**sizes, max_position_embeddings=positions, tie_word_embeddings=False, pad_token_id=None,
                         initializer_range=sizes["hidden_size"] ** -0.5)  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            layers = sizes["num_hidden_layers"]
            exits = DecoderExitConfig(layers, tuple(range(1, layers + 1)), head="shared", max_length=positions)
            return MultiExitDecoder(LlamaForCausalLM(config), exits).eval()
    finally:
        torch.set_default_dtype(before)


def trained_exits(share: dict[int, float], trained: int, layers: int, tokens: int, seed: int) -> list[int]:
    """Exit layers drawn from a trained model's distribution, scaled to another depth; the first token at full depth."""
    places = [min(layers, max(1, round(layer * layers / trained))) for layer in share]
    weights = np.array(list(share.values()))
    drawn = np.random.default_rng(seed).choice(places, tokens - 1, p=weights / weights.sum())
    return [layers, *drawn.tolist()]


def shipped_share() -> tuple[dict[int, float], int]:
    """Exit layers of the shipped decoder's test tokens, and its depth."""
    folder = Path(__file__).resolve().parent.parent / "checkpoints" / "dolly-smollm2"
    exits = json.loads((folder / "config.json").read_text())["early_exit"]
    result = json.loads((folder / "training.json").read_text())["result"]["test"]
    share = result["points"][f"{exits['threshold']:g}"]["exit_share"]
    return dict(zip(exits["exit_layers"], share, strict=True)), exits["num_layers"]


def ceiling_bytes(model: MultiExitDecoder, exit_layers: Sequence[Sequence[int]], prompt: int) -> float:
    """Of all steps together: see the module."""
    hf = model.language_model.config
    item, shape = torch.finfo(model.dtype).bits // 8, cache_shape(model)
    one = sum(p.numel() for p in model.backbone.layers[0].parameters()) * item
    position = 2 * shape.kv_heads * shape.head_dim * item
    total = 0.0
    for step, depths in enumerate(list(zip(*exit_layers, strict=True))[1:], start=1):
        total += max(depths) * one + sum(depths) * (prompt + step) * position + hf.vocab_size * hf.hidden_size * item
    return total


def hugging_face(model: MultiExitDecoder, ids: torch.Tensor, new: int) -> Callable[[], float]:
    """Seconds of decoding new - 1 tokens by ``generate`` with a static cache, whose step transformers compiles."""
    lm = model.language_model
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, cache_implementation="static")

    def timed(count: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        lm.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    few = max(2, new // 8)
    return lambda: (timed(new) - timed(few)) * (new - 1) / (new - few)


def ours(lm: DecoderEngine, prompts: list[list[int]], new: int, **options: Any) -> Callable[[], float]:
    """Seconds of decoding new - 1 tokens of every prompt."""
    return lambda: lm.run(prompts, max_new_tokens=new, ignore_eos=True, progress=False, **options).stats.decode_s


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What the calls return, taking turns; a round before is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            taken = run()
            if turn:
                seconds[name].append(taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--checkpoint", type=Path, help="a decoder checkpoint instead of a shape")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without", nargs="*", choices=(EAGER, THEIRS), default=[], help="competitors to leave out")
    parser.add_argument("--gpt-fast", type=Path, metavar="FOLDER", help="a checkout of meta-pytorch/gpt-fast")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="combine results; nothing is measured")
    parser.add_argument("--output", type=Path, default=RESULTS / "decoder_h100.json")
    o = parser.parse_args()
    if o.merge is not None:
        merge(o.merge, o.output)
        return
    if o.gpt_fast is not None:
        gpt_fast.check(o.gpt_fast)

    device = torch.device(o.device)
    on_gpu = device.type == "cuda"
    dtype = torch.float16 if on_gpu else torch.float32
    torch.manual_seed(0)
    positions = -(-(o.prompt + o.new_tokens) // 16) * 16
    if o.checkpoint is None:
        model, shape = random_decoder(o.shape, device, dtype, positions), o.shape
    else:
        model, shape = load_model(str(o.checkpoint))[0].to(device, dtype).eval(), o.checkpoint.name
    layers, new = model.config.num_layers, o.new_tokens
    room = _cache_bytes(model, max(o.batches), positions)
    lm = DecoderEngine(model, executor="graph", private=True, cache_bytes=room)
    share, trained = shipped_share()
    rows: list[dict[str, Any]] = []
    for batch in o.batches:
        prompts = torch.randint(0, model.language_model.config.vocab_size, (batch, o.prompt)).tolist()
        settings: dict[str, dict[str, Any]] = {REMOVED: {"min_depth": layers}}
        scripts = {}
        if o.checkpoint is None:
            scripts[TRAINED] = [trained_exits(share, trained, layers, new, row) for row in range(batch)]
        else:
            settings[DECIDED] = {}
        if batch == 1:
            settings[NOBODY] = {"threshold": 1.0}
        if batch == 1 and o.checkpoint is None:
            scripts[HALF] = [spread(layers, new, layers / 2)]
        settings |= {name: {"criterion": "scripted", "exit_layers": script} for name, script in scripts.items()}
        runs = {name: ours(lm, prompts, new, **options) for name, options in settings.items()}
        few = max(4, new // 16)  # slow, and in the end a time for each token
        if batch == 1 and o.checkpoint is None and EAGER not in o.without:
            eager = DecoderEngine(model, executor="packed", state_copy="eager", private=True, cache_bytes=room)
            script = {"criterion": "scripted", "exit_layers": [spread(layers, few, layers / 2)]}
            runs[EAGER] = ours(eager, prompts, few, **script)
        if batch == 1 and THEIRS not in o.without and on_gpu:
            runs[THEIRS] = hugging_face(model, torch.tensor(prompts, device=device), new)
        notes = {}
        if batch == 1 and o.gpt_fast is not None:
            notes[GPT_FAST] = gpt_fast.described(o.gpt_fast, compiled=on_gpu)
            ids = torch.tensor(prompts, device=device)
            try:
                runs[GPT_FAST] = gpt_fast.decoding(
                    o.gpt_fast, model.language_model.config, ids, new, dtype, compiled=on_gpu
                )
            except Exception as error:
                rows.append({"shape": shape, "batch": batch, "name": GPT_FAST, "note": notes[GPT_FAST],
                             "error": one_line(error)})  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
        seconds = interleaved(runs, o.rounds)
        for name, times in seconds.items():
            step_ms = 1e3 * median(times) / ((few if name == EAGER else new) - 1)
            row = {"shape": shape, "batch": batch, "name": name, "ms_a_step": step_ms, "decode_s": times,
                   "tokens_a_second": 1e3 * batch / step_ms}  # fmt: skip
            if name in notes:
                row["note"] = notes[name]
            taken = scripts.get(name)
            if name == REMOVED:
                taken = [[layers] * new] * batch
            elif name == DECIDED:
                taken = lm.run(prompts, max_new_tokens=new, ignore_eos=True, progress=False).exit_layers
            if taken is not None:
                row["mean_depth"] = float(np.mean([d[1:] for d in taken]))
                row["ceiling_gb"] = ceiling_bytes(model, taken, o.prompt) / (new - 1) / 1e9
                row["ceiling_ms"] = 1e12 * row["ceiling_gb"] / memory_bandwidth(device)
                row["of_ceiling"] = row["ceiling_ms"] / step_ms
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k != "decode_s"}), flush=True)
    memory = {
        "cache_bytes": lm.run([[1, 2]], max_new_tokens=2).stats.cache_bytes,
        "kv_bytes_a_position": 2 * layers * model.language_model.config.num_key_value_heads
        * model.backbone.layers[0].self_attn.head_dim * torch.finfo(dtype).bits // 8,
        "exit_state_bytes_a_position": model.language_model.config.hidden_size * torch.finfo(dtype).bits // 8,
    }  # fmt: skip
    write_result(o.output, figures(rows), rows, prompt=o.prompt, new_tokens=new, memory={shape: memory})


def merge(files: Sequence[Path], output: Path) -> None:
    """Rows of all files, and the figures that follow from them. ValueError where they were not asked the same."""
    found = [json.loads(file.read_text()) for file in files]
    common = same_in_all(found, ("prompt", "new_tokens"))
    rows, about = merged(files, ("shape", "batch", "name"), rank=lambda row: "error" not in row)
    memory = {shape: value for one in found for shape, value in one["memory"].items()}
    write_result(output, figures(rows), rows, **about, **common, memory=memory)


def _cache_bytes(model: MultiExitDecoder, rows: int, positions: int) -> int:
    shape = cache_shape(model)
    return shape.block_bytes(model.dtype) * rows * -(-positions // shape.block_size)


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bars are for LLaMA-7B's shape, of which names say nothing; other models have figures without."""
    out = []
    for shape, batch in dict.fromkeys((row["shape"], row["batch"]) for row in rows):
        found = {r["name"]: r for r in rows if (r["shape"], r["batch"]) == (shape, batch)}
        made = _decided(batch, found) if DECIDED in found else _scripted(batch, found)
        if shape not in ("7b", "tiny"):
            made = [figure(f"{shape}, {f.pop('name')}", f.pop("value"), f.pop("unit"), "-", True,
                           **{k: v for k, v in f.items() if k not in ("bar", "met")}) for f in made]  # fmt: skip
        out += made
    return out


def _decided(batch: int, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    value = found[REMOVED]["ms_a_step"] / found[DECIDED]["ms_a_step"]
    name = f"batch {batch}, its policies decide, times faster than full depth"
    return [figure(name, value, "ratio", "-", True, mean_depth=found[DECIDED]["mean_depth"])]


def _scripted(batch: int, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    def ms(name: str) -> float:
        return found[name]["ms_a_step"]

    if batch > 1:
        value = found[TRAINED]["of_ceiling"]
        ratio = ms(REMOVED) / ms(TRAINED)
        return [figure(f"batch {batch}, trained exits: ceiling / time", value, "ratio", ">= 0.9", value >= 0.9,
                       over_full_depth=ratio, tokens_a_second=found[TRAINED]["tokens_a_second"])]  # fmt: skip
    out = [figure("batch 1, full depth", ms(REMOVED), "ms a token", "<= 5.3", ms(REMOVED) <= 5.3)]
    value = ms(THEIRS) / ms(REMOVED) if THEIRS in found else None
    out.append(figure("batch 1, full depth, times faster than Hugging Face's compiled static cache", value, "ratio",
                      ">= 1.3", value is not None and value >= 1.3))  # fmt: skip
    if "ms_a_step" in found.get(GPT_FAST, {}):
        out.append(figure("batch 1, full depth, times faster than gpt-fast", ms(GPT_FAST) / ms(REMOVED), "ratio", "-",
                          True, ms_a_token=ms(GPT_FAST), note=found[GPT_FAST]["note"]))  # fmt: skip
    value = ms(REMOVED) / ms(HALF)
    out.append(figure("batch 1, mean depth L/2, times faster than full depth", value, "ratio", ">= 1.8", value >= 1.8))
    value = ms(NOBODY) / ms(REMOVED)
    out.append(figure("batch 1, nobody leaves / exits removed", value, "ratio", "<= 1.06", value <= 1.06))
    return out


if __name__ == "__main__":
    main()
