"""Options of a call, one value or one per row: what they mean, and what a wrong one gets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import engine
from engine.criteria import Policy, Scripted
from tests.tiny import assert_same, every_exit, padded, random_rows, tiny_model

FP32 = dict(rtol=1e-5, atol=3e-5)
N = 40
ROWS = random_rows(N, seed=1)
BATCH = padded(ROWS)


@pytest.fixture(params=["packed", "reference"])
def runner(request, model):
    return engine.from_module(model, executor=request.param)


def expected_layers(model, rows, threshold=0.5, min_depth=1, max_depth=None, script=None) -> list[int]:
    """By hand, row by row: exit when pi > threshold, within the two limits."""
    exits, last = model.config.exit_layers, model.config.num_layers
    z = every_exit(model, rows).policy_logits

    def of(value, row, default):
        value = default if value is None else value
        return value if isinstance(value, (int, float)) else value[row]

    layers = []
    for row in range(len(rows)):
        for k, layer in enumerate(exits):
            if layer == last or layer == max(e for e in exits if e <= of(max_depth, row, last)):
                break
            wants = float(z[row, k].sigmoid()) > of(threshold, row, 0.5)
            if script is not None:
                wants = script[row] <= layer
            if wants and layer >= of(min_depth, row, 1):
                break
        layers.append(layer)
    return layers


def per_row(low: int, high: int, seed: int) -> list[int]:
    return torch.randint(low, high + 1, (N,), generator=torch.Generator().manual_seed(seed)).tolist()


# -- threshold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_threshold(model, runner, threshold):
    assert runner.run(BATCH, threshold=threshold).exit_layers.tolist() == expected_layers(model, ROWS, threshold)


def test_a_higher_threshold_is_never_shallower(runner):
    depths = [runner.run(BATCH, threshold=t).exit_layers for t in (0, 0.2, 0.5, 0.8, 0.99, 1)]
    assert all(bool((a <= b).all()) for a, b in zip(depths, depths[1:], strict=False))
    means = [float(d.float().mean()) for d in depths]
    assert means[0] == 1 and means[-1] == 4 and len(set(means)) == 6


def test_threshold_zero_and_one(model, runner):
    """At 0 everybody leaves at the first exit, at 1 nobody before the last layer: whatever the policy says."""
    with torch.no_grad():
        model.exits.policies[0].out.bias.fill_(-60)
        model.exits.policies[1].out.bias.fill_(200)  # sigmoid is 1 exactly in fp32
    assert runner.run(BATCH, threshold=0.0).exit_layers.tolist() == [1] * N
    assert runner.run(BATCH, threshold=0).exit_layers.tolist() == [1] * N
    assert runner.run(BATCH, threshold=1.0).exit_layers.tolist() == [4] * N
    assert runner.run(BATCH, threshold=1).exit_layers.tolist() == [4] * N
    assert runner.run(BATCH, threshold=[0.0, 1.0] * (N // 2)).exit_layers.tolist() == [1, 4] * (N // 2)


def test_the_comparison_is_strict(model, runner):
    """Exit when pi > threshold, so pi = 0.5 stays."""
    with torch.no_grad():
        for policy in model.exits.policies:
            policy.out.weight.zero_()
            policy.out.bias.zero_()
    assert runner.run(BATCH).exit_layers.tolist() == [4] * N
    with torch.no_grad():
        model.exits.policies[2].out.bias.fill_(1e-6)
    assert runner.run(BATCH).exit_layers.tolist() == [3] * N


def test_threshold_per_row(model, runner):
    threshold = torch.rand(N, generator=torch.Generator().manual_seed(2))
    want = expected_layers(model, ROWS, threshold.tolist())
    for given in (threshold, threshold.tolist(), tuple(threshold.tolist()), threshold.numpy(), threshold.double()):
        assert runner.run(BATCH, threshold=given).exit_layers.tolist() == want
        assert runner.run(BATCH, threshold=given, batch_tokens=200).exit_layers.tolist() == want


def test_the_models_threshold_is_the_default():
    model = tiny_model(threshold=0.9)
    runner = engine.from_module(model)
    assert runner.run(BATCH).exit_layers.tolist() == expected_layers(model, ROWS, 0.9)
    assert runner.run(BATCH, threshold=0.5).exit_layers.tolist() == expected_layers(model, ROWS, 0.5)
    assert runner.run(BATCH).exit_layers.tolist() == expected_layers(model, ROWS, 0.9), "an option outlived its call"


def test_the_models_config_is_read_at_every_run(model, runner):
    """Training sets the operating point it has chosen on the model; an engine made before must not keep the old one."""
    runner.run(BATCH)
    model.config = model.exits.config = dataclasses.replace(model.config, threshold=0.9)
    assert runner.run(BATCH).exit_layers.tolist() == expected_layers(model, ROWS, 0.9)
    assert runner.config.threshold == 0.9


# -- depth limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_min_depth(model, runner, depth):
    got = runner.run(BATCH, min_depth=depth)
    assert got.exit_layers.tolist() == expected_layers(model, ROWS, min_depth=depth)
    assert int(got.exit_layers.min()) >= depth
    assert_same(runner.run(BATCH, min_depth=[depth] * N), got, **FP32)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_max_depth(model, runner, depth):
    got = runner.run(BATCH, max_depth=depth)
    assert got.exit_layers.tolist() == expected_layers(model, ROWS, max_depth=depth)
    assert int(got.exit_layers.max()) <= depth
    assert_same(runner.run(BATCH, max_depth=torch.full((N,), depth)), got, **FP32)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_equal_limits_fix_the_depth(runner, depth):
    for threshold in (0.0, 0.5, 1.0):
        got = runner.run(BATCH, min_depth=depth, max_depth=depth, threshold=threshold)
        assert got.exit_layers.tolist() == [depth] * N
        assert got.exit_probabilities.tolist() == [1.0] * N


def test_limits_per_row(model, runner):
    for seed in range(4):
        most = per_row(1, 4, seed)
        least = [min(a, b) for a, b in zip(most, per_row(1, 4, seed + 10), strict=True)]
        threshold = torch.rand(N, generator=torch.Generator().manual_seed(seed)).tolist()
        want = expected_layers(model, ROWS, threshold, least, most)
        for batch_tokens in (10**6, 150):
            got = runner.run(BATCH, threshold=threshold, min_depth=least, max_depth=most, batch_tokens=batch_tokens)
            assert got.exit_layers.tolist() == want
        assert runner.run(BATCH, min_depth=np.array(least)).exit_layers.tolist() == expected_layers(
            model, ROWS, min_depth=least
        )
        assert runner.run(BATCH, min_depth=1, max_depth=torch.tensor(most)).exit_layers.tolist() == expected_layers(
            model, ROWS, max_depth=most
        )


def test_max_depth_between_exits_means_the_deepest_before_it():
    model = tiny_model(exit_layers=(2, 4), layers=4)
    for executor in ("packed", "reference"):
        runner = engine.from_module(model, executor=executor)
        assert runner.run(BATCH, max_depth=3, threshold=1.0).exit_layers.tolist() == [2] * N
        assert runner.run(BATCH, max_depth=[2, 3, 4, 4] * 10, threshold=1.0).exit_layers.tolist() == [2, 2, 4, 4] * 10
        assert runner.run(BATCH, min_depth=3, threshold=0.0).exit_layers.tolist() == [4] * N
        with pytest.raises(ValueError, match="max_depth.* 2.*first exit.* 4.* 1"):
            runner.run(BATCH, max_depth=1)
        # Row 1 may not leave at 2 but must not go beyond 3: there is no exit it could take.
        with pytest.raises(ValueError, match=r"row 1 .*3 \(min_depth\).*2 .*\[2, 4\]"):
            runner.run(BATCH, min_depth=[1, 3] * 20, max_depth=3)


def test_rows_do_not_go_deeper_than_the_deepest_limit(model, monkeypatch):
    """max_depth saves the layers behind it (op by op, where they can be counted)."""
    from engine.executors.weights import EncoderWeights, LayerWeights

    calls = []
    monkeypatch.setattr(EncoderWeights, "plan", None)
    original = LayerWeights.finish
    monkeypatch.setattr(LayerWeights, "finish", lambda *args: (calls.append(1), original(*args))[1])
    runner = engine.from_module(model)
    calls.clear()
    runner.run(BATCH, max_depth=1)
    assert len(calls) == 1
    calls.clear()
    runner.run(BATCH, max_depth=[1, 2] * 20, threshold=1.0)
    assert len(calls) <= 4


# -- exit probabilities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(threshold=0.8), dict(min_depth=2), dict(criterion="scripted")])
def test_exit_probabilities(model, runner, options):
    """The policy's, at the exit taken; 1 at the last layer."""
    if "criterion" in options:
        options = {**options, "exit_layers": per_row(1, 4, 3)}
    got = runner.run(BATCH, **options)
    z = every_exit(model, ROWS).policy_logits
    for row, layer in enumerate(got.exit_layers.tolist()):
        want = 1.0 if layer == 4 else float(z[row, layer - 1].sigmoid())
        assert float(got.exit_probabilities[row]) == pytest.approx(want, abs=1e-5)
        if layer < 4 and "criterion" not in options:
            assert float(got.exit_probabilities[row]) > options.get("threshold", 0.5)
    assert got.exit_probabilities.dtype == torch.float32


