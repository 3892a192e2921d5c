import pytest
import torch

from engine.train.hardness import ForgettingEvents, memorized_layer


def bools(*rows: str) -> torch.Tensor:
    return torch.tensor([[mark == "+" for mark in row] for row in rows])


def test_memorized_layer_by_hand():
    correct = bools("++++", "-+++", "+-++", "+--+", "---+", "----", "+++-", "++--")
    assert memorized_layer(correct, (1, 2, 3, 4)).tolist() == [1, 2, 3, 4, 4, 4, 4, 4]


def test_memorized_layer_counts_layers_not_exits():
    result = memorized_layer(bools("++-+", "-+++", "++++", "----"), (3, 6, 9, 12))
    assert result.tolist() == [12, 6, 3, 12] and result.dtype == torch.int64


def test_memorized_layer_matches_the_definition():
    layers = (1, 3, 4, 8, 9)
    correct = torch.cartesian_prod(*[torch.tensor([False, True])] * 5)
    for row, result in zip(correct.tolist(), memorized_layer(correct, layers).tolist(), strict=True):
        suffixes = [layer for k, layer in enumerate(layers) if all(row[k:])]
        assert result == min(suffixes, default=9)


def test_memorized_layer_refuses():
    with pytest.raises(TypeError, match="bool tensor"):
        memorized_layer(torch.ones(2, 3), (1, 2, 3))
    with pytest.raises(ValueError, match="names 2 exits"):
        memorized_layer(bools("+++"), (1, 2))


def run_epochs(events: ForgettingEvents, *epochs: str) -> ForgettingEvents:
    for marks in epochs:
        seen = torch.tensor([i for i, mark in enumerate(marks) if mark != "."])
        events.update(seen, torch.tensor([marks[i] == "+" for i in seen.tolist()]))
    return events


def test_forgetting_counts_transitions():
    #                                             0: learned, kept  1: lost twice  2: never  3: lost once  4: unseen
    events = run_epochs(ForgettingEvents(5), "-+--.", "+---.", "++-+.", "+--+.", "+.--.")
    assert events.counts.tolist() == [0, 2, 0, 1, 0]
    assert events.never_learned.tolist() == [False, False, True, False, False]
    assert events.looks.tolist() == [5, 4, 5, 5, 0]


def test_forgetting_state_survives_a_restart():
    epochs = ("+-+", "-++", "+-+", "--+")
    whole = run_epochs(ForgettingEvents(3), *epochs)
    first = run_epochs(ForgettingEvents(3), *epochs[:2])
    state = first.state_dict()
    run_epochs(first, "+++")  # the saved state is a copy
    second = ForgettingEvents(3)
    second.load_state_dict(state)
    run_epochs(second, *epochs[2:])
    assert second.counts.tolist() == whole.counts.tolist() == [2, 1, 0]


def test_forgetting_refuses():
    events = ForgettingEvents(3)
    with pytest.raises(ValueError, match="repeat"):
        events.update(torch.tensor([1, 1]), torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"0\.\.2, got 3"):
        events.update(torch.tensor([3]), torch.tensor([True]))
    with pytest.raises(ValueError, match="must be"):
        events.update(torch.tensor([1]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="another training set"):
        events.load_state_dict(ForgettingEvents(4).state_dict())
    with pytest.raises(ValueError, match="keys"):
        events.load_state_dict({"counts": torch.zeros(3)})
    assert events.counts.tolist() == [0, 0, 0]
