"""``engine.load(ckpt).run(batch)``: what comes out, and what the package imports to get there."""

from __future__ import annotations

import ast
import io
import math
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import engine
from engine import executors
from engine.results import _softmax
from tests.tiny import LABELS, assert_same, every_exit, padded, random_rows, random_texts, tiny_backbone, tiny_model

FP32 = dict(rtol=1e-5, atol=3e-5)
ROOT = Path(engine.__file__).parent


# -- results -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["packed", "reference"])
def test_results(model, executor):
    rows = random_rows(50, seed=1)
    got = engine.from_module(model, executor=executor).run(padded(rows))
    assert isinstance(got, engine.Classification) and isinstance(got.stats, engine.RunStats)
    assert len(got) == len(got.labels) == 50
    assert got.logits.shape == got.probabilities.shape == (50, 3)
    assert got.label_ids.shape == got.exit_layers.shape == got.exit_probabilities.shape == (50,)
    assert got.logits.dtype == got.probabilities.dtype == got.exit_probabilities.dtype == torch.float32
    assert (got.label_ids.dtype, got.exit_layers.dtype) == (torch.int64, torch.int32)
    assert all(getattr(got, name).device.type == "cpu" for name in ("logits", "label_ids", "exit_layers"))

    out = every_exit(model, rows)
    for row, layer in enumerate(got.exit_layers.tolist()):
        torch.testing.assert_close(got.logits[row], out.logits[row, layer - 1], **FP32)
    torch.testing.assert_close(got.probabilities, got.logits.softmax(-1))
    assert torch.equal(got.label_ids, got.logits.argmax(-1))
    assert got.labels == [LABELS[i] for i in got.label_ids.tolist()]
    assert repr(got).startswith("Classification(50 rows: [") and got.labels is got.labels

    stats, layers = got.stats, got.exit_layers.tolist()
    assert (stats.rows, stats.tokens, stats.num_layers) == (50, sum(map(len, rows)), 4)
    assert stats.exit_histogram == {layer: layers.count(layer) for layer in (1, 2, 3, 4)}
    assert min(stats.exit_histogram.values()) > 0
    assert stats.mean_depth == pytest.approx(sum(layers) / 50)
    assert stats.saved_layers == pytest.approx(1 - sum(layers) / 50 / 4)
    assert 0 < stats.wall_time_s < 60 and stats.micro_batches >= 1


def test_histogram_names_every_exit_and_no_other_layer():
    runner = engine.from_module(tiny_model(exit_layers=(2, 4)))
    got = runner.run(padded(random_rows(5)), min_depth=4)
    assert got.stats.exit_histogram == {2: 0, 4: 5}
    assert math.isnan(runner.run([]).stats.mean_depth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_results_are_fp32_whatever_the_model_is(model, dtype):
    got = engine.from_module(model.to(dtype)).run(padded(random_rows(9)))
    assert got.logits.dtype == got.probabilities.dtype == got.exit_probabilities.dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 2, 300])
def test_probabilities_are_the_softmax_of_the_logits(rows):
    """Whatever computes them: large, equal and infinite logits too, and nothing is warned about."""
    logits = torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows)) * 30
    logits[0] = 4.0
    torch.testing.assert_close(_softmax(logits), logits.softmax(-1), rtol=1e-6, atol=1e-7)
    logits[0, 2] = torch.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(_softmax(logits), logits.softmax(-1), rtol=1e-6, atol=1e-7, equal_nan=True)


def test_results_may_be_used_in_further_computation(packed):
    """A caller who weighs, trains on or edits what came out holds ordinary tensors."""
    got = packed.run(padded(random_rows(6)))
    scale = torch.ones(3, requires_grad=True)
    (got.logits * scale).sum().backward()
    got.probabilities.mul_(2)
    got.exit_layers.add_(1)


def test_results_come_in_the_callers_order(model, packed, tokenizer):
    """Long lists are sorted by length and cut; whatever the cut, entry i is text i."""
    texts = random_texts(120, seed=3)
    one_by_one = [packed.run([text]) for text in texts[::10]]
    for batch_tokens in (None, 64, 10**6):
        got = packed.run(texts, batch_tokens=batch_tokens)
        assert got.labels[::10] == [x.labels[0] for x in one_by_one]
        torch.testing.assert_close(got.logits[::10], torch.cat([x.logits for x in one_by_one]), **FP32)
        assert got.exit_layers[::10].tolist() == [int(x.exit_layers) for x in one_by_one]
        assert got.stats.tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert packed.run(texts).stats.micro_batches > 1 or sum(len(t.split()) for t in texts) < 2048


