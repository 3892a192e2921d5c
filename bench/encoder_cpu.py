"""Encoder on a CPU: what exits cost and save, and full depth against other engines. One run, competitors interleaved.

    python -m engine.bench.encoder_cpu [--checkpoint checkpoints/stackoverflow-minilm]

writes ``bench/results/encoder_cpu.json``. Rows are the checkpoint's real test texts at their real lengths, in the order
of the file, ``batch`` rows a call, from padded token ids on the host to results on the host for everybody (what
``tokenizer(..., padding=True)`` returns; ours strips the padding inside the timed call). Accuracy figures are those of
``bench/results/encoder_quality.json`` (``python -m engine.bench.encoder_quality``), copied so that one file has all.

t_full is our own engine with exits removed (min_depth = number of layers): the last layer then computes first tokens
only, and no exit is ever read. It is the fastest full-depth path we have, and the denominator of nothing else.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import engine
from engine.api import Engine
from engine.bench.record import RESULTS, figure, write_result
from engine.bench.timer import interleave
from engine.loading import load_model
from engine.models.encoder import MultiExitEncoder

BATCHES = (1, 8, 32)
_POLICY_BAR_S = 30.0


def padded_batches(model: Engine, texts: list[str], batch: int) -> list[dict[str, Tensor]]:
    """Token ids of consecutive rows, padded to the longest of each batch."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    groups = [texts[i : i + batch] for i in range(0, len(texts) - batch + 1, batch)]
    encoded = [model.tokenizer(group, padding=True, return_tensors="pt") for group in groups]
    return [{name: e[name] for name in names if name in e} for e in encoded]