def test_exit_probability_is_one_where_a_row_had_to_leave(model, runner):
    """Whatever its policy says there; rows that left before their limit keep the policy's."""
    limits = per_row(1, 4, 4)
    got = runner.run(BATCH, max_depth=limits)
    z = every_exit(model, ROWS).policy_logits
    forced = 0
    for row, (layer, limit) in enumerate(zip(got.exit_layers.tolist(), limits, strict=True)):
        if layer == limit:
            assert float(got.exit_probabilities[row]) == 1.0
            forced += 1
        else:
            assert float(got.exit_probabilities[row]) == pytest.approx(float(z[row, layer - 1].sigmoid()), abs=1e-5)
    assert 0 < forced < N


# -- scripted ----------------------------------------------------------------------------------------------------


def test_scripted(model, runner):
    script = per_row(1, 4, 5)
    tensor = torch.tensor(script)
    for given in (script, tuple(script), tensor, tensor.int(), tensor.to(torch.uint8), np.array(script)):
        assert runner.run(BATCH, criterion="scripted", exit_layers=given).exit_layers.tolist() == script
    assert runner.run(BATCH, criterion=Scripted(), exit_layers=3).exit_layers.tolist() == [3] * N
    got = runner.run(BATCH, criterion="scripted", exit_layers=script, min_depth=2, max_depth=3)
    assert got.exit_layers.tolist() == [min(max(layer, 2), 3) for layer in script]
    assert_same(runner.run(BATCH), runner.run(BATCH, criterion="policy"), atol=0)
    assert_same(runner.run(BATCH), runner.run(BATCH, criterion=Policy()), atol=0)