def test_equal_texts_get_equal_results(packed):
    got = packed.run(["how to join a table"] * 60, batch_tokens=40)
    assert len(set(got.labels)) == 1 and len(set(got.exit_layers.tolist())) == 1
    torch.testing.assert_close(got.logits, got.logits[:1].expand(60, -1), **FP32)


def test_repeated_runs_are_equal(packed):
    texts = random_texts(30, seed=4)
    first = packed.run(texts)
    for _ in range(3):
        assert_same(packed.run(texts), first, atol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_one_run_do_not_matter(packed, threads):
    rows = padded(random_rows(60, seed=6))
    torch.set_num_threads(1)
    want = packed.run(rows)
    torch.set_num_threads(threads)
    assert_same(packed.run(rows), want, **FP32)


def test_progress_bar(packed, monkeypatch):
    """Shown when asked, or on a terminal after a second; never in a pipe."""
    texts = random_texts(20)
    cases = (True, False, True), (False, True, False), (None, False, False), (None, True, False)
    for progress, terminal, shown in cases:
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        packed.run(texts, batch_tokens=60, progress=progress)
        assert ("20/20" in stream.getvalue()) == shown, (progress, terminal, stream.getvalue())


def test_progress_bar_on_a_terminal_after_a_second(packed, monkeypatch):
    run = packed.executor.run
    monkeypatch.setattr(packed.executor, "run", lambda *args: (time.sleep(0.15), run(*args))[1])
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    packed.run(["how to join a table"] * 10, batch_tokens=7)
    assert "row" in stream.getvalue()


# -- engines -----------------------------------------------------------------------------------------------------


def test_from_module_wants_a_multi_exit_model(model):
    for wrong in (tiny_backbone(), torch.nn.Linear(2, 2), None, "bert"):
        with pytest.raises(TypeError, match=f"MultiExitDecoder, got {type(wrong).__name__}"):
            engine.from_module(wrong)
    for executor in ("fast", "", None, 3):
        with pytest.raises((ValueError, TypeError), match="auto, packed, reference"):
            engine.from_module(model, executor=executor)


def test_executors_by_name(model):
    names = {name: engine.from_module(model, executor=name).executor.name for name in ("auto", "packed", "reference")}
    assert names == {"auto": "packed", "packed": "packed", "reference": "reference"}


@pytest.mark.parametrize("text", ["CUDA: launch_batch: out of memory", "CUDA error: out of memory"])
def test_memory_that_the_driver_lacks_halves_a_batch(packed, monkeypatch, text):
    """torch's allocator has an error of its own; what the driver says comes as text."""
    batch, submit, sizes = padded(random_rows(8, seed=2)), packed.executor.submit, []

    def small_only(rows, options):
        sizes.append(len(rows))
        if len(rows) > 4:
            raise RuntimeError(text)
        return submit(rows, options)

    whole = packed.run(batch)
    monkeypatch.setattr(packed.executor, "submit", small_only)
    assert_same(packed.run(batch), whole, **FP32)
    assert sizes == [8, 4, 4]


def test_auto_is_graph_on_cuda(monkeypatch):
    monkeypatch.setattr(executors, "prepare", lambda device: None)
    assert executors.executor_class("auto", torch.device("cuda")).name == "graph"


def test_repr_says_what_it_is(packed):
    for part in ("bert", "4 layers", "[1, 2, 3, 4]", "3 classes", "packed", "cpu", "float32"):
        assert part in repr(packed)
    assert packed.config is packed.model.config


def test_public_surface():
    assert set(engine.__all__) >= {"load", "from_module", "Engine", "Classification", "RunStats", "EarlyExitConfig"}
    assert all(hasattr(engine, name) for name in engine.__all__)
    assert isinstance(engine.__version__, str)


# -- who may import whom -----------------------------------------------------------------------------------------


def modules_of(folder: str = "") -> list[Path]:
    """Python files of the engine package, links followed one level."""
    top = ROOT / folder
    return sorted(p for d in [top, *(x for x in top.iterdir() if x.is_dir())] for p in d.glob("*.py"))


def imports_of(path: Path, everywhere: bool = True) -> set[str]:
    """Absolute names imported by a file: all of it, or only at import time (outside functions)."""
    names = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        elif not everywhere and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


def starts(names: set[str], *prefixes: str) -> set[str]:
    return {name for name in names if any(name == p or name.startswith(p + ".") for p in prefixes)}


@pytest.mark.parametrize("path", modules_of("kernels"), ids=lambda p: p.name)
def test_kernels_know_tensors_only(path):
    names = imports_of(path)
    assert starts(names, "engine") == starts(names, "engine.kernels")
    assert not starts(names, "transformers", "peft", "kernels")


@pytest.mark.parametrize("path", modules_of("models"), ids=lambda p: p.name)
def test_models_know_no_executor(path):
    assert not starts(imports_of(path), "engine.executors", "engine.api", "engine.train", "engine.bench")


@pytest.mark.parametrize(
    "path",
    [p for p in modules_of() if not {"train", "bench"} & set(p.relative_to(ROOT).parts)],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_the_engine_does_not_know_training_or_benchmarks(path):
    """The command line alone may, and only inside its functions."""
    is_cli = path.name == "cli.py"
    assert not starts(imports_of(path, everywhere=not is_cli), "engine.train", "engine.bench")


def test_importing_the_engine_loads_neither_training_nor_benchmarks():
    names = [
        ".".join(("engine", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for p in modules_of()
        if not {"train", "bench"} & set(p.relative_to(ROOT).parts)
    ]
    program = (
        "import sys, importlib\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print([m for m in sys.modules if m.startswith(('engine.train', 'engine.bench', 'peft', 'matplotlib'))])\n"
        "print(sorted(m for m in sys.modules if m.startswith('engine.kernels.')) != [])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT.parent, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "True"]


def test_warmup_is_checked_and_changes_nothing_on_a_cpu(checkpoint):
    for wrong in ([(1, 2, 3)], [(1.0, 2)], [True], [4]):
        with pytest.raises(TypeError, match="warmup must hold pairs"):
            engine.load(checkpoint, warmup=wrong)
    for wrong in ([(0, 5)], [(8, 5)]):
        with pytest.raises(ValueError, match="a batch of . rows has . to .* tokens and at least one row, got 5"):
            engine.load(checkpoint, warmup=wrong)
    rows = {"input_ids": [[2, 7, 3]], "attention_mask": [[1, 1, 1]]}
    for executor in ("packed", "graph"):
        warm = engine.load(checkpoint, executor=executor, warmup=[(1, 16), (4, 64)])
        cold = engine.load(checkpoint, executor=executor)
        assert torch.equal(warm.run(rows).logits, cold.run(rows).logits)
    assert warm.executor._programs


def test_nothing_is_captured_for_batches_that_were_prepared_for(model):
    fast, oracle = (engine.from_module(model, executor=name) for name in ("graph", "reference"))
    fast.executor.weights.watching = False
    fast.warm_up(16, 256)
    made = set(fast.executor._programs)
    for rows, length in ((16, 16), (9, 17), (8, 16), (15, 12), (12, 20)):
        ids = torch.randint(5, 60, (rows, length))
        for types in (None, torch.randint(0, 2, (rows, length))):
            batch = {"input_ids": ids} | ({} if types is None else {"token_type_ids": types})
            got, want = fast.run(batch), oracle.run(batch)
            assert torch.equal(got.exit_layers, want.exit_layers)
            torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=3e-5)
    assert set(fast.executor._programs) == made
    fast.run({"input_ids": torch.randint(5, 60, (3, 16))})
    assert len(fast.executor._programs) == len(made) + 1


def test_a_small_batch_is_prepared_for_behind_a_large_one(model):
    fast = engine.from_module(model, executor="graph")
    fast.warm_up(16, 256)
    fast.warm_up(8, 128)
    made = set(fast.executor._programs)
    assert len(made) == 2
    fast.run({"input_ids": torch.randint(5, 60, (5, 16))})
    assert set(fast.executor._programs) == made


def test_softmax_ignores_the_callers_floating_point_errors(model):
    packed = engine.from_module(model, executor="packed")
    with torch.no_grad():
        model.exits.classifiers[-1].weight.mul_(1e4)
    with np.errstate(all="raise"):
        found = packed.run({"input_ids": torch.randint(5, 60, (3, 9))}, min_depth=model.config.num_layers)
    assert bool(found.probabilities.isfinite().all())


@pytest.mark.parametrize("executor", ["packed", "graph", "reference"])
def test_results_share_no_memory(model, executor):
    got = engine.from_module(model, executor=executor).run({"input_ids": torch.randint(5, 60, (3, 9))})
    weight = torch.ones(3, requires_grad=True)
    loss = (got.logits * weight).sum()
    got.exit_layers.add_(1)
    got.exit_probabilities.add_(1)
    loss.backward()
