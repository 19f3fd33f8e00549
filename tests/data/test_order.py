"""What an epoch takes of several sources: as much of each as configured, the same on any number of ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest

from phi3v.config import DataSource
from phi3v.data.batches import BatchPlan
from phi3v.data.lengths import RecordLengths
from phi3v.data.order import Mixed, ShardWindows, Shuffled, earlier_draws, epoch_counts, share_out


def counts(sizes: list[int], *amounts: dict[str, Any], ends: Any = "first") -> list[int]:
    sources = [DataSource(f"{k}.jsonl", **amount) for k, amount in enumerate(amounts)]
    return epoch_counts(sources, sizes, ends)


def test_what_an_epoch_takes() -> None:
    assert counts([10, 20], {}, {}) == [10, 20]
    assert counts([10, 20, 30], {"epochs": 2.5}, {"max_records": 7}, {"max_records": 99}) == [25, 7, 30]
    # 1:3. The second source has 20 records for its weight of 3, the first would have 10 for 1.
    assert counts([10, 20], {"weight": 1}, {"weight": 3}) == [7, 20]
    assert counts([10, 20], {"weight": 1}, {"weight": 3}, ends="all") == [10, 30]
    assert counts([10, 20, 5], {"weight": 1}, {"weight": 3}, {}, ends="all") == [10, 30, 5]
    assert counts([10, 1000], {"weight": 1000}, {"weight": 1}) == [10, 1], "no source is left out altogether"
    assert counts([3], {"epochs": 0.1}) == [1]


def test_sources_without_a_word_are_as_one_file() -> None:
    mixed, whole = Mixed((3, 4, 5), (3, 4, 5), seed=7), Shuffled(12, 7)
    for epoch in range(3):
        np.testing.assert_array_equal(mixed.of_epoch(epoch), whole.of_epoch(epoch))


def test_every_record_comes_as_often_as_configured() -> None:
    rng = np.random.default_rng(0)
    for seed in range(50):
        sizes = tuple(map(int, rng.integers(1, 40, size=3)))
        taken = tuple(map(int, rng.integers(1, 90, size=3)))
        order = Mixed(sizes, taken, seed)
        starts = np.cumsum([0, *sizes])
        total: Counter[int] = Counter()
        for epoch in range(8):
            seen = Counter(order.of_epoch(epoch).tolist())
            assert sum(seen.values()) == len(order) == sum(taken)
            total += seen
            for start, size, count in zip(starts, sizes, taken, strict=False):
                times = [seen[index] for index in range(start, start + size)]
                assert sum(times) == count
                assert set(times) <= {count // size, -(-count // size)}
        for start, size, count in zip(starts, sizes, taken, strict=False):
            times = [total[index] for index in range(start, start + size)]
            assert max(times) - min(times) <= 1, "over the epochs all come equally often"
            assert sum(times) == 8 * count


def test_an_epoch_takes_others_than_the_one_before() -> None:
    order = Mixed((100,), (30,), seed=0)
    first, second = (set(order.of_epoch(epoch).tolist()) for epoch in (0, 1))
    assert not first & second
    assert set(Mixed((100,), (30,), seed=1).of_epoch(0).tolist()) != first


def test_a_source_in_shards_keeps_its_windows() -> None:
    """Its records come as often as without, and those of few shards at a time."""
    shards = ShardWindows((7, 5, 9, 3, 6), window=2, seed=0)
    order = Mixed((20, 30), (20, 75), 0, (None, shards))
    for epoch in (0, 1):
        drawn = order.of_epoch(epoch)
        assert Counter(drawn.tolist()) == Counter(Mixed((20, 30), (20, 75), 0).of_epoch(epoch).tolist())
        of_source = drawn[drawn >= 20] - 20
        for time in range(2):  # two whole passes, and half of one
            np.testing.assert_array_equal(of_source[30 * time : 30 * time + 30], shards.of_epoch(3 * epoch + time))
        mixed = (drawn[:40] >= 20).sum()
        assert 20 < mixed < 40, "between those of the other source"


def test_a_rank_owns_shards_of_all_sources_that_are_fetched() -> None:
    """Numbered through, also where a source is read where it lies; in all passes those of the first one."""
    one, other = ShardWindows((7, 0, 9, 3, 6), window=2, seed=0), ShardWindows((4, 4), window=2, seed=0)
    here = replace(other, fetched=False)
    order = Mixed((20, 25, 8, 8), (20, 60, 8, 4), 0, (None, one, here, other))
    for epoch in (0, 1):
        first = other.windows(epoch)[0]
        windows = one.windows(3 * epoch)
        assert order.windows(epoch) == [[*windows[0], *(7 + shard for shard in first)], *windows[1:]]
        slots = order.slots(epoch)
        assert len(slots) == 61
        assert (slots[:20] == -1).all()
        np.testing.assert_array_equal(slots[20:45], one.slots(3 * epoch))
        assert (slots[45:53] == -1).all()
        np.testing.assert_array_equal(slots[53:], 2 + other.slots(epoch))
    assert Mixed((20, 8), (20, 8), 0).windows(0) == []
    assert (Mixed((20, 8), (20, 8), 0).slots(0) == -1).all()


def test_earlier_draws() -> None:
    assert earlier_draws(np.array([4, 1, 4, 4, 0, 1])).tolist() == [0, 0, 1, 2, 0, 1]


def plan(packing: Any, world: int, order: Mixed) -> BatchPlan:
    """Pages of four records, two of each source."""
    count = sum(order.sizes)
    page = np.arange(count) % (count // 4)
    zeros = np.zeros_like(page)
    lengths = RecordLengths(np.full(count, 90) + np.arange(count) % 7, zeros, zeros, zeros, np.full(count, 60), page)
    return BatchPlan(
        lengths,
        packing,
        batch_size=12,
        pack_tokens=400,
        micro_batch_size=1 if packing != "none" else 2,
        shared_image_max=4,
        world_size=world,
        order=order,
    )


@pytest.mark.parametrize("packing", ["none", "samples", "shared-image"])
def test_ranks_share_the_same_records_of_each_step(packing: Any) -> None:
    order = Mixed((16, 24), (40, 9), seed=3)
    steps_of: list[list[Counter[int]]] = []
    for world in (1, 2, 3):
        steps = list(plan(packing, world, order).steps(1))
        steps_of.append(
            [Counter(chain.from_iterable(g for rows in step for row in rows for g in row)) for step in steps]
        )
        assert list(plan(packing, world, order).steps(1, first=3)) == steps[3:], "any step can be made again"
        drawn = sum(steps_of[-1], Counter())
        assert drawn == Counter(order.of_epoch(1).tolist())
        assert max(drawn.values()) == 3
    assert steps_of[0] == steps_of[1] == steps_of[2]


def test_what_comes_again_comes_in_another_step() -> None:
    """A page with one record that an epoch takes four times is no group of four."""
    order = Mixed((20,), (80,), seed=0)
    zeros = np.zeros(20, dtype=np.int64)
    lengths = RecordLengths(np.full(20, 90), zeros, zeros, zeros, np.full(20, 60), np.arange(20))
    steps = list(
        BatchPlan(lengths, "shared-image", batch_size=8, pack_tokens=400, shared_image_max=4, order=order).steps(0)
    )
    together = sum(len(group) for (rows,) in steps for row in rows for group in row if len(group) > 1)
    assert together < 40, "by chance alone"


def test_a_limit_leaves_some_of_each_source() -> None:
    assert share_out(10, [60, 30, 10]) == [6, 3, 1]
    assert share_out(4, [1000, 1, 3]) == [2, 1, 1]
    assert share_out(2, [1, 5, 1000]) == [0, 0, 2], "not enough for one of each"
    assert share_out(5, [9]) == [5]
    random = np.random.default_rng(0)
    for _ in range(200):
        sizes = random.integers(1, 60, size=random.integers(1, 6)).tolist()
        limit = int(random.integers(1, sum(sizes) + 1))
        shares = share_out(limit, sizes)
        assert sum(shares) == limit
        assert all(share <= size for share, size in zip(shares, sizes, strict=True))
        assert limit < len(sizes) or min(shares) >= 1
        if limit >= len(sizes) and all(limit * size >= sum(sizes) for size in sizes):
            exact = [limit * size / sum(sizes) for size in sizes]
            assert all(abs(share - wanted) < 1 for share, wanted in zip(shares, exact, strict=True))
