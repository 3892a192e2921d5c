"""Paged keys and values with the exit states that skipped layers are owed.

A token that leaves at layer e has the hidden state h_e at every later layer, whose keys and values for it follow from
h_e (state copying). They are worked out when the layer is next visited by its sequence, and not before: until then the
layer *owes* them (lazy state copying). What a layer owes a sequence is one contiguous range: positions from its
*watermark* on.

Memory of a position: 2 * L * kv_heads * head_dim for keys and values, H for its exit state (1.6 % more at LLaMA-7B, 5 %
at SmolLM2-135M), so every slot has room for both and one table of blocks serves all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheShape:
    """num_layers L, kv_heads, head_dim of keys and values; hidden_size H of exit states; positions in a block."""

    num_layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    block_size: int = 16

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Of one block in all layers, exit states included."""
        item = torch.empty((), dtype=dtype).element_size()
        return self.block_size * item * (2 * self.num_layers * self.kv_heads * self.head_dim + self.hidden_size)


class PagedCache:
    """Room for ``num_blocks`` blocks of positions.

    keys, values  [L, slots, kv_heads, head_dim]; keys with RoPE at their own position
    states        [slots, H]: h_e of a position whose token left at layer e < L
    peak_blocks   most that were taken at a time, since somebody last set it to 0
    """

    def __init__(self, shape: CacheShape, num_blocks: int, device: torch.device, dtype: torch.dtype):
        self.shape, self.num_blocks = shape, num_blocks
        slots = num_blocks * shape.block_size
        room = shape.num_layers, slots, shape.kv_heads, shape.head_dim
        self.keys, self.values = (torch.zeros(room, dtype=dtype, device=device) for _ in range(2))
        self.states = torch.zeros(slots, shape.hidden_size, dtype=dtype, device=device)
        self._free = list(range(num_blocks - 1, -1, -1))
        self.peak_blocks = 0

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.states.nbytes

    @property
    def peak_bytes(self) -> int:
        return self.peak_blocks * self.shape.block_bytes(self.keys.dtype)

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def blocks_for(self, positions: int) -> int:
        """Blocks that a sequence of that many positions needs."""
        return -(-positions // self.shape.block_size)

    def take(self, count: int) -> list[int]:
        """``count`` free blocks. ValueError where there are not as many: whoever schedules asks first."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} of {self.num_blocks} are free")
        taken = [self._free.pop() for _ in range(count)]
        self.peak_blocks = max(self.peak_blocks, self.num_blocks - len(self._free))
        return taken

    def give_back(self, blocks: list[int]) -> None:
        self._free += reversed(blocks)


class Pages:
    """One sequence's part of a cache: its blocks, and what its layers owe.

    watermarks  of layer 1 ... L: keys and values of positions below it are there. They never rise with depth, because a
                token visits the first layers and no others
    """

    def __init__(self, cache: PagedCache):
        self.cache = cache
        self.blocks: list[int] = []
        self.watermarks = [0] * cache.shape.num_layers

    def reserve(self, positions: int) -> None:
        """Blocks for that many positions in all, of every layer: depth is not known before a step has run."""
        missing = self.cache.blocks_for(positions) - len(self.blocks)
        if missing > 0:
            self.blocks += self.cache.take(missing)

    def release(self) -> None:
        self.cache.give_back(self.blocks)
        self.blocks = []
        self.watermarks = [0] * self.cache.shape.num_layers

    def slots(self, start: int, end: int) -> Tensor:
        """int64 [end - start]: where positions start ... end - 1 stand in the cache."""
        size = self.cache.shape.block_size
        positions = torch.arange(start, end)
        table = torch.tensor(self.blocks, dtype=torch.long)
        return (table[positions // size] * size + positions % size).to(self.cache.keys.device)

    @property
    def owed(self) -> int:
        """Positions of all layers whose keys and values are still to be worked out."""
        return sum(self.watermarks[0] - mark for mark in self.watermarks)
