"""Reading a padded batch: the compiled function against numpy, and numpy against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import token_rows
from engine.kernels.token_rows import all_below, read_tokens, read_tokens__ref
from tests.kernels.cases import needs_extension

VOCAB, TYPES = 50, 2
READERS = [pytest.param(read_tokens, marks=needs_extension, id="compiled"), pytest.param(read_tokens__ref, id="numpy")]


def padded(lengths, before, width: int, ids, types=None):
    """[N, width] tensors with each row's tokens behind ``before`` columns of padding, whose ids are no token's."""
    shape = len(lengths), width
    given, mask = torch.full(shape, VOCAB + 7), torch.zeros(shape, dtype=torch.int64)
    kinds = None if types is None else torch.full(shape, TYPES + 7)
    for i, (length, start) in enumerate(zip(lengths, before, strict=True)):
        given[i, start : start + length], mask[i, start : start + length] = ids[i], 1
        if kinds is not None:
            kinds[i, start : start + length] = types[i]
    return given, mask, kinds


def assert_read(found, ids, types, lengths) -> None:
    assert found is not None and found[2] == tuple(lengths)
    np.testing.assert_array_equal(found[0], torch.cat(ids).numpy())
    if types is None or not torch.cat(types).any():
        assert found[1] is None
    else:
        np.testing.assert_array_equal(found[1], torch.cat(types).numpy())
    for values in found[:2]:
        assert values is None or (values.dtype == np.int64 and values.flags.c_contiguous)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("typed", ["none", "zeros", "mixed"])
@pytest.mark.parametrize("lengths", [[1], [5, 5], [1, 7, 3], [9, 1], [4] * 33, [130, 2]])
def test_tokens_and_types_end_to_end(read, lengths, typed):
    ids = [torch.randint(0, VOCAB, (n,)) for n in lengths]
    types = {"none": None, "zeros": [torch.zeros_like(x) for x in ids], "mixed": [x % TYPES for x in ids]}[typed]
    for width in (max(lengths), max(lengths) + 3):
        left = [0] * len(lengths)
        right = [width - n for n in lengths]
        for before in (left, right, [x // 2 for x in right]):
            assert_read(read(*padded(lengths, before, width, ids, types), VOCAB, TYPES), ids, types, lengths)


@pytest.mark.parametrize("read", READERS)
def test_without_padding_nothing_is_copied(read):
    ids, mask = torch.randint(0, VOCAB, (3, 4)), torch.ones(3, 4, dtype=torch.int64)
    types = torch.ones_like(mask)
    for shown in (mask, None):
        found = read(ids, shown, types, VOCAB, TYPES)
        assert found[2] == (4, 4, 4)
        assert np.shares_memory(found[0], ids.numpy()) and np.shares_memory(found[1], types.numpy())


@pytest.mark.parametrize("read", READERS)
def test_what_is_wrong(read):
    lengths, before = [3, 5], [0, 1]
    ids, types = [torch.tensor([0, 3, VOCAB - 1]), torch.arange(5)], [torch.tensor([0, 1, 1]), torch.zeros(5).long()]
    whole = padded(lengths, before, 6, ids, types)
    assert_read(read(*whole, VOCAB, TYPES), ids, types, lengths)

    def refused(which: int, place: tuple[int, int], value: int) -> bool:
        changed = [x.clone() for x in whole]
        changed[which][place] = value
        return read(*changed, VOCAB, TYPES) is None

    for value in (-1, VOCAB, torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max):
        assert refused(0, (1, 3), value) and not refused(0, (1, 0), value)  # a token's, and padding's
    for value in (-1, TYPES):
        assert refused(2, (0, 2), value) and not refused(2, (0, 3), value)
    for value in (2, -1, 1 << 32):
        assert refused(1, (0, 1), value) and refused(1, (0, 5), value)
    assert refused(1, (1, 2), 0)  # a hole
    assert refused(1, (0, 5), 1)  # two blocks
    for mask in (torch.tensor([[0, 0, 0, 0, 0, 0], [1] * 6]), torch.tensor([[2, -1, 1, 0, 0, 0], [1] * 6])):
        assert read(torch.zeros_like(mask), mask, None, VOCAB, TYPES) is None
    assert read(torch.zeros(2, 0, dtype=torch.int64), None, None, VOCAB, TYPES) is None
    huge = torch.full((1, 2), 1 << 62)  # whose sum is 2^63, which is negative
    assert read(torch.zeros_like(huge), huge, None, VOCAB, TYPES) is None


@needs_extension
@given(st.data())
@settings(max_examples=300, deadline=None)
def test_the_compiled_function_says_what_numpy_says(data):
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 5))

    def matrix(values) -> torch.Tensor:
        drawn = data.draw(st.lists(st.sampled_from(values), min_size=rows * width, max_size=rows * width))
        return torch.tensor(drawn, dtype=torch.int64).view(rows, width)

    ids, types = matrix([0, 1, 2, 2, 1, 0, 3, -1]), data.draw(st.booleans()) and matrix([0, 0, 0, 1, 2])
    mask = data.draw(st.booleans()) and matrix([1, 1, 1, 1, 0, 0, 2, -1])
    given_ = ids, *(None if x is False else x for x in (mask, types)), 3, 2
    found, expected = read_tokens(*given_), read_tokens__ref(*given_)
    assert (found is None) == (expected is None)
    if found is not None:
        assert found[2] == expected[2]
        for a, b in zip(found[:2], expected[:2], strict=True):
            assert (a is None) == (b is None)
            np.testing.assert_array_equal(a, b)


@needs_extension
@pytest.mark.parametrize("when", [1, 2], ids=["before ids", "before types"])
@pytest.mark.parametrize("change", [(0, 1, 1), (1, 2, 0), (1, 0, 7)], ids=["longer", "shorter", "wrong"])
def test_a_mask_that_changes_meanwhile(monkeypatch, change, when):
    """Nothing is written where there is no room for it."""
    tokens = [torch.ones(1), torch.ones(3)]
    ids, mask, types = padded([1, 3], [0, 0], 4, tokens, tokens)
    row, column, value = change
    calls, real = [], token_rows._pack

    def pack(*arguments):
        calls.append(arguments)
        if len(calls) == when:
            mask[row, column] = value
        return real(*arguments)

    monkeypatch.setattr(token_rows, "_pack", pack)
    assert read_tokens(ids, mask, types, VOCAB, TYPES) is None and len(calls) == when


def test_numpy_serves_where_nothing_is_built(monkeypatch):
    ids = torch.randint(0, VOCAB, (2, 3))
    monkeypatch.setattr(token_rows, "_read", None)
    monkeypatch.setattr(token_rows, "_pack", None)
    assert_read(read_tokens(ids, None, None, VOCAB, TYPES), list(ids), None, (3, 3))


def test_all_below():
    assert all_below(np.array([0, 2]), 3) and not all_below(np.array([0, 3]), 3) and not all_below(np.array([-1]), 3)