def test_a_model_whose_criterion_is_scripted():
    runner = engine.from_module(tiny_model(criterion="scripted"))
    assert runner.run(BATCH, exit_layers=2).exit_layers.tolist() == [2] * N
    with pytest.raises(ValueError, match="exit_layers"):
        runner.run(BATCH)
    assert runner.run([], exit_layers=[]).labels == []
    assert int(runner.run(BATCH, criterion="policy").exit_layers.max()) == 4


# -- what is refused ---------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "threshold 1.5": (dict(threshold=1.5), ValueError, ["threshold", "[0, 1]", "1.5"]),
    "threshold -0.1": (dict(threshold=-0.1), ValueError, ["threshold", "[0, 1]", "-0.1"]),
    "threshold NaN": (dict(threshold=float("nan")), ValueError, ["threshold", "[0, 1]", "nan"]),
    "threshold infinite": (dict(threshold=float("inf")), ValueError, ["threshold", "[0, 1]", "inf"]),
    "threshold astronomic": (dict(threshold=10**400), (ValueError, TypeError), ["threshold"]),
    "thresholds astronomic": (dict(threshold=[10**400] * N), TypeError, ["threshold", "number"]),
    "thresholds beyond fp32": (dict(threshold=[1e300] * N), ValueError, ["threshold", "[0, 1]", "inf", "row 0"]),
    "threshold of row 7": (dict(threshold=[0.5] * 7 + [2.0] + [0.5] * 32), ValueError, ["threshold", "2", "row 7"]),
    "threshold text": (dict(threshold="0.5"), TypeError, ["threshold", "number", "str", "0.5"]),
    "threshold bool": (dict(threshold=True), TypeError, ["threshold", "number", "bool"]),
    "thresholds text": (dict(threshold=["a"] * N), TypeError, ["threshold", "number"]),
    "thresholds None": (dict(threshold=[None] * N), TypeError, ["threshold", "number"]),
    "thresholds complex": (dict(threshold=[0.5j] * N), TypeError, ["threshold", "number"]),
    "thresholds bool": (dict(threshold=[True] * N), TypeError, ["threshold", "number"]),
    "too few thresholds": (dict(threshold=[0.5] * 3), ValueError, ["threshold", "[3]", f"{N} rows"]),
    "a column of thresholds": (dict(threshold=torch.zeros(N, 1)), ValueError, ["threshold", f"[{N}, 1]", f"{N} rows"]),
    "min_depth 0": (dict(min_depth=0), ValueError, ["min_depth", "between 1", "4", "got 0"]),
    "min_depth 5": (dict(min_depth=5), ValueError, ["min_depth", "between 1", "4", "got 5"]),
    "min_depth of row 3": (dict(min_depth=[1, 1, 1, 9] * 10), ValueError, ["min_depth", "got 9", "row 3"]),
    "min_depth 2.0": (dict(min_depth=2.0), TypeError, ["min_depth", "integer", "float"]),
    "min_depths 2.0": (dict(min_depth=[2.0] * N), TypeError, ["min_depth", "integer", "float"]),
    "min_depth bool": (dict(min_depth=True), TypeError, ["min_depth", "integer", "bool"]),
    "min_depth text": (dict(min_depth="2"), TypeError, ["min_depth", "integer", "str"]),
    "min_depth beyond int32": (dict(min_depth=2**40), ValueError, ["min_depth", str(2**40)]),
    "min_depths beyond int32": (dict(min_depth=[2**32 + 1] * N), ValueError, ["min_depth", str(2**32 + 1)]),
    "min_depths astronomic": (dict(min_depth=[10**400] * N), TypeError, ["min_depth", "integer"]),
    "too many min_depths": (dict(min_depth=[1] * (N + 1)), ValueError, ["min_depth", f"[{N + 1}]", f"{N} rows"]),
    "max_depth 0": (dict(max_depth=0), ValueError, ["max_depth", "between 1", "4", "got 0"]),
    "max_depth 5": (dict(max_depth=5), ValueError, ["max_depth", "between 1", "4", "got 5"]),
    "max_depths bool": (dict(max_depth=[True] * N), TypeError, ["max_depth", "integer", "bool"]),
    "max_depths beyond int32": (dict(max_depth=torch.full((N,), 2**32 + 2)), ValueError, ["max_depth", str(2**32 + 2)]),
    "min above max": (dict(min_depth=3, max_depth=2), ValueError, ["row 0", "3", "min_depth", "2", "max_depth"]),
    "min above max in row 5": (
        dict(min_depth=[1] * 5 + [4] + [1] * 34, max_depth=3), ValueError,
        ["row 5", "4", "min_depth", "3", "max_depth"],
    ),
    "criterion unknown": (dict(criterion="entropy"), ValueError, ["criterion", "policy", "scripted", "entropy"]),
    "criterion a class": (dict(criterion=Policy), ValueError, ["criterion", "policy", "scripted"]),
    "criterion a number": (dict(criterion=3), ValueError, ["criterion", "policy", "scripted", "3"]),
    "scripted without layers": (dict(criterion="scripted"), ValueError, ["scripted", "exit_layers"]),
    "layers without scripted": (dict(exit_layers=2), ValueError, ["exit_layers", "scripted", "policy"]),
    "script of no exit": (
        dict(criterion="scripted", exit_layers=[1, 7] * 20), ValueError, ["exit_layers[1]", "7", "[1, 2, 3, 4]"],
    ),
    "script 0": (dict(criterion="scripted", exit_layers=0), ValueError, ["exit_layers[0]", "0", "[1, 2, 3, 4]"]),
    "script 1.5": (dict(criterion="scripted", exit_layers=[1.5] * N), TypeError, ["exit_layers", "integer", "float"]),
    "script beyond int32": (
        dict(criterion="scripted", exit_layers=[2**32 + 1] * N), ValueError, ["exit_layers", str(2**32 + 1)],
    ),
    "short script": (dict(criterion="scripted", exit_layers=[1, 2]), ValueError, ["exit_layers", "[2]", f"{N} rows"]),
    "batch_tokens 0": (dict(batch_tokens=0), ValueError, ["batch_tokens", "positive", "0"]),
    "batch_tokens -5": (dict(batch_tokens=-5), ValueError, ["batch_tokens", "positive", "-5"]),
    "batch_tokens 1.5": (dict(batch_tokens=1.5), (ValueError, TypeError), ["batch_tokens", "integer", "1.5"]),
    "batch_tokens text": (dict(batch_tokens="all"), (ValueError, TypeError), ["batch_tokens", "integer", "all"]),
    "batch_tokens bool": (dict(batch_tokens=True), (ValueError, TypeError), ["batch_tokens", "integer", "True"]),
    "unknown keyword": (dict(treshold=0.5), TypeError, ["treshold"]),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(packed, case, monkeypatch):
    """The error, before any row is computed, and no change of state."""
    options, error, fragments = BAD_OPTIONS[case]
    before = packed.run(BATCH)
    with monkeypatch.context() as patch:
        patch.setattr(packed.executor, "run", lambda *args: pytest.fail("work was done before the check"))
        with pytest.raises(error) as caught:
            packed.run(BATCH, **options)
    for fragment in fragments:
        assert fragment in str(caught.value), f"{fragment!r} is not in: {caught.value}"
    assert_same(packed.run(BATCH), before, atol=0)


