"""The tokens of a padded batch, checked and without its padding. On the host."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from engine.kernels import extension

__all__ = ["Tokens", "all_below", "read_tokens", "read_tokens__ref"]

# Of N rows end to end, T tokens: ids int64 [T], types int64 [T] or None where all are 0, and the N rows' lengths.
# Contiguous; where there is no padding, views of what they were read from.
Tokens = tuple[np.ndarray, np.ndarray | None, tuple[int, ...]]


def all_below(values: np.ndarray, limit: int) -> bool:
    """Whether all of these int64 are in 0 ... limit - 1: as unsigned numbers, negative ones are the greatest."""
    unsigned = values.view(np.uint64)
    return unsigned.item(unsigned.argmax()) < limit  # for a short row a third of what max() costs


def read_tokens__ref(
    ids: Tensor, mask: Tensor | None, types: Tensor | None, vocab_size: int, type_vocab_size: int
) -> Tokens | None:
    """Twin of ``read_tokens``."""
    ids, mask, types = (None if x is None else x.numpy() for x in (ids, mask, types))
    n, width = ids.shape
    if width == 0:
        return None
    tokens = None if mask is None else mask == 1
    if tokens is None or tokens.all():
        ids, lengths = ids.ravel(), (width,) * n
        types = None if types is None else types.ravel()
    else:
        # From the first 1 of every row to its last: as many as there are 1s, or there is a 0 between (or nothing else).
        spans = width - tokens[:, ::-1].argmax(1) - tokens.argmax(1)
        if not spans.sum() == np.count_nonzero(tokens) == np.count_nonzero(mask):
            return None
        ids, lengths = ids[tokens], tuple(spans.tolist())
        types = None if types is None else types[tokens]
    if not all_below(ids, vocab_size) or (types is not None and not all_below(types, type_vocab_size)):
        return None
    return ids, types if types is not None and types.any() else None, lengths


def _native():
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    prototypes = {
        "read": (count, [pointer, pointer, pointer, count, count, count, count]),
        "pack": (ctypes.c_bool, [pointer, pointer, count, count, count, pointer, pointer]),
    }
    found = extension.c_functions("token_rows_", prototypes)
    return (None, None) if isinstance(found, str) else (found["read"], found["pack"])


_read, _pack = _native()


def read_tokens(
    ids: Tensor, mask: Tensor | None, types: Tensor | None, vocab_size: int, type_vocab_size: int
) -> Tokens | None:
    """What stands where mask is 1, row by row; None where something is wrong: a row without a token, a mask that is not
    one block of 1s between 0s (or that somebody else writes into meanwhile), an id or type of a token outside
    0 ... vocab_size - 1 or 0 ... type_vocab_size - 1.

    ids, mask, types  int64 [N, S] on the host, contiguous, N at least 1; no mask: all are tokens

    A call of one small batch costs what it takes to get there: behind other work, which leaves nothing of numpy in the
    caches, a dozen of numpy's calls take 100 us.
    """
    if _read is None:
        return read_tokens__ref(ids, mask, types, vocab_size, type_vocab_size)
    n, width = ids.shape
    at_ids, at_mask, at_types = ids.data_ptr(), _address(mask), _address(types)
    found = _read(at_ids, at_mask, at_types, n, width, vocab_size, type_vocab_size)
    if found < 0:
        return None
    tokens, typed = found >> 1, found & 1
    if tokens == n * width:
        return ids.numpy().reshape(-1), types.numpy().reshape(-1) if typed else None, (width,) * n
    lengths, own_ids = (torch.empty(size, dtype=torch.int64) for size in (n, tokens))
    if not _pack(at_ids, at_mask, n, width, tokens, own_ids.data_ptr(), lengths.data_ptr()):
        return None
    own_types = None
    if typed:
        own_types = torch.empty_like(own_ids)
        if not _pack(at_types, at_mask, n, width, tokens, own_types.data_ptr(), None):
            return None
        own_types = own_types.numpy()
    return own_ids.numpy(), own_types, tuple(lengths.tolist())


def _address(values: Tensor | None) -> int | None:
    return None if values is None else values.data_ptr()
