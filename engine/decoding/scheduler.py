"""Which sequences run in the next step: continuous batching under one memory budget. No tensor is touched here.

Rows of different lengths decode together; finished rows leave, waiting prompts join between steps. Where blocks run out
the youngest row is preempted: it gives all of its blocks back and waits, in front of those that have not begun, to be
replayed with every token frozen at the exit layer it had, so it continues as if nothing had happened.
"""

from __future__ import annotations

from collections import deque

from engine.decoding.cache import PagedCache, Pages
from engine.decoding.requests import Generating

Row = tuple[Generating, Pages]


class Scheduler:
    """max_rows: sequences that decode together. Whoever else uses the cache holds no more of it while this one runs."""

    def __init__(self, cache: PagedCache, max_rows: int):
        self._cache, self._max_rows = cache, max_rows
        self._room = cache.free_blocks  # others may hold a part of the cache
        self._waiting: deque[Generating] = deque()
        self._running: list[Row] = []  # the oldest first
        self.preemptions = 0

    @property
    def unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, sequence: Generating) -> None:
        """ValueError where not even an empty cache has room for all that the sequence may become."""
        request = sequence.request
        most = len(request.prompt) + request.max_new_tokens - 1  # the last new token does not run
        needed = self._cache.blocks_for(most)
        if needed > self._room:
            size = self._cache.shape.block_size
            raise ValueError(
                f"request {sequence.number} may need {most} positions ({len(request.prompt)} of its prompt, "
                f"{request.max_new_tokens} new), the cache has room for {self._room * size}: shorten the prompt, "
                "ask for fewer new tokens, or give the cache more memory"
            )
        self._waiting.append(sequence)

    def admit(self) -> list[Row]:
        """Waiting sequences that run from now on, in their order: they are to be prefilled first. A block is left for
        each row that decodes already, so that who joins does not push out who is there."""
        joining: list[Row] = []
        while self._waiting and len(self._running) < self._max_rows:
            if not self._fits_next():
                break
            sequence, pages = self._waiting[0], Pages(self._cache)
            pages.reserve(len(sequence))
            joining.append((self._waiting.popleft(), pages))
            self._running.append(joining[-1])
        return joining

    def step(self) -> list[Row]:
        """Rows of the next step, each with room for its newest position."""
        for row in list(self._running):  # the oldest are served first
            if row not in self._running:
                break  # it, and all younger ones, have been preempted
            sequence, pages = row
            missing = self._cache.blocks_for(len(sequence)) - len(pages.blocks)
            while missing > self._cache.free_blocks and self._running[-1] is not row:
                self._preempt()
            if missing > self._cache.free_blocks:
                self._preempt()  # the row itself is the youngest that is left
                break
            pages.reserve(len(sequence))
        return list(self._running)

    def reserve_next(self) -> bool:
        """Room for the position behind the newest of every row, for a step that is launched before the one in front of
        it has ended. False, and nothing has happened, where somebody would have to go for it, or may join instead."""
        if self._waiting and len(self._running) < self._max_rows and self._fits_next():
            return False
        missing = [self._cache.blocks_for(len(s) + 1) - len(pages.blocks) for s, pages in self._running]
        if sum(max(0, n) for n in missing) > self._cache.free_blocks:
            return False
        for sequence, pages in self._running:
            pages.reserve(len(sequence) + 1)
        return True

    def retire(self) -> None:
        """Finished sequences leave, and give their blocks back."""
        for sequence, pages in self._running:
            if sequence.finish_reason is not None:
                pages.release()
        self._running = [row for row in self._running if row[0].finish_reason is None]

    def abandon(self) -> None:
        """Everybody leaves, finished or not."""
        for _, pages in self._running:
            pages.release()
        self._running.clear()
        self._waiting.clear()

    def _fits_next(self) -> bool:
        """Whether the first that waits has room, and a block is left for each row that runs."""
        needed = self._cache.blocks_for(len(self._waiting[0]))
        return not self._running or self._cache.free_blocks >= needed + len(self._running)

    def _preempt(self) -> None:
        sequence, pages = self._running.pop()
        pages.release()
        self._waiting.appendleft(sequence)
        self.preemptions += 1
