"""The GPU benchmark of decoders, on the CPU with a tiny model: what it writes, and that its arithmetic is right."""

from __future__ import annotations

import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from engine.bench import decoder_h100 as bench
from engine.bench import gpt_fast
from engine.bench.record import RESULTS
from engine.bench.report import calls_inside, may_wait
from engine.decoding import graph
from engine.generation import DecoderEngine
from tests.tiny import profiler_event as event

COMMITTED = RESULTS / "decoder_h100.json"


@pytest.fixture
def tiny():
    """An engine with the steps of a GPU's graphs, run one by one."""
    model = bench.random_decoder("tiny", torch.device("cpu"), torch.float32, 64)
    return DecoderEngine(model, executor="graph", private=True, cache_bytes=bench._cache_bytes(model, 3, 64))


def test_a_whole_run(tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    arguments = ["--shape", "tiny", "--device", "cpu", "--batches", "1", "3", "--prompt", "5", "--new-tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["decoder_h100", *arguments, "--rounds", "2", "--output", str(output)])
    monkeypatch.setattr(bench, "shipped_share", lambda: ({2: 0.5, 8: 0.5}, 8))
    bench.main()
    result = json.loads(output.read_text())
    rows = {(row["batch"], row["name"]): row for row in result["rows"]}
    several = (bench.REMOVED, bench.TRAINED, bench.GENERATED)
    alone = (*several, bench.NOBODY, bench.HALF, bench.EAGER)
    assert set(rows) == {*((1, name) for name in alone), *((3, name) for name in several)}
    for (batch, name), row in rows.items():
        few = max(4, 8 // 4) if name == bench.EAGER else 8
        assert len(row["decode_s"]) == 2
        step_ms = 1e3 * sum(row["decode_s"]) / 2 / (few - 1)
        assert row["ms_a_step"] == pytest.approx(step_ms)
        assert row["tokens_a_second"] == pytest.approx(1e3 * batch / step_ms)
        # Two rounds, and the one in front of them.
        assert (row["exits_compared"], row["exits_elsewhere"]) == (3 * batch * (few - 1), 0)
        assert row["kv_bytes"] == batch * 16 * 2 * 4 * 2 * 16 * 4  # a block of 16 positions a row
        assert row["exit_state_bytes"] == batch * 16 * 64 * 4
        assert (row["owed_settled"] > 0) == (name not in (bench.REMOVED, bench.NOBODY))
        assert "prompts" not in row
    figures = {f["name"]: f for f in result["figures"]}
    assert len(figures) == 10
    ratio = rows[1, bench.REMOVED]["ms_a_step"] / rows[1, bench.HALF]["ms_a_step"]
    assert figures["batch 1, mean depth L/2, times faster than full depth"]["value"] == pytest.approx(ratio)
    assert figures["batch 3, trained exits: ceiling / time"]["value"] == rows[3, bench.TRAINED]["of_ceiling"]
    for batch in (1, 3):
        found = figures[f"batch {batch}, trained exits, generated tokens: ceiling / time"]
        assert found["value"] == rows[batch, bench.GENERATED]["of_ceiling"] and found["bar"] == "-"
    found = figures["batch 3, involuntary exits and stays"]
    assert (found["value"], found["of"], found["bar"], found["met"]) == (0, 3 * 3 * 3 * 7, "0", True)
    found = figures["batch 1, mean depth L/2, exit states / keys and values"]
    assert found["value"] == 64 / (2 * 4 * 2 * 16) and found["owed_settled"] == rows[1, bench.HALF]["owed_settled"]
    hf = bench.SHAPES["tiny"]
    memory = result["memory"]["tiny"]
    assert memory["kv_bytes_a_position"] == 2 * hf["num_hidden_layers"] * 2 * 16 * 4
    assert memory["exit_state_bytes_a_position"] == hf["hidden_size"] * 4


def run_tiny(monkeypatch, output, *more):
    """Rows of one batch of one row, and the figures."""
    arguments = ["--shape", "tiny", "--device", "cpu", "--batches", "1", "--prompt", "5", "--new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["decoder_h100", *arguments, "--rounds", "1", "--output", str(output), *more])
    monkeypatch.setattr(bench, "shipped_share", lambda: ({2: 0.5, 8: 0.5}, 8))
    bench.main()
    result = json.loads(output.read_text())
    return {row["name"]: row for row in result["rows"]}, [f["name"] for f in result["figures"]]


def test_gpt_fast_that_fails_leaves_the_others(tmp_path, monkeypatch):
    """Files of those names that are not gpt-fast's; what they set, and where they look, must not stay."""
    (tmp_path / "model.py").write_text("raise RuntimeError('of another torch\\nand more')\n")
    (tmp_path / "generate.py").write_text("")
    (tmp_path / "COMMIT").write_text("abc1234\n")
    path = list(sys.path)
    rows, figures = run_tiny(monkeypatch, tmp_path / "with.json", "--gpt-fast", str(tmp_path))
    failed = rows.pop(bench.GPT_FAST)
    assert failed["error"] == "RuntimeError: of another torch" and "ms_a_step" not in failed
    assert failed["note"].startswith("gpt-fast abc1234, decode_one_token not compiled")
    assert sys.path == path and not {"model", "tokenizer"} & set(sys.modules)
    without, same = run_tiny(monkeypatch, tmp_path / "without.json")
    assert list(without) == list(rows) and figures == same


def test_gpt_fast_keeps_its_settings_to_itself(tmp_path):
    """What its generate.py sets at import holds for its own calls only: other competitors compile in the same run."""
    (tmp_path / "model.py").write_text("size = 3\n")
    (tmp_path / "generate.py").write_text(
        "import sys, torch._inductor.config as config\n"
        "from model import size\n"
        "from tokenizer import get_tokenizer\n"
        "config.coordinate_descent_tuning = not config.coordinate_descent_tuning\n"
        "sys.path.append('elsewhere')\n"
    )
    config = torch._inductor.config
    before, path = config.coordinate_descent_tuning, list(sys.path)
    _, generate, settings = gpt_fast.load(tmp_path)
    assert generate.size == 3 and settings == [{"coordinate_descent_tuning": not before}, {}]
    assert config.coordinate_descent_tuning is before and sys.path == path
    assert not {"model", "tokenizer"} & set(sys.modules)


def test_a_folder_without_gpt_fast_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "generate.py").write_text("")
    monkeypatch.setattr(bench, "random_decoder", None)
    with pytest.raises(ValueError, match=f"^{tmp_path} has no model.py: --gpt-fast must name a checkout of .*gpt-fast"):
        run_tiny(monkeypatch, tmp_path / "out.json", "--gpt-fast", str(tmp_path))


def test_gpt_fast_has_a_figure_where_it_was_measured(tmp_path):
    made = dict(prompt=5, new_tokens=8, machine={"gpu": "H"}, versions={}, date="d", commit="c1", memory={})
    times = {bench.REMOVED: 4.0, bench.NOBODY: 4.2, bench.HALF: 2.0}
    rows = [{"shape": "7b", "batch": 1, "name": name, "ms_a_step": ms} for name, ms in times.items()]
    own = {"shape": "7b", "batch": 1, "name": bench.GPT_FAST, "note": "gpt-fast abc"}
    files = [tmp_path / f"{k}.json" for k in range(3)]
    for file, found in zip(files, (rows, [own | {"ms_a_step": 6.0}], [own | {"error": "no room"}]), strict=True):
        file.write_text(json.dumps({**made, "rows": found}))
    name = "batch 1, full depth, times faster than gpt-fast"
    for merged, value in (files, 1.5), (files[::2], None), (files[:1], None):
        bench.merge(merged, tmp_path / "all.json")
        figures = {f["name"]: f for f in json.loads((tmp_path / "all.json").read_text())["figures"]}
        if value is None:
            assert name not in figures
        else:
            found = figures[name]
            assert (found["value"], found["ms_a_token"], found["note"]) == (value, 6.0, "gpt-fast abc")


def test_merged_files(tmp_path, monkeypatch):
    """A checkpoint's rows beside those of a shape; what was measured otherwise is refused."""
    made = dict(prompt=5, new_tokens=8, machine={"gpu": "H"}, versions={}, date="d", commit="c1", memory={"7b": 1})
    scripted = {bench.REMOVED: 4.0, bench.NOBODY: 4.2, bench.HALF: 2.0}
    rows = [{"shape": "7b", "batch": 1, "name": name, "ms_a_step": ms} for name, ms in scripted.items()]
    decided = {bench.REMOVED: 3.0, bench.DECIDED: 2.0}
    own = [{"shape": "mine", "batch": 8, "name": n, "ms_a_step": ms, "mean_depth": 7} for n, ms in decided.items()]
    one, two, other = (tmp_path / f"{k}.json" for k in range(3))
    one.write_text(json.dumps({**made, "rows": rows}))
    two.write_text(json.dumps({**made, "rows": own, "commit": "c2", "memory": {"mine": 2}}))
    other.write_text(json.dumps({**made, "rows": own, "prompt": 6}))
    bench.merge([one, two], tmp_path / "all.json")
    result = json.loads((tmp_path / "all.json").read_text())
    assert [row["commit"] for row in result["rows"]] == ["c1"] * 3 + ["c2"] * 2
    assert result["memory"] == {"7b": 1, "mine": 2}
    figures = {f["name"]: f for f in result["figures"]}
    assert figures["batch 1, mean depth L/2, times faster than full depth"]["value"] == 2.0
    mine = figures["mine, batch 8, its policies decide, times faster than full depth"]
    assert mine["value"] == 1.5 and mine["bar"] == "-" and mine["mean_depth"] == 7
    with pytest.raises(ValueError, match="prompt differs between the files: 5, 6"):
        bench.merge([one, other], tmp_path / "all.json")


def test_the_ceiling_counts_visited_layers_once_and_every_row_there():
    model = bench.random_decoder("tiny", torch.device("cpu"), torch.float32, 32)
    layer = sum(p.numel() for p in model.backbone.layers[0].parameters()) * 4
    head, position = 101 * 64 * 4, 2 * 2 * 16 * 4
    # Two rows, two steps behind the first token: depths (1, 3), then (2, 2).
    found = bench.ceiling_bytes(model, [[4, 1, 2], [4, 3, 2]], [10, 10])
    assert found == pytest.approx(3 * layer + 4 * 11 * position + head + 2 * layer + 4 * 12 * position + head)


def test_a_token_that_leaves_elsewhere_is_counted(tiny):
    script = [[4, 1, 2, 4], [4, 3, 3, 3]]
    options = dict(criterion="scripted", exit_layers=script)
    run = bench.Ours(tiny, [[5, 7], [9]], 4, [[4, 1, 3, 4], [4, 3, 2, 4]], **options)
    for calls in (1, 2):
        assert run() > 0
        assert run.taken == script and (run.compared, run.elsewhere) == (6 * calls, 3 * calls)
    assert run.row()["exits_elsewhere"] == 6
    decided = bench.Ours(tiny, [[5, 7]], 4, None)
    decided()
    assert set(decided.row()) == {"kv_bytes", "exit_state_bytes", "owed_settled"}


def test_memory_is_that_of_the_blocks_which_a_run_takes(tiny, monkeypatch):
    cache, least = tiny._packed().cache, []
    take = cache.take
    monkeypatch.setattr(cache, "take", lambda count: (take(count), least.append(cache.free_blocks))[0])
    run = bench.Ours(tiny, [[3] * 14, [3] * 2], 4, None)  # 17 positions, and 5
    run()
    blocks = cache.num_blocks - min(least)
    assert blocks == 3
    held = run.memory["kv_bytes"] + run.memory["exit_state_bytes"]
    assert held == blocks * cache.shape.block_bytes(torch.float32)


def test_what_the_host_does_in_steps(tiny, monkeypatch):
    """A CPU calls nothing of CUDA: stand-ins of the same names are found where they belong, and only there."""
    prompts, options = [[5, 7], [9]], dict(criterion="scripted", exit_layers=2)
    names = ("steps", "graph_launches", "kernel_launches", "synchronisations", "waits_for_results")
    assert bench.inside_a_step(tiny, prompts, 9, **options) == dict(zip(names, (8, 0, 0, 0, 0), strict=True))
    assert not {"launch", "launch_next"} & set(vars(tiny._packed()))

    def calling(owner, method, *calls):
        called = getattr(owner, method)

        def also(*arguments, **more):
            for name in calls:
                with torch.profiler.record_function(name):
                    pass
            return called(*arguments, **more)

        monkeypatch.setattr(owner, method, also)

    calling(graph._Program, "launch", "cudaGraphLaunch", "cudaMemcpyAsync")
    calling(graph._Launched, "wait", "cudaEventSynchronize")
    calling(graph.GraphDecoder, "prefill", "cudaDeviceSynchronize", "cudaLaunchKernel")
    assert tuple(bench.inside_a_step(tiny, prompts, 9, **options).values()) == (8, 8, 0, 0, 8)
    calling(graph._Program, "_fill", "cudaStreamSynchronize", "cuLaunchKernelEx")
    assert tuple(bench.inside_a_step(tiny, prompts, 9, **options).values()) == (8, 8, 8, 8, 8)


def test_calls_inside_a_span_are_the_hosts():
    events = [
        event("a", 0, 10), event("cudaGraphLaunch", 1, 2), event("aten::add", 2, 3), event("cudaFree", 4, 5),
        event("cudaMemcpy", 10, 11), event("b", 11, 12), event("cudaMemset", 11, 12), event("a", 20, 30),
        event("cuEventSynchronize", 20, 25), event("cuda_rows_kernel", 21, 22, "CUDA"),
        event("a", 40, 90, "CUDA"), event("cudaStreamSynchronize", 50, 60),
    ]  # fmt: skip
    found = calls_inside(events, "a")
    assert found == ["cudaGraphLaunch", "cudaFree", "cuEventSynchronize"]
    assert [may_wait(name) for name in found] == [False, True, True]
    assert calls_inside(events, "none") == []
    assert may_wait("cudaMemcpy") and may_wait("cuCtxSynchronize") and not may_wait("cudaMemcpyAsync")


class OnGpu:
    """What ``main`` asks of the device to know that it counts inside a step: a device that says it is a GPU."""

    type = "cuda"


def test_what_was_measured_outlives_what_follows(tmp_path, monkeypatch, capsys):
    """A fallback while calls are counted is an error in its row; a batch that fails leaves those in front of it."""
    output, cpu, model = tmp_path / "out.json", torch.device("cpu"), bench.random_decoder
    arguments = ["--shape", "tiny", "--batches", "2", "3", "--prompt", "5", "--new-tokens", "4", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["decoder_h100", *arguments, "--output", str(output)])
    monkeypatch.setattr(bench, "torch", SimpleNamespace(**vars(torch) | {"device": lambda name: OnGpu}))
    monkeypatch.setattr(bench, "random_decoder", lambda shape, _, __, positions: model(shape, cpu, torch.float32, 64))
    monkeypatch.setattr(bench, "memory_bandwidth", lambda _: 1e12)

    def falls_back(*_, **__):
        warnings.warn("the graph executor cannot serve here", stacklevel=1)

    class Fails(bench.Ours):
        def __call__(self):
            if len(self._prompts) == 3:
                raise UserWarning("no room for three")
            return super().__call__()

    monkeypatch.setattr(bench, "inside_a_step", falls_back)
    monkeypatch.setattr(bench, "Ours", Fails)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="no room for three"):
        bench.main()
    result = json.loads(output.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [bench.REMOVED, bench.TRAINED, bench.GENERATED, bench.INSIDE]
    assert rows[bench.INSIDE]["error"] == "UserWarning: the graph executor cannot serve here"
    assert {row["batch"] for row in result["rows"]} == {2} and result["memory"]["tiny"]["cache_bytes"] > 0
    assert (result["prompt"], result["new_tokens"]) == (5, 4)
    assert "out.json" not in capsys.readouterr().out


def test_figures_of_what_is_counted():
    clean = dict(steps=15, graph_launches=15, kernel_launches=0, synchronisations=0, waits_for_results=15)
    for shape, front in ("7b", ""), ("mine", "mine, "):
        for inside, waits, launches in (
            (clean, 0, 1),
            (clean | {"synchronisations": 2, "kernel_launches": 30}, 2, 3),
            ({"error": "RuntimeError: called a synchronizing CUDA operation"}, None, None),
        ):
            rows = [{"name": bench.REMOVED, "ms_a_step": 3.0, "exits_compared": 20, "exits_elsewhere": 0},
                    {"name": bench.DECIDED, "ms_a_step": 2.0, "mean_depth": 7, "prompts": "questions"},
                    {"name": bench.NOBODY, "ms_a_step": 2.0, "exits_compared": 10, "exits_elsewhere": 1},
                    {"name": bench.INSIDE, **inside}]  # fmt: skip
            found = {f["name"]: f for f in bench.figures([{"shape": shape, "batch": 8, **row} for row in rows])}
            assert len(found) == 4
            assert found[f"{front}batch 8, its policies decide, times faster than full depth"]["prompts"]
            met = waits == 0
            for name, value, bar in (("host synchronisations inside", waits, "0"), ("launches", launches, "1")):
                one = found[f"{front}batch 8, {name} a step"]
                assert (one["value"], one["bar"], one["met"]) == (value, bar, met)
            one = found[f"{front}batch 8, involuntary exits and stays"]
            assert (one["value"], one["of"], one["bar"], one["met"]) == (1, 30, "0", False)


def test_the_committed_file_merged_with_itself(tmp_path):
    """Rows that were measured before something was counted give the figures that they gave."""
    output = tmp_path / "all.json"
    known = json.loads(COMMITTED.read_text())
    bench.merge([COMMITTED, COMMITTED], output)
    found = json.loads(output.read_text())
    for name in ("figures", "rows", "prompt", "new_tokens", "memory", "commit"):
        assert found[name] == known[name], name


def test_new_cases_beside_those_of_an_older_file(tmp_path):
    """One from before generated tokens' exits, and exits elsewhere, were measured."""
    older, later, output = (tmp_path / f"{name}.json" for name in ("older", "later", "all"))
    committed = json.loads(COMMITTED.read_text())
    rows = [
        {k: v for k, v in row.items() if k not in ("exits_compared", "exits_elsewhere")}
        for row in committed["rows"]
        if row["name"] != bench.GENERATED
    ]
    older.write_text(json.dumps(committed | {"rows": rows}))
    bench.merge([older], output)
    known = json.loads(output.read_text())["figures"]
    trained = next(r for r in rows if (r["shape"], r["batch"], r["name"]) == ("7b", 8, bench.TRAINED))
    more = trained | {"name": bench.GENERATED, "of_ceiling": 0.5, "exits_compared": 9, "exits_elsewhere": 0}
    later.write_text(json.dumps(committed | {"rows": [more]}))
    bench.merge([older, later], output)
    figures = json.loads(output.read_text())["figures"]
    new = [f["name"] for f in figures if f not in known]
    assert new == ["batch 8, trained exits, generated tokens: ceiling / time", "batch 8, involuntary exits and stays"]
    assert [f for f in figures if f["name"] not in new] == known


def test_trained_exits_are_scaled():
    script = bench.trained_exits({3: 0.25, 15: 0.75}, 30, 32, 4001, 0)
    assert script[0] == 32 and set(script[1:]) == {3, 16}
    assert script[1:].count(16) / 4000 == pytest.approx(0.75, abs=0.03)


def test_the_shipped_decoder_has_a_distribution():
    share, layers = bench.shipped_share()
    assert layers == 30 and sum(share.values()) == pytest.approx(1, abs=1e-6)


def test_exits_of_what_the_shipped_decoder_reads_and_generates():
    """Its training counted answers alone, so both are about as deep."""
    found = {}
    for name, (share, layers) in {"read": bench.shipped_share(), "generated": bench.generated_share()}.items():
        assert layers == 30 and sum(share.values()) == pytest.approx(1, abs=1e-6)
        found[name] = sum(layer * part for layer, part in share.items())
    checkpoint = RESULTS.parents[1] / "checkpoints" / "dolly-smollm2"
    record = json.loads((checkpoint / "training.json").read_text())
    assert found["read"] == pytest.approx(record["result"]["test"]["points"]["0.5"]["mean_depth"])
    row = next(r for r in json.loads((RESULTS / "decoder_quality.json").read_text())["rows"]
               if r["method"] == "ConsistentEE" and r["value"] == record["alpha"])  # fmt: skip
    assert found["generated"] == pytest.approx(row["mean_depth"])
    assert record["config"]["answers_only"] and abs(found["read"] - found["generated"]) < 2


@pytest.mark.parametrize("layers", [30, 32, 40])
@pytest.mark.parametrize("shares", [bench.shipped_share, bench.generated_share])
def test_scaled_exits_keep_their_distribution(shares, layers):
    """No two exits fall together, the last one is full depth, and the mean is the same part of the depth."""
    share, trained = shares()
    script = bench.trained_exits(share, trained, layers, 40_001, 0)[1:]
    places = [max(1, round(layer * layers / trained)) for layer in share]
    assert len(set(places)) == len(share) and places[-1] == layers and set(script) <= set(places)
    for place, part in zip(places, share.values(), strict=True):
        assert script.count(place) / 40_000 == pytest.approx(part, abs=0.01)
    depth = sum(layer * part for layer, part in share.items())
    assert sum(script) / 40_000 / layers == pytest.approx(depth / trained, rel=0.02)
