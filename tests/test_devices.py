import pytest
import torch

from engine.devices import find_device


def test_find_device():
    assert find_device("auto", "cpu") == torch.device("cpu") == find_device(torch.device("cpu"), "meta")
    absent = ["gpu", "", "cpu:x", "meta", "cuda:99"] + ([] if torch.cuda.is_available() else ["cuda"])
    for name in absent:
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used .* here .*: choose auto, cpu or another"):
            find_device(name, "cpu")
