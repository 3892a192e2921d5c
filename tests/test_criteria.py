"""The protocol between criteria and executors: what a criterion is given, and that its state follows its rows."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import engine
from engine.criteria import Criterion, ExitReading, Policy, Scripted, Swept, log_odds, make_criterion
from engine.criteria.base import check_threshold
from engine.executors import packed as packed_module
from tests.tiny import every_exit, padded, random_rows, tiny_model

FP32 = dict(rtol=1e-5, atol=3e-5)
ROWS = random_rows(50, seed=1)


@pytest.fixture(params=["packed, whole layers", "packed, first tokens", "reference"])
def executor(request, monkeypatch):
    monkeypatch.setattr(packed_module, "_SECOND_PASS_TOKENS", -1.0 if "first" in request.param else math.inf)
    return request.param.partition(",")[0]


# -- the two that are shipped ------------------------------------------------------------------------------------


def test_by_name():
    assert isinstance(make_criterion("policy"), Policy) and isinstance(make_criterion("scripted"), Scripted)
    given = Policy()
    assert make_criterion(given) is given
    for wrong in ("entropy", None, Policy, 3):
        with pytest.raises(ValueError, match="policy, scripted or a Criterion"):
            make_criterion(wrong)


def test_what_they_declare():
    assert Policy.needs_policy and not Policy.needs_classifier
    assert Policy.swept == Swept(0.0, 1.0, higher_is_deeper=True)
    assert Scripted.needs_policy, "a timing with scripted exits must include the policy"
    assert Scripted.swept is None
    assert all(c().may_decide(layer) for c in (Policy, Scripted) for layer in range(1, 13))


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_policy_decides_by_probability(threshold):
    z = torch.linspace(-20, 20, 401)
    state = Policy().begin(torch.full((401,), threshold), None)
    leave = Policy().decide(ExitReading(1, torch.zeros(401, 1), z, None), state)
    clear = (z.double().sigmoid() - threshold).abs() > 1e-6
    assert torch.equal(leave[clear], (z.double().sigmoid() > threshold)[clear])
    assert leave.dtype == torch.bool and leave.shape == (401,)
    if threshold in (0, 1):
        assert leave.tolist() == [threshold == 0] * 401


def test_policy_at_the_ends_holds_for_saturated_logits():
    z = torch.tensor([-1e30, -200.0, 200.0, 1e30, 3e38])
    for threshold, leaves in ((0.0, True), (1.0, False)):
        state = Policy().begin(torch.full((5,), threshold), None)
        assert Policy().decide(ExitReading(1, torch.zeros(5, 1), z, None), state).tolist() == [leaves] * 5


def test_scripted_decides_by_layer():
    layers = torch.tensor([1, 2, 3, 4], dtype=torch.int32)
    state = Scripted().begin(torch.zeros(4), layers)
    for layer in (1, 2, 3):
        assert Scripted().decide(ExitReading(layer, torch.zeros(4, 1), None, None), state).tolist() == [
            x <= layer for x in (1, 2, 3, 4)
        ]
    with pytest.raises(ValueError, match="exit_layers"):
        Scripted().begin(torch.zeros(4), None)


def test_check_threshold():
    check_threshold(Policy(), torch.tensor([0.0, 0.5, 1.0]))
    check_threshold(Scripted(), torch.tensor([7.0]))
    check_threshold(Policy(), torch.empty(0))
    with pytest.raises(ValueError, match=r"\[0, 1\] for the policy criterion, got 1.5 \(row 2\)"):
        check_threshold(Policy(), torch.tensor([0.0, 0.5, 1.5]))
    with pytest.raises(ValueError, match="nan"):
        check_threshold(Policy(), torch.tensor([float("nan")]))


# -- criteria of a caller ----------------------------------------------------------------------------------------


class Patience(Criterion):
    """PABEE: leave when the same class was predicted ``threshold`` times more in a row. It has state."""

    name = "patience"
    needs_classifier = True
    swept = Swept(1.0, 11.0, higher_is_deeper=True)

    def begin(self, threshold, exit_layers):
        return {
            "patience": threshold,
            "count": torch.zeros_like(threshold),
            "last": torch.full_like(threshold, -1, dtype=torch.int64),
        }

    def decide(self, reading, state):
        prediction = reading.class_logits.argmax(-1)
        state["count"] = torch.where(prediction == state["last"], state["count"] + 1, 0)
        state["last"] = prediction
        return state["count"] >= state["patience"]


def patience_by_hand(model, rows, patience: float) -> list[int]:
    predictions = every_exit(model, rows).logits.argmax(-1)
    layers = []
    for row in predictions.tolist():
        count, depth = 0, len(row)
        for k in range(1, len(row) - 1):
            count = count + 1 if row[k] == row[k - 1] else 0
            if count >= patience:
                depth = k + 1
                break
        layers.append(depth)
    return layers


@pytest.fixture(scope="module")
def deep():
    return tiny_model(layers=6)


@pytest.mark.parametrize("patience", [1, 2])
def test_state_follows_its_rows(deep, executor, patience):
    """Counters of the survivors stay theirs while others leave around them."""
    runner = engine.from_module(deep, executor=executor)
    want = patience_by_hand(deep, ROWS, patience)
    assert len(set(want)) >= 3
    for batch_tokens in (10**6, 200):
        got = runner.run(padded(ROWS), criterion=Patience(), threshold=patience, batch_tokens=batch_tokens)
        assert got.exit_layers.tolist() == want
    out = every_exit(deep, ROWS)
    torch.testing.assert_close(got.logits, out.logits[torch.arange(50), torch.tensor(want) - 1], **FP32)


def test_state_updated_in_place_follows_its_rows(deep, executor):
    class InPlace(Patience):
        def decide(self, reading, state):
            prediction = reading.class_logits.argmax(-1)
            same = prediction == state["last"]
            state["count"].add_(1).mul_(same)
            state["last"].copy_(prediction)
            return state["count"] >= state["patience"]

    runner = engine.from_module(deep, executor=executor)
    for _ in range(2):
        got = runner.run(padded(ROWS), criterion=InPlace(), threshold=1)
        assert got.exit_layers.tolist() == patience_by_hand(deep, ROWS, 1)


def test_a_stateful_criterion_does_not_depend_on_the_batch(deep, executor):
    """Per-row min_depth: a row's counter must not start later because it was batched with rows that may leave later."""
    least = [1, 3, 4, 5, 2] * 10
    runner = engine.from_module(deep, executor=executor)
    together = runner.run(padded(ROWS), criterion=Patience(), threshold=1, min_depth=least)
    alone = [
        int(runner.run(padded([row]), criterion=Patience(), threshold=1, min_depth=depth).exit_layers)
        for row, depth in zip(ROWS, least, strict=True)
    ]
    assert together.exit_layers.tolist() == alone


