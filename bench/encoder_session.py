"""What all parts of ``encoder_h100`` share: the models, our engine's calls, the two clocks, the least a pass costs."""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import engine
from engine.api import Engine
from engine.backbones import BackboneReference, load_backbone
from engine.bench import encoder_competitors as peers
from engine.bench.encoder_competitors import Batch, Competitor
from engine.bench.report import memory_bandwidth
from engine.bench.timer import Timing, interleave
from engine.criteria import make_criterion
from engine.executors import ExitOptions
from engine.executors.base import TokenRows
from engine.models.encoder import MultiExitEncoder

HUB_IDS = {"minilm": "sentence-transformers/all-MiniLM-L6-v2", "mpnet": "sentence-transformers/all-mpnet-base-v2"}
_PEAK_FLOPS = 600e12  # a second: about the best fp16 product seen on an H100
_PEAK_SHARE = 0.9  # of the memory's bandwidth: the best copy seen there
_ALL_TOKENS = 10**9  # one micro-batch
_MEASUREMENT_S, _LEAST_CALLS, _MOST_CALLS = 0.01, 10, 50
_SLEEP_CYCLES = 2.0e9  # a second of the device's clock, at most
_LABELS = ("entailment", "neutral", "contradiction")
# Seconds that a competitor takes to be ready, before one of its kind was seen.
_EXPECTED_S = {peers.REDUCE_OVERHEAD: 20.0, peers.MAX_AUTOTUNE: 90.0, peers.PACKED: 60.0}


@dataclass
class Session:
    """What all parts share. budget_s: no competitor is compiled that would not be ready by then."""

    device: torch.device
    tiny: bool
    rounds: int
    batches: tuple[int, ...]
    competitors: tuple[str, ...]
    mixes: tuple[str, ...]
    budget_s: float = 540.0
    folders: Mapping[str, Path | None] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    ready_s: dict[str, float] = field(default_factory=lambda: dict(_EXPECTED_S))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.device.type == "cuda" else torch.float32

    @property
    def sequence(self) -> int:
        return 16 if self.tiny else 128

    def too_late_for(self, name: str) -> bool:
        return time.perf_counter() - self.started + self.ready_s.get(name, 0.0) > self.budget_s

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clean(self) -> None:
        """Forget what was compiled for the last shape, and its memory."""
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


# -- models --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, and our engine on it."""

    name: str
    module: MultiExitEncoder
    engine: Engine

    @property
    def layers(self) -> int:
        return self.module.config.num_layers


def random_backbone(family: str, tiny: bool) -> torch.nn.Module:
    """BERT-base or MPNet-base without its pooler, or a tiny one; random weights from a fixed seed."""
    from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel

    config_class, model_class = {"bert": (BertConfig, BertModel), "mpnet": (MPNetConfig, MPNetModel)}[family]
    sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, vocab_size=120)
    config = config_class(**(sizes if tiny else {}), max_position_embeddings=512 if family == "bert" else 514)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config, add_pooling_layer=False)


def make_module(session: Session, name: str) -> MultiExitEncoder:
    """The model of a part, exits at all layers, on the device. OSError where real weights cannot be had."""
    with torch.inference_mode(False):  # ordinary parameters: torch.compile and our watch ask for their version
        return _make_module(session, name)