def huggingface(module: MultiExitEncoder) -> Callable[[dict[str, Tensor]], Tensor]:
    """The same weights through Hugging Face modules (eager, SDPA) and the last exit's classifier."""
    last = module.config.num_exits - 1

    def run(batch: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            hidden = module.backbone(**batch).last_hidden_state[:, 0]
            return torch.softmax(module.exits.classify(last, module.exits.state(last, hidden)), -1)

    return run


def onnxruntime_session(module: MultiExitEncoder, folder: Path) -> Callable[[dict[str, Tensor]], Any]:
    """The same network exported and optimised for onnxruntime (fused attention, layer norm and GELU), same threads."""
    import onnxruntime
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    module = copy.deepcopy(module)  # the exporter leaves marks on what it traces
    last = module.config.num_exits - 1

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.exits = module.backbone, module.exits

        def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
            hidden = self.backbone(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state[:, 0]
            return torch.softmax(self.exits.classify(last, self.exits.state(last, hidden)), -1)

    names = ["input_ids", "attention_mask", "token_type_ids"]
    example = tuple(torch.ones(2, 8, dtype=torch.long) for _ in names)
    path = folder / "model.onnx"
    backbone = module.encoder_backbone
    backbone.set_attn_implementation("eager")  # the pattern that the optimiser fuses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the legacy exporter's own; the answers are checked below
        torch.onnx.export(
            Classifier(),
            example,
            str(path),
            input_names=names,
            output_names=["probabilities"],
            dynamic_axes={name: {0: "batch", 1: "tokens"} for name in names},
            dynamo=False,
        )
    config = backbone.config
    fused = optimizer.optimize_model(
        str(path),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        optimization_options=FusionOptions("bert"),
    )
    fused.save_model_to_file(str(folder / "fused.onnx"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions = [
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for file in (path, folder / "fused.onnx")
    ]

    def time_of(session) -> float:
        inputs = {name: torch.randint(5, 900, (32, 16)).numpy() for name in names}
        inputs["attention_mask"][:] = 1
        inputs["token_type_ids"][:] = 0
        session.run(None, inputs)
        started = time.perf_counter()
        for _ in range(5):
            session.run(None, inputs)
        return time.perf_counter() - started

    session = min(sessions, key=time_of)  # the better of plain (runtime's own fusions) and offline-fused

    def run(batch: dict[str, Tensor]) -> Any:
        inputs = {k: v.numpy() for k, v in batch.items()}
        inputs.setdefault("token_type_ids", torch.zeros_like(batch["input_ids"]).numpy())
        return session.run(None, inputs)[0]

    return run


def check_same_answers(model: Engine, others: dict[str, Callable], batch: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of probabilities from our full-depth path; who computes something else is no competitor."""
    ours = model.run(batch, min_depth=model.config.num_layers).probabilities
    found = {}
    for name, run in others.items():
        found[name] = float((torch.as_tensor(run(batch)) - ours).abs().max())
        if found[name] > 1e-3:
            raise RuntimeError(f"{name} does not compute the same network: probabilities differ by {found[name]:.2g}")
    return found


def spread_script(model: Engine, rows: int) -> list[int]:
    """Exit layers spread evenly over all exits but the last, mean depth L/2."""
    places = [layer for layer in model.config.exit_layers if layer < model.config.num_layers]
    return [places[i % len(places)] for i in range(rows)]


def measure(model: Engine, texts: list[str], batch: int, others: dict[str, Callable], repeats: int) -> dict[str, Any]:
    """Times of all competitors over the same batches, and the depth our runs had."""
    batches = padded_batches(model, texts, batch)
    layers = model.config.num_layers
    scripts = [spread_script(model, batch + i)[i:] for i in range(len(model.config.exit_layers) - 1)]
    settings: dict[str, Callable[[int], dict[str, Any]]] = {
        "exits removed": lambda i: {"min_depth": layers},
        "nobody leaves": lambda i: {"threshold": 1.0},
        "nobody leaves, unforeseen": lambda i: {"threshold": 0.9999999},
        "trained exits": lambda i: {},
        "scripted, spread, mean depth L/2": lambda i: {
            "criterion": "scripted",
            "exit_layers": scripts[i % len(scripts)],
        },
    }

    def ours(arguments: Callable[[int], dict[str, Any]]) -> Callable[[], list[Tensor]]:
        return lambda: [
            model.run(inputs, progress=False, **arguments(i)).exit_layers for i, inputs in enumerate(batches)
        ]

    def theirs(call: Callable) -> Callable[[], None]:
        def run() -> None:
            for inputs in batches:
                call(inputs)

        return run

    def depth(exit_layers: list[Tensor] | None) -> float:
        return float(layers) if exit_layers is None else float(torch.cat(exit_layers).double().mean())

    competitors = {name: ours(arguments) for name, arguments in settings.items()}
    competitors |= {name: theirs(call) for name, call in others.items()}
    measured = interleave(competitors, repeats=repeats, warmup=1)
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    padded = sum(b["input_ids"].numel() for b in batches)
    return {
        "batch": batch,
        "batches": len(batches),
        "tokens": tokens,
        "padded_tokens": padded,
        "times": {
            name: {"mean_depth": depth(m.result), **{k: v / len(batches) for k, v in _seconds(m.timing).items()}}
            for name, m in measured.items()
        },
        "rounds_s": {name: list(m.timing.seconds) for name, m in measured.items()},
    }


def _seconds(timing) -> dict[str, float]:
    return {"median_s": timing.median, "p10_s": timing.p10, "p90_s": timing.p90}


def ratio(row: dict[str, Any], above: str, below: str) -> float:
    """Median over the rounds of the ratio of two competitors' times: what slows a whole round cancels."""
    pairs = [a / b for a, b in zip(row["rounds_s"][above], row["rounds_s"][below], strict=True)]
    return float(torch.tensor(pairs, dtype=torch.float64).median())


def realised(row: dict[str, Any], name: str, layers: int) -> float:
    """(t_full / t_exit) / (L / mean depth)."""
    return ratio(row, "exits removed", name) / (layers / row["times"][name]["mean_depth"])


def policy_step(module: MultiExitEncoder, tokenizer, data: Path) -> dict[str, Any]:
    """Seconds of one closed-form policy step (one alpha, default epochs) on the cached train split."""
    from engine.train import objectives, phases
    from engine.train.batching import TokenizedExamples
    from engine.train.config import PolicyOptions
    from engine.train.data import load_examples

    config = module.config
    examples = load_examples(data, config.labels)
    tokens = TokenizedExamples.from_examples(examples, tokenizer, config.max_length)
    started = time.perf_counter()
    cache = phases.measure(module, tokens)
    cached = time.perf_counter()
    memorized = phases.memorized_layers(cache, config.exit_layers)
    grid = objectives.alpha_grid(config.num_layers, config.num_labels)
    options = PolicyOptions()
    module.exits.reset_policies(options.initialisation == "uniform_hazard")
    trained = time.perf_counter()
    phases.train_policy(module, cache, memorized, options, grid[len(grid) // 2], seed=0)
    seconds = time.perf_counter() - trained
    return {"rows": len(examples), "epochs": options.epochs, "cache_s": cached - started, "policy_s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(engine.__file__).resolve().parent.parent
    parser.add_argument("--checkpoint", default=str(root / "checkpoints" / "stackoverflow-minilm"))
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parent / "data" / "stackoverflow")
    parser.add_argument("--quality", type=Path, default=RESULTS / "encoder_quality.json")
    parser.add_argument("--rows", type=int, default=512, help="test rows to time")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS / "encoder_cpu.json")
    options = parser.parse_args()

    from engine.train.data import load_examples

    model = engine.load(options.checkpoint, device="cpu")
    module, tokenizer = load_model(options.checkpoint)  # the competitors' own: ours stays private to its engine
    examples = load_examples(options.data / "test.jsonl.gz", model.config.labels)
    texts = examples.texts[: options.rows]
    layers = model.config.num_layers
    with tempfile.TemporaryDirectory() as folder:
        others = {
            "Hugging Face eager, padded": huggingface(module),
            "onnxruntime, padded": onnxruntime_session(module, Path(folder)),
        }
        differences = check_same_answers(model, others, padded_batches(model, texts, 32)[0])
        rows = {b: measure(model, texts[: 256 if b == 1 else None], b, others, options.repeats) for b in BATCHES}
    policy = policy_step(module, tokenizer, options.data / "train.jsonl.gz")

    figures = []
    quality = json.loads(options.quality.read_text()) if options.quality.is_file() else {"figures": []}
    figures += quality["figures"]
    for batch, least in ((32, 1.0), (1, 0.95)):
        value = realised(rows[batch], "trained exits", layers)
        name = f"realised speed-up over layer arithmetic, batch {batch}: (t_full / t_exit) / (L / mean depth)"
        depth = rows[batch]["times"]["trained exits"]["mean_depth"]
        figures.append(figure(name, value, "ratio", f">= {least}", value >= least, mean_depth=depth))
    for batch in (32, 1):
        value = ratio(rows[batch], "nobody leaves", "exits removed")
        name = f"nobody leaves (threshold 1) against exits removed, batch {batch}"
        figures.append(figure(name, value, "ratio of times", "<= 1.05", value <= 1.05))
    value = max(ratio(rows[32], "exits removed", name) for name in others)
    name = "full depth, packed, against the better of onnxruntime and Hugging Face eager, batch 32, real lengths"
    figures.append(figure(name, value, "ratio of times", "<= 0.9", value <= 0.9))
    name = f"closed-form policy step, {policy['rows']} rows, one alpha, states cached"
    figures.append(figure(name, policy["policy_s"], "s", f"<= {_POLICY_BAR_S:g}", policy["policy_s"] <= _POLICY_BAR_S))
    write_result(
        options.output,
        figures,
        {"timing": [rows[b] for b in BATCHES], "policy_step": policy, "answers_differ_by": differences},
        checkpoint=Path(options.checkpoint).name,
    )


if __name__ == "__main__":
    main()