def test_a_criterion_may_write_into_what_it_began_with(deep, executor):
    """Its threshold as a running budget: the next run, and the caller's own tensor, must not feel it."""

    class Budget(Criterion):
        name = "budget"
        swept = Swept(0.0, 10.0, higher_is_deeper=True)

        def begin(self, threshold, exit_layers):
            return {"budget": threshold}

        def decide(self, reading, state):
            state["budget"].sub_(1)
            return state["budget"] < 0

    runner, criterion, given = engine.from_module(deep, executor=executor), Budget(), torch.full((50,), 2.0)
    for threshold in (2.0, 2.0, given, given):
        assert runner.run(padded(ROWS), criterion=criterion, threshold=threshold).exit_layers.tolist() == [3] * 50
    assert given.tolist() == [2.0] * 50


def test_a_criterion_may_be_a_dataclass(deep, executor):
    """Compared by value and therefore without a hash; and its own options may change between two runs."""

    @dataclasses.dataclass
    class Fixed(Criterion):
        layer: int
        name: str = "fixed"

        def begin(self, threshold, exit_layers):
            return {"layer": torch.full(threshold.shape, self.layer)}

        def decide(self, reading, state):
            return state["layer"] <= reading.layer

    runner, criterion = engine.from_module(deep, executor=executor), Fixed(2)
    assert runner.run(padded(ROWS), criterion=criterion).exit_layers.tolist() == [2] * 50
    criterion.layer = 4
    assert runner.run(padded(ROWS), criterion=criterion).exit_layers.tolist() == [4] * 50


class Recorder(Criterion):
    """Leaves by the sign of the first token's first number; keeps what it was shown."""

    name = "recorder"

    def __init__(self, needs_policy: bool = False, needs_classifier: bool = False):
        self.needs_policy, self.needs_classifier = needs_policy, needs_classifier
        self.seen = []

    def begin(self, threshold, exit_layers):
        return {"row": torch.arange(len(threshold))}

    def decide(self, reading, state):
        self.seen.append((reading, state["row"].clone()))
        return reading.first_tokens[:, 0] > 0.5