def _make_module(session: Session, name: str) -> MultiExitEncoder:
    if session.tiny or name == "bert-base":
        backbone = random_backbone("mpnet" if name == "mpnet" else "bert", session.tiny)
    else:
        folder = session.folders.get(name)
        backbone = load_backbone(BackboneReference(HUB_IDS[name]).resolve() if folder is None else folder)
    if backbone.config.model_type == "bert":
        backbone.set_attn_implementation("sdpa")
    layers = backbone.config.num_hidden_layers
    config = engine.EarlyExitConfig(
        num_layers=layers, exit_layers=tuple(range(1, layers + 1)), pooler="none", labels=_LABELS, max_length=512
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = engine.MultiExitEncoder(backbone, config).eval()
    peers.keep_bias_on_device(module)
    return module.to(session.device, session.dtype)


def make_engine(module: MultiExitEncoder) -> Engine:
    """Ours, on weights that stay as they are."""
    made = engine.from_module(module, executor="graph")
    made.executor.weights.watching = False
    return made


def subject(session: Session, name: str) -> Subject:
    module = make_module(session, name)
    return Subject(("tiny-" if session.tiny else "") + name, module, make_engine(module))


# -- ours ----------------------------------------------------------------------------------------------------------


def prepared(model: Engine, batch: Batch, case: Mapping[str, Any]) -> tuple[TokenRows, ExitOptions]:
    """What ``Engine.run`` hands to its executor for these arguments: the only place that knows how."""
    rows = model._reader.read(batch.inputs, False)
    criterion = make_criterion(case.get("criterion") or model.config.criterion)
    values = (case.get(name) for name in ("threshold", "min_depth", "max_depth", "exit_layers"))
    options = model._options_reader.options(model.config, len(rows), criterion, *values)
    return rows, options


def run_ours(model: Engine, batch: Batch, case: Mapping[str, Any]) -> engine.Classification:
    return model.run(batch.inputs, batch_tokens=_ALL_TOKENS, progress=False, **case)


def check_served(model: Engine) -> None:
    problem = getattr(model.executor, "_problem", None)
    if problem is not None:
        raise RuntimeError(f"the graph executor cannot serve here: {problem}")


def ours(model: Engine, batch: Batch, cases: Sequence[Mapping[str, Any]], checked: bool = True) -> Competitor:
    """Our engine; arguments of ``run`` by turns. RuntimeError where rows leave elsewhere than a script says, or without
    one not at the last layer; checked=False: where the policies decide."""
    started = time.perf_counter()
    executor = model.executor
    for one, case in itertools.product(batch.turns, cases):
        found = run_ours(model, one, case).exit_layers.tolist()
        check_served(model)
        expected = case.get("exit_layers", [model.config.num_layers] * len(found))
        if checked and found != list(expected):
            raise RuntimeError(f"rows left at {found[:8]}..., expected were {list(expected)[:8]}...")
    stream = executor._stream
    calls = [prepared(model, batch, case) for case in cases]
    if stream is None:
        replays = [lambda call=call: executor.run(*call) for call in calls]
    else:
        replays = [executor.replayer(*call) for call in calls]
    turn, host_turn = itertools.cycle(replays), itertools.cycle(cases)
    return Competitor(
        on_device=lambda: next(turn)(),
        from_host=lambda given: run_ours(model, given, next(host_turn)).logits,
        period=len(cases),
        stream=stream,
        ready_s=time.perf_counter() - started,
    )


def spread_exits(rows: int, layers: int, seed: int = 0) -> list[int]:
    """Exit layers spread evenly over 1 ... layers - 1, mean layers / 2 exactly, in a random order."""
    most = layers - 1
    if 1 < rows < most:  # both ends are taken, and what stands between them at equal distances
        spread = [round(1 + (most - 1) * i / (rows - 1)) for i in range(rows)]
    else:
        spread = [1 + (2 * i + 1) * most // (2 * rows) for i in range(rows)]
    return [spread[i] for i in torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()]


def half_depth(rows: int, layers: int) -> list[list[int]]:
    """Scripts whose mean exit layer is layers / 2: one, or for a single row every layer but the last in its turn."""
    return [[layer] for layer in range(1, layers)] if rows == 1 else [spread_exits(rows, layers)]


_LOGIT_STEP = 0.5


def decide_half_depth(subject: Subject, batch: Batch) -> list[dict[str, Any]]:
    """Move the policies' last biases until they let rows leave as ``half_depth`` spreads them. Returns arguments of
    ``run``, by turns: of one row the threshold says how deep it goes, of several each exit lets the surest go.

    What policies say is Hugging Face's, in the module's dtype: rows that ours sees on the other side of a threshold
    leave a few layers elsewhere.
    """
    module, layers, place = subject.module, subject.layers, subject.module.device
    with torch.inference_mode(False), torch.no_grad():
        said = module(batch.input_ids.to(place), batch.attention_mask.to(place)).policy_logits.float().cpu()
        if len(said) == 1:
            wanted = [_LOGIT_STEP * layer for layer in range(1, layers)]
            shifts = [logit - float(z) for logit, z in zip(wanted, said[0], strict=True)]
            thresholds = torch.sigmoid(torch.tensor(wanted) - _LOGIT_STEP / 2).tolist()
            cases: list[dict[str, Any]] = [{"threshold": threshold} for threshold in thresholds]
        else:
            script, left, shifts = spread_exits(len(said), layers), torch.arange(len(said)), []
            for layer in range(1, layers):
                order = said[left, layer - 1].argsort(descending=True)
                z, leaving = said[left[order], layer - 1], script.count(layer)
                # As if one more stood at either end.
                z = torch.cat([z[:1] + 2, z, z[-1:] - 2])
                shifts.append(-float(z[leaving] + z[leaving + 1]) / 2)
                left = left[order[leaving:]]
                if len(left) == 0:
                    shifts += [0.0] * (layers - 1 - layer)
                    break
            cases = [{}]
        for policy, shift in zip(module.exits.policies, shifts, strict=True):
            policy.out.bias += shift
    subject.engine.refresh()
    return cases


# -- clocks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clocks:
    """Seconds a call, by both clocks, round by round."""

    device: Timing | None  # None for who waits for the host inside: there is no time of the device alone
    host: Timing

    def to_dict(self) -> dict[str, Any]:
        found = {} if self.device is None else {"device_s": _seconds(self.device)}
        return found | {"host_s": _seconds(self.host)}

    def over(self, other: Clocks) -> dict[str, float]:
        """This one's time over the other's: median over the rounds, in which both ran side by side."""
        pairs = {"device": (self.device, other.device), "host": (self.host, other.host)}
        return {
            name: float(np.median([a / b for a, b in zip(x.seconds, y.seconds, strict=True)]))
            for name, (x, y) in pairs.items()
            if x is not None and y is not None
        }


def _seconds(timing: Timing) -> dict[str, float]:
    return {"median": timing.median, "p10": timing.p10, "p90": timing.p90}


def measure(session: Session, competitors: Mapping[str, Competitor], batch: Batch) -> dict[str, Clocks]:
    """Both clocks of every competitor, interleaved; from the host, the batch and its others by turns."""
    device = _device_clock(session, competitors)
    given = {name: c.period * batch.turns for name, c in competitors.items()}
    turns = {
        name: lambda c=c, given=given[name]: [c.from_host(one) for one in given][-1] for name, c in competitors.items()
    }
    measured = interleave(turns, repeats=session.rounds, warmup=1, device=session.device)
    host = {name: Timing(tuple(s / len(given[name]) for s in m.timing.seconds)) for name, m in measured.items()}
    return {name: Clocks(device.get(name), host[name]) for name in competitors}


def _device_clock(session: Session, competitors: Mapping[str, Competitor]) -> dict[str, Timing]:
    competitors = {name: c for name, c in competitors.items() if not c.waits}
    calls = {}
    for name, c in competitors.items():
        for _ in range(c.period):
            c.on_device()
        once = min(_queued_seconds(session, c, c.period) for _ in range(3))
        turns = min(_MOST_CALLS, max(_LEAST_CALLS, round(_MEASUREMENT_S / once))) // c.period
        calls[name] = c.period * max(1, 2 if c.many_launches else turns)
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    # At the limit of its power a device's clock follows what ran before, 2 % of a pass of 128 rows: so not the same two
    # behind each other in every round.
    drawn = random.Random(0)
    for number in range(-1, session.rounds):
        for name in drawn.sample(list(competitors), len(competitors)):
            found = _queued_seconds(session, competitors[name], calls[name])
            if number >= 0:
                seconds[name].append(found)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _queued_seconds(session: Session, competitor: Competitor, calls: int) -> float:
    """Seconds a call on the device of several calls in a row; on a CPU, by the wall clock.

    The device sleeps until all of them are queued: what Python does in front of a launch is on the other clock.
    """
    session.synchronise()
    if session.device.type == "cpu":
        started = time.perf_counter()
        for _ in range(calls):
            competitor.on_device()
        return (time.perf_counter() - started) / calls
    stream = competitor.stream or torch.cuda.current_stream(session.device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    collecting = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        competitor.on_device()
        queueing = time.perf_counter() - began
        session.synchronise()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(int(_SLEEP_CYCLES * 1.5 * queueing * calls))
        start.record(stream)
        for _ in range(calls):
            competitor.on_device()
        end.record(stream)
        end.synchronize()
    finally:
        if collecting:
            gc.enable()
    return start.elapsed_time(end) * 1e-3 / calls


# -- what a shape costs at least -----------------------------------------------------------------------------------


def pass_flops(lengths: Sequence[int], hidden: int, inner: int, layers: int, last_layer_whole: bool = True) -> float:
    """Floating point operations of the layers' products and attention for rows of these lengths.

    last_layer_whole=False: what ours computes, whose last layer is first tokens only behind queries, keys and values.
    """
    tokens, rows = sum(lengths), len(lengths)
    attention = 4.0 * hidden * sum(n * n for n in lengths)
    layer = tokens * 2.0 * (4 * hidden * hidden + 2 * hidden * inner) + attention
    if last_layer_whole:
        return layers * layer
    last = tokens * 6.0 * hidden * hidden + rows * 2.0 * (hidden * hidden + 2 * hidden * inner) + 4.0 * hidden * tokens
    return (layers - 1) * layer + last


def work_of(subject: Subject, lengths: Sequence[int], seconds: float) -> dict[str, Any]:
    """Achieved TFLOP/s, and the time over the floor: every operation at full rate, or every weight once."""
    config = subject.module.encoder_backbone.config
    sizes = config.hidden_size, config.intermediate_size, subject.layers
    layers = subject.module.family.layers(subject.module.encoder_backbone)
    weight_bytes = sum(p.numel() * p.element_size() for p in layers.parameters())
    flops = pass_flops(lengths, *sizes)
    floor = max(flops / _PEAK_FLOPS, weight_bytes / (_PEAK_SHARE * memory_bandwidth(subject.module.device)))
    return {
        "tflops": flops / seconds * 1e-12,
        "tflops_computed": pass_flops(lengths, *sizes, last_layer_whole=False) / seconds * 1e-12,
        "floor_s": floor,
        "over_floor": seconds / floor,
        "note": "the last layer is first-token only behind K/V: tflops and floor_s count it whole, tflops_computed not",
    }
