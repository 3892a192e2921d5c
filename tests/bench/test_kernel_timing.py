import dataclasses

import pytest
import torch

from engine.bench import kernel_timing as timing


def test_who_computes_something_else_is_refused():
    def double(t):
        return 2 * t["x"]

    runs = {timing.PLAIN: double, timing.KERNEL: lambda t: double(t) + 0.01}
    op = timing.Op("double", "linear", lambda: {"x": torch.ones(3)}, runs, double, 0.0, 1)
    with pytest.raises(RuntimeError, match="double: kernel differs from plain torch by 0.01, allowed 0.0002"):
        timing.check(op, op.make(), torch.float32)
    timing.check(op, op.make(), torch.float16)


def test_copies_fill_the_cache_twice():
    one = {"x": torch.zeros(256), "pair": (torch.zeros(256), torch.zeros(256)), "nothing": None}
    assert timing.copies_for(one, 3072) == 2 and timing.copies_for(one, 15360) == 10
    assert timing.copies_for(one, 1) == 2 and timing.copies_for(one, 1 << 30) == 64


def test_what_a_call_changes_is_restored():
    """Ahead of every competitor that is held against plain torch, and of every reading of the clock."""
    seen = []

    def take(t):
        seen.append(int(t["left"]))
        t["left"].zero_()
        return t["left"] + seen[-1]

    runs = {timing.KERNEL: take, timing.PLAIN: take}
    op = timing.Op("take", "exit", lambda: {"left": torch.ones(1)}, runs, None, 0.0, 4)
    with pytest.raises(RuntimeError, match="take: kernel differs from plain torch by 1"):
        timing.check(op, op.make(), torch.float32)
    op = dataclasses.replace(op, restore=lambda t: t["left"].fill_(1))
    seen.clear()
    timing.check(op, op.make(), torch.float32)
    timing.time_on_host(runs, [op.make(), op.make()], 3, op.restore)
    assert seen == [1] * (2 + 2 * 2 * 4)