@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True), (True, True)])
def test_a_criterion_is_shown_what_it_asked_for(model, executor, needs):
    """None where it did not ask: an executor that computes more would pay for it, and hide that another does not."""
    criterion = Recorder(*needs)
    with torch.no_grad():
        hidden = model.hidden_states(**padded(ROWS))
    out = every_exit(model, ROWS)
    engine.from_module(model, executor=executor).run(padded(ROWS), criterion=criterion, batch_tokens=10**6)
    assert [reading.layer for reading, _ in criterion.seen] == [1, 2, 3]
    for reading, rows in criterion.seen:
        first = reading.first_tokens[: len(rows)]
        torch.testing.assert_close(first, hidden[reading.layer - 1][rows, 0], **FP32)
        for asked, got, want in (
            (needs[0], reading.policy_logits, out.policy_logits),
            (needs[1], reading.class_logits, out.logits),
        ):
            assert (got is not None) == asked
            if asked:
                assert got.dtype == torch.float32
                torch.testing.assert_close(got, want[rows, reading.layer - 1], **FP32)


def test_logits_are_compared_in_fp32(model, executor):
    criterion = Recorder(True, True)
    engine.from_module(model.to(torch.bfloat16), executor=executor).run(padded(ROWS), criterion=criterion)
    for reading, _ in criterion.seen:
        assert reading.policy_logits.dtype == reading.class_logits.dtype == torch.float32


@pytest.mark.parametrize("needs_policy", [False, True])
def test_exit_probabilities_do_not_depend_on_the_executor(model, needs_policy):
    """Whatever they say where no policy was asked for, both executors must say the same."""
    got, want = (
        engine.from_module(model, executor=name).run(padded(ROWS), criterion=Recorder(needs_policy))
        for name in ("packed", "reference")
    )
    assert got.exit_layers.tolist() == want.exit_layers.tolist()
    torch.testing.assert_close(got.exit_probabilities, want.exit_probabilities, equal_nan=True, **FP32)


class NotAtTwo(Policy):
    name = "not at two"

    def may_decide(self, layer: int) -> bool:
        return layer != 2


def test_where_a_criterion_may_not_decide_nobody_leaves(model, executor):
    runner = engine.from_module(model, executor=executor)
    got = runner.run(padded(ROWS), criterion=NotAtTwo())
    z = every_exit(model, ROWS).policy_logits
    want = [1 if a > 0 else 3 if c > 0 else 4 for a, b, c in z.tolist()]
    assert got.exit_layers.tolist() == want


def test_max_depth_holds_where_a_criterion_may_not_decide(model, executor):
    """base.py: depth limits are the executor's, they hold for every criterion."""
    limits = [1, 2, 3, 4, 2] * 10
    got = engine.from_module(model, executor=executor).run(
        padded(ROWS), criterion=NotAtTwo(), threshold=1.0, max_depth=limits
    )
    assert got.exit_layers.tolist() == limits
    assert got.exit_probabilities.tolist() == [1.0] * 50


def test_depth_limits_hold_for_every_criterion(model, executor):
    class Always(Criterion):
        name = "always"

        def begin(self, threshold, exit_layers):
            return {}

        def decide(self, reading, state):
            return torch.ones(len(reading.first_tokens), dtype=torch.bool)

    class Never(Always):
        def decide(self, reading, state):
            return torch.zeros(len(reading.first_tokens), dtype=torch.bool)

    runner = engine.from_module(model, executor=executor)
    limits = [1, 2, 3, 4, 2] * 10
    assert runner.run(padded(ROWS), criterion=Always(), min_depth=limits).exit_layers.tolist() == limits
    assert runner.run(padded(ROWS), criterion=Never(), max_depth=limits).exit_layers.tolist() == limits
    assert runner.run(padded(ROWS), criterion=Always()).exit_layers.tolist() == [1] * 50
    assert runner.run(padded(ROWS), criterion=Never()).exit_layers.tolist() == [4] * 50


@pytest.mark.parametrize("count", [1, 7, 40, 1000])
def test_log_odds(count):
    probabilities = torch.rand(count, generator=torch.Generator().manual_seed(count))
    torch.testing.assert_close(log_odds(probabilities), torch.logit(probabilities), rtol=1e-6, atol=1e-6)
    assert log_odds(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-math.inf, 0.0, math.inf]


def test_a_criterions_own_range_is_checked(packed, monkeypatch):
    monkeypatch.setattr(packed.executor, "run", lambda *args: pytest.fail("work was done before the check"))
    with pytest.raises(ValueError, match=r"\[1, 11\] for the patience criterion, got 0.5"):
        packed.run(padded(ROWS), criterion=Patience())