def test_equal_values_of_another_type_are_still_refused(packed):
    """1, 1.0 and True are equal, and not equally allowed: what was remembered of one must not serve the others."""
    packed.run(BATCH, min_depth=1, max_depth=1, threshold=1)
    for wrong in (dict(min_depth=True), dict(min_depth=1.0), dict(max_depth=1.0), dict(threshold=True)):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            packed.run(BATCH, **{"min_depth": 1, "max_depth": 1, "threshold": 1, **wrong})


def test_options_are_not_positional(packed):
    with pytest.raises(TypeError):
        packed.run(BATCH, 0.5)


def test_the_callers_options_are_not_changed(packed):
    threshold = torch.full((N,), 0.4)
    least, most = torch.ones(N, dtype=torch.int32), torch.full((N,), 3, dtype=torch.int32)
    packed.run(BATCH, threshold=threshold, min_depth=least, max_depth=most, batch_tokens=100)
    assert threshold.tolist() == [pytest.approx(0.4)] * N and least.tolist() == [1] * N and most.tolist() == [3] * N


def test_numpy_scalars_are_numbers(packed):
    """What a sweep over np.linspace or np.arange yields."""
    assert_same(packed.run(BATCH, threshold=np.float64(0.4)), packed.run(BATCH, threshold=0.4), atol=0)
    assert_same(packed.run(BATCH, threshold=np.float32(0.5)), packed.run(BATCH), atol=0)
    assert_same(packed.run(BATCH, min_depth=np.int64(2)), packed.run(BATCH, min_depth=2), **FP32)
    assert_same(packed.run(BATCH, threshold=torch.tensor(0.5)), packed.run(BATCH), atol=0)
    assert_same(packed.run(BATCH, max_depth=torch.tensor(2)), packed.run(BATCH, max_depth=2), **FP32)
