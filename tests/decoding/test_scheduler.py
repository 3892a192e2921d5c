"""Who runs, who waits and who gives way; no model is needed."""

from __future__ import annotations

import random

import pytest
import torch

from engine.decoding.cache import CacheShape, PagedCache, Pages
from engine.decoding.generate import begin
from engine.decoding.requests import NewToken, Request
from engine.decoding.scheduler import Scheduler


def cache_of(blocks, block_size=4):
    return PagedCache(CacheShape(1, 1, 1, 1, block_size), blocks, torch.device("cpu"), torch.float32)


def run(cache, requests, max_rows):
    """Every row gets a token where a decoder would give it one; returns the scheduler and (numbers in each step)."""
    scheduler, sequences = Scheduler(cache, max_rows), begin(requests)
    for sequence in sequences:
        scheduler.add(sequence)
    steps = []
    while scheduler.unfinished:
        joining = scheduler.admit()
        for sequence, pages in joining:
            assert len(pages.blocks) >= cache.blocks_for(len(sequence))
            if not sequence.new:
                sequence.add(NewToken(0, 1, 1.0))
        scheduler.retire()
        rows = scheduler.step()
        for sequence, pages in rows:
            assert len(pages.blocks) >= cache.blocks_for(len(sequence))
            sequence.add(NewToken(0, 1, 1.0))
        scheduler.retire()
        used = [block for row in rows for block in row[1].blocks if row[0].finish_reason is None]
        assert len(used) == len(set(used)), "two sequences share a block"
        steps.append([s.number for s, _ in rows])
        assert joining or rows, "nothing happens"
    assert all(len(s.new) == s.request.max_new_tokens for s in sequences)
    assert cache.free_blocks == cache.num_blocks
    return scheduler, steps


def test_rows_join_between_steps_in_their_order():
    requests = [Request((1,) * 3, n) for n in (3, 6, 2, 4)]
    scheduler, steps = run(cache_of(100), requests, max_rows=2)
    assert steps == [[0, 1], [0, 1], [1, 2], [1, 3], [1, 3], [3]]
    assert scheduler.preemptions == 0


def test_the_youngest_gives_way_and_comes_back_first():
    requests = [Request((1,) * 4, 9), Request((1,) * 4, 9), Request((1,) * 4, 2)]
    scheduler, steps = run(cache_of(5), requests, max_rows=3)
    assert scheduler.preemptions > 0
    alone = steps.index([0])
    assert all(0 in step for step in steps[:alone])
    first_seen = {n: next(i for i, step in enumerate(steps) if n in step) for n in range(3)}
    assert first_seen[0] <= first_seen[1] <= first_seen[2]


@pytest.mark.parametrize("seed", range(30))
def test_everybody_finishes_whatever_the_cache(seed):
    rng = random.Random(seed)
    requests = [Request((1,) * rng.randint(1, 12), rng.randint(1, 15)) for _ in range(rng.randint(1, 12))]
    most = max(-(-(len(r.prompt) + r.max_new_tokens - 1) // 4) for r in requests)
    run(cache_of(most + rng.randint(0, 6)), requests, rng.randint(1, 6))


def test_a_request_that_never_fits_is_refused_before_anything_runs():
    scheduler = Scheduler(cache_of(3), 2)
    scheduler.add(begin([Request((1,) * 8, 5)])[0])  # 12 positions: the last token does not run
    with pytest.raises(ValueError, match=r"request 0 may need 13 positions \(8 of its prompt, 6 new\), .* room for 12"):
        scheduler.add(begin([Request((1,) * 8, 6)])[0])


def test_pages():
    cache = cache_of(4)
    pages = Pages(cache)
    pages.reserve(9)
    assert len(pages.blocks) == 3 and cache.free_blocks == 1
    pages.reserve(5)
    assert len(pages.blocks) == 3
    slots = pages.slots(2, 9).tolist()
    assert slots == [pages.blocks[p // 4] * 4 + p % 4 for p in range(2, 9)]
    with pytest.raises(ValueError, match="2 blocks asked for, 1 of 4 are free"):
        pages.reserve(17)
    pages.release()
    assert cache.peak_blocks == 3 and cache.free_blocks == 4 and pages.watermarks == [0]
