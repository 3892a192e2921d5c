"""Decoder on a GPU at LLaMA's shapes: what exits cost and save, against full depth, eager copying and Hugging Face.

    python -m engine.bench.decoder_h100 [--shape 7b] [--batches 1 8 32 64]
    python -m engine.bench.decoder_h100 --batches 1 --gpt-fast FOLDER
    python -m engine.bench.decoder_h100 --checkpoint checkpoints/dolly-smollm2 --output FILE
    python -m engine.bench.decoder_h100 --merge FILE ...

writes ``bench/results/decoder_h100.json``. Weights are random: time does not depend on them. Exits stand at every layer
and are scripted, each exit's policy is computed all the same. Prompts of 128 tokens, 256 new ones; competitors take
turns in one run, a time is that of decoding, draws included, the prompts' own pass left out (of Hugging Face's calls:
the time of a call for fewer tokens taken off). ``--gpt-fast`` adds gpt-fast at batch 1, from a checkout of it; where it
fails, its row says why. ``--merge`` puts the rows of several files into one; each says of which commit it is.

"trained model's exits" are drawn, each token's by itself, from the shares of a test set's tokens that left behind each
layer of the shipped decoder (its training.json): teacher-forced, it read answers and generated nothing. "generated
tokens" are drawn from the shares of what it wrote itself (``decoder_quality.json``, policies of the same price).

With ``--checkpoint`` weights are real and its policies decide. Prompts are eight short questions in the checkpoint's
chat template then, in turns; EOS ids are ignored, so that all rows decode as many tokens: what stands behind the end of
an answer counts, too ("prompts").

Every run of ours is looked over: a token that left elsewhere than its script says (or at all, where exits are removed
or never fire) is counted in its row. "inside a step" counts, under a profiler, what the host launches and what it waits
for while it starts steps. Memory is that of the blocks in which the run's positions stand.

Ceiling of a step: the bytes of the layers that any of its rows visits, of keys and values of the rows that visit them
and of the head, at the memory's bandwidth.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from engine.bench import gpt_fast
from engine.bench.decoder_cpu import OTHERS, QUESTION, prompt_ids, spread
from engine.bench.encoder_competitors import one_line
from engine.bench.record import RESULTS, figure, merged, same_in_all, write_result
from engine.bench.report import calls_inside, may_wait, memory_bandwidth
from engine.config import DecoderExitConfig
from engine.decoding.packed import Done, PackedDecoder, cache_shape
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
GENERATED = "trained model's exits, generated tokens"
DECIDED = "its policies decide"
THEIRS = "Hugging Face, static cache, compiled"
GPT_FAST = "gpt-fast"
INSIDE = "inside a step"
_SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints" / "dolly-smollm2"
_START, _RESULTS = "start a step", "wait for a step's results"


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
    """Exit layers of the tokens of test answers that the shipped decoder reads, and its depth."""
    exits = json.loads((_SHIPPED / "config.json").read_text())["early_exit"]
    result = json.loads((_SHIPPED / "training.json").read_text())["result"]["test"]
    share = result["points"][f"{exits['threshold']:g}"]["exit_share"]
    return dict(zip(exits["exit_layers"], share, strict=True)), exits["num_layers"]


def generated_share() -> tuple[dict[int, float], int]:
    """The same of tokens that it generates, with policies for the price of its own. ValueError where none are known."""
    exits = json.loads((_SHIPPED / "config.json").read_text())["early_exit"]
    alpha, threshold = json.loads((_SHIPPED / "training.json").read_text())["alpha"], exits["threshold"]
    file = RESULTS / "decoder_quality.json"
    for row in json.loads(file.read_text())["rows"]:
        if (row["method"], row["value"]) == ("ConsistentEE", alpha) and row.get("threshold", 0.5) == threshold:
            return dict(zip(exits["exit_layers"], row["exit_share"], strict=True)), exits["num_layers"]
    raise ValueError(f"{file} has no row of ConsistentEE for alpha {alpha:g} at threshold {threshold:g}")


def ceiling_bytes(model: MultiExitDecoder, exit_layers: Sequence[Sequence[int]], prompts: Sequence[int]) -> float:
    """Of all steps together, behind prompts of so many tokens: see the module."""
    hf = model.language_model.config
    item, shape = torch.finfo(model.dtype).bits // 8, cache_shape(model)
    one = sum(p.numel() for p in model.backbone.layers[0].parameters()) * item
    position = 2 * shape.kv_heads * shape.head_dim * item
    total = 0.0
    for step, depths in enumerate(list(zip(*exit_layers, strict=True))[1:], start=1):
        positions = sum(depth * (prompt + step) for depth, prompt in zip(depths, prompts, strict=True))
        total += max(depths) * one + positions * position + hf.vocab_size * hf.hidden_size * item
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


class Ours:
    """Our engine decoding ``new`` tokens of every prompt; a call returns the seconds of new - 1 of them.

    given      where every token is to leave, None where policies decide
    taken      exit layers of the last call; compared, elsewhere: tokens of all calls, and those that left elsewhere
    memory     of the last call
    """

    def __init__(
        self,
        lm: DecoderEngine,
        prompts: list[list[int]],
        new: int,
        given: Sequence[Sequence[int]] | None,
        **options: Any,
    ):
        self._lm, self._prompts, self._new, self._given, self._options = lm, prompts, new, given, options
        self.taken: list[list[int]] = []
        self.compared = self.elsewhere = 0
        self.memory: dict[str, int] = {}

    def __call__(self) -> float:
        options = dict(max_new_tokens=self._new, ignore_eos=True, progress=False) | self._options
        out = self._lm.run(self._prompts, **options)
        self.taken = out.exit_layers
        if self._given is not None:
            pairs = zip(self._given, self.taken, strict=True)
            moved = [wanted != found for w, f in pairs for wanted, found in zip(w[1:], f[1:], strict=True)]
            self.compared += len(moved)
            self.elsewhere += sum(moved)
        self.memory = memory_of(self._lm, [len(p) + self._new - 1 for p in self._prompts])
        self.memory["owed_settled"] = out.stats.owed_settled
        return out.stats.decode_s

    def row(self) -> dict[str, int]:
        """What a row of results says beside times."""
        checked = {} if self._given is None else {"exits_compared": self.compared, "exits_elsewhere": self.elsewhere}
        return checked | self.memory


def memory_of(lm: DecoderEngine, positions: Sequence[int]) -> dict[str, int]:
    """Bytes of keys and values, in all layers, and of exit states: of blocks for so many positions of each row."""
    cache = lm._packed().cache
    blocks = sum(map(cache.blocks_for, positions))
    kv = (cache.keys.nbytes + cache.values.nbytes) // cache.num_blocks
    return {"kv_bytes": blocks * kv, "exit_state_bytes": blocks * (cache.states.nbytes // cache.num_blocks)}


# --- what the host does -----------------------------------------------------------------------------------------------


@contextmanager
def _watched(decoder: PackedDecoder) -> Iterator[list[int]]:
    """Spans named ``_START`` and ``_RESULTS`` for a profiler, and an entry in the yielded list for each step. What
    torch knows to wait for the device is refused while a step is started: RuntimeError."""
    steps: list[int] = []
    on_gpu = decoder.cache.keys.is_cuda

    @contextmanager
    def refused() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def spied(start: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            with torch.profiler.record_function(_START), refused() if on_gpu else nullcontext():
                launched = start(*arguments)
            if launched is None:
                return None
            steps.append(len(steps))
            if not isinstance(launched, Done):  # else there is nothing left to wait for
                results = launched.outputs

                def outputs() -> Any:
                    with torch.profiler.record_function(_RESULTS):
                        return results()

                launched.outputs = outputs
            return launched

        return call

    decoder.launch, decoder.launch_next = spied(decoder.launch), spied(decoder.launch_next)
    try:
        yield steps
    finally:
        del decoder.launch, decoder.launch_next


def inside_a_step(lm: DecoderEngine, prompts: list[list[int]], new: int, **options: Any) -> dict[str, Any]:
    """Launches of a run's steps, and calls that wait: while steps are started, and for their results."""
    options = dict(max_new_tokens=new, ignore_eos=True, progress=False) | options
    lm.run(prompts, **options)  # whatever is compiled and captured
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        with _watched(lm._packed()) as steps:
            lm.run(prompts, **options)
    events = list(trace.events())
    started, waited = calls_inside(events, _START), calls_inside(events, _RESULTS)
    return {
        "steps": len(steps),
        "graph_launches": started.count("cudaGraphLaunch"),
        "kernel_launches": sum("LaunchKernel" in name for name in started),
        "synchronisations": sum(map(may_wait, started)),
        "waits_for_results": sum(map(may_wait, waited)),
    }


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
        model, tokenizer = load_model(str(o.checkpoint))
        model, shape = model.to(device, dtype).eval(), o.checkpoint.name
        if tokenizer is None:
            parser.error(f"{o.checkpoint} has no tokenizer: questions cannot be asked")
        questions = [prompt_ids(tokenizer, question) for question in (QUESTION, *OTHERS)]
        longest = max(map(len, questions))
        if longest > o.prompt:
            parser.error(f"--prompt must be at least {longest}, the longest question's tokens, got {o.prompt}")
    layers, new = model.config.num_layers, o.new_tokens
    room = _cache_bytes(model, max(o.batches), positions)
    # Steps that go the packed way would be another engine's times.
    warnings.filterwarnings("error", message="the graph executor cannot serve")
    lm = DecoderEngine(model, executor="graph", private=True, cache_bytes=room)
    shares = {TRAINED: shipped_share(), GENERATED: generated_share()}
    memory = {
        "cache_bytes": lm._packed().cache.bytes,
        "kv_bytes_a_position": 2 * layers * model.language_model.config.num_key_value_heads
        * model.backbone.layers[0].self_attn.head_dim * torch.finfo(dtype).bits // 8,
        "exit_state_bytes_a_position": model.language_model.config.hidden_size * torch.finfo(dtype).bits // 8,
    }  # fmt: skip
    about = {"prompt": o.prompt, "new_tokens": new, "memory": {shape: memory}}
    rows: list[dict[str, Any]] = []
    for batch in o.batches:
        if o.checkpoint is None:
            prompts = torch.randint(0, model.language_model.config.vocab_size, (batch, o.prompt)).tolist()
        else:
            prompts = [questions[row % len(questions)] for row in range(batch)]
        settings: dict[str, dict[str, Any]] = {REMOVED: {"min_depth": layers}}
        scripts = {}
        if o.checkpoint is None:
            for name, (share, depth) in shares.items():
                scripts[name] = [trained_exits(share, depth, layers, new, row) for row in range(batch)]
        else:
            settings[DECIDED] = {}
        if batch == 1:
            settings[NOBODY] = {"threshold": 1.0}
        if batch == 1 and o.checkpoint is None:
            scripts[HALF] = [spread(layers, new, layers / 2)]
        settings |= {name: {"criterion": "scripted", "exit_layers": script} for name, script in scripts.items()}
        full = [[layers] * new] * batch
        given = {REMOVED: full, NOBODY: full, **scripts}
        mine = {name: Ours(lm, prompts, new, given.get(name), **options) for name, options in settings.items()}
        few = max(4, new // 4)  # slow, and in the end a time for each token
        if batch == 1 and o.checkpoint is None and EAGER not in o.without:
            eager = DecoderEngine(model, executor="packed", state_copy="eager", private=True, cache_bytes=room)
            script = [spread(layers, few, layers / 2)]
            mine[EAGER] = Ours(eager, prompts, few, script, criterion="scripted", exit_layers=script)
        runs: dict[str, Callable[[], float]] = dict(mine)
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
            if o.checkpoint is not None:
                row["prompts"] = "questions in its template"
            if name in mine:
                row |= mine[name].row()
            taken = {REMOVED: full, **scripts}.get(name)
            if name == DECIDED:
                taken = mine[name].taken
            if taken is not None:
                row["mean_depth"] = float(np.mean([d[1:] for d in taken]))
                row["ceiling_gb"] = ceiling_bytes(model, taken, list(map(len, prompts))) / (new - 1) / 1e9
                row["ceiling_ms"] = 1e12 * row["ceiling_gb"] / memory_bandwidth(device)
                row["of_ceiling"] = row["ceiling_ms"] / step_ms
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k != "decode_s"}), flush=True)
        if on_gpu:
            setting = TRAINED if o.checkpoint is None else DECIDED
            row = {"shape": shape, "batch": batch, "name": INSIDE, "setting": setting}
            try:
                row |= inside_a_step(lm, prompts, max(4, new // 16), **settings[setting])
            except Exception as error:  # also the warning of a fallback: times are measured, what is counted is not
                row["error"] = one_line(error)
            rows.append(row)
            print(json.dumps(row), flush=True)
        with redirect_stdout(io.StringIO()):  # a later batch may fail; the table of figures is for the end
            write_result(o.output, figures(rows), rows, **about)
    write_result(o.output, figures(rows), rows, **about)


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
    """Bars for times are for LLaMA-7B's shape, of which names say nothing; other models have figures without. What is
    counted has its bar for every model."""
    out = []
    for shape, batch in dict.fromkeys((row["shape"], row["batch"]) for row in rows):
        found = {r["name"]: r for r in rows if (r["shape"], r["batch"]) == (shape, batch)}
        made = _decided(batch, found) if DECIDED in found else _scripted(batch, found)
        counted = _counted(batch, found)
        if shape not in ("7b", "tiny"):
            made = [figure(f"{shape}, {f.pop('name')}", f.pop("value"), f.pop("unit"), "-", True,
                           **{k: v for k, v in f.items() if k not in ("bar", "met")}) for f in made]  # fmt: skip
            counted = [f | {"name": f"{shape}, {f['name']}"} for f in counted]
        out += made + counted
    return out


def _counted(batch: int, found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that say it: older ones do not."""
    out = []
    compared = [row for row in found.values() if "exits_compared" in row]
    if compared:
        wrong = sum(row["exits_elsewhere"] for row in compared)
        out.append(figure(f"batch {batch}, involuntary exits and stays", wrong, "tokens", "0", wrong == 0,
                          of=sum(row["exits_compared"] for row in compared)))  # fmt: skip
    if INSIDE in found:
        row = found[INSIDE]
        waits, launches = row.get("synchronisations"), None
        if row.get("steps"):
            launches = (row["graph_launches"] + row["kernel_launches"]) / row["steps"]
        out += [
            figure(f"batch {batch}, host synchronisations inside a step", waits, "calls", "0", waits == 0),
            figure(f"batch {batch}, launches a step", launches, "calls", "1", launches == 1),
        ]
    return out


def _decided(batch: int, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    value, row = found[REMOVED]["ms_a_step"] / found[DECIDED]["ms_a_step"], found[DECIDED]
    name = f"batch {batch}, its policies decide, times faster than full depth"
    more = {k: row[k] for k in ("mean_depth", "prompts") if k in row}
    return [figure(name, value, "ratio", "-", True, **more)]


def _generated(batch: int, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    if GENERATED not in found:
        return []
    row = found[GENERATED]
    name = f"batch {batch}, trained exits, generated tokens: ceiling / time"
    ratio = found[REMOVED]["ms_a_step"] / row["ms_a_step"]
    return [figure(name, row["of_ceiling"], "ratio", "-", True, over_full_depth=ratio,
                   tokens_a_second=row["tokens_a_second"], mean_depth=row["mean_depth"])]  # fmt: skip


def _scripted(batch: int, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    def ms(name: str) -> float:
        return found[name]["ms_a_step"]

    if batch > 1:
        value = found[TRAINED]["of_ceiling"]
        ratio = ms(REMOVED) / ms(TRAINED)
        return [figure(f"batch {batch}, trained exits: ceiling / time", value, "ratio", ">= 0.9", value >= 0.9,
                       over_full_depth=ratio, tokens_a_second=found[TRAINED]["tokens_a_second"]),
                *_generated(batch, found)]  # fmt: skip
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
    if "kv_bytes" in found[HALF]:
        kv, states = (found[HALF][name] for name in ("kv_bytes", "exit_state_bytes"))
        out.append(figure("batch 1, mean depth L/2, exit states / keys and values", states / kv, "ratio of bytes", "-",
                          True, kv_bytes=kv, exit_state_bytes=states,
                          owed_settled=found[HALF]["owed_settled"]))  # fmt: skip
    return out + _generated(batch, found)


if __name__ == "__main__":
    main()
