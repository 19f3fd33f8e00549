"""Equal work: what a row costs, who gets it, and what ranks compute at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from phi3v.data.balance import abreast, assign_to_ranks, even_rows, fill_rows
from phi3v.data.batches import BatchPlan
from phi3v.data.lengths import RecordLengths
from phi3v.data.order import Shuffled
from phi3v.model.attention import visible
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.shape import Costs, ModelShape

COSTS = ModelShape.of(Phi3VConfig()).training_costs()


def pages_of(rng: np.random.Generator, count: int, questions: int) -> RecordLengths:
    """Pages of 5 to 17 crops with as many questions each."""
    page = np.repeat(np.arange(count), questions)
    crops = rng.choice([5, 7, 10, 13, 17], count)[page]
    images = 144 * crops + 13
    text, targets = rng.integers(20, 80, len(page)), rng.integers(2, 20, len(page))
    return RecordLengths(images + 5 + text, images, targets, crops, images + 5, page)


def loads(work: Any, assigned: list[int], ranks: int) -> Any:
    return np.bincount(assigned, work, ranks)


def test_the_largest_goes_first_to_the_rank_with_least_work() -> None:
    assert assign_to_ranks([1, 1, 1, 1], 2) == [0, 1, 0, 1]
    assert assign_to_ranks([1, 2, 9, 3], 2) == [1, 1, 0, 1]
    assert assign_to_ranks([5], 3) == [0]
    assert assign_to_ranks([], 3) == []


def test_ranks_exchange_what_evens_them_out() -> None:
    """The classic case that the largest first gets wrong: 3 3 2 2 2 are 7 and 5, and 6 and 6 by an exchange."""
    assert loads([3, 3, 2, 2, 2], assign_to_ranks([3, 3, 2, 2, 2], 2), 2).tolist() == [6, 6]
    rng = np.random.default_rng(0)
    for ranks in (2, 8, 64):
        work = rng.lognormal(0, 0.5, 10 * ranks)
        assigned = assign_to_ranks(work.tolist(), ranks)
        assert loads(work, assigned, ranks).max() < 1.015 * work.sum() / ranks


def test_what_prefers_a_rank_leaves_it_only_to_even_the_work_out() -> None:
    even = [0, 0, 1, 1, 2, 2]
    assert assign_to_ranks([1, 2, 2, 1, 3, 0], 3, preferred=even) == even
    rng = np.random.default_rng(1)
    work, preferred = rng.lognormal(0, 0.5, 160), np.repeat(np.arange(16), 10)
    assert loads(work, preferred.tolist(), 16).max() > 1.1 * work.sum() / 16
    assigned = assign_to_ranks(work.tolist(), 16, preferred=preferred.tolist())
    assert loads(work, assigned, 16).max() < 1.04 * work.sum() / 16
    assert (np.array(assigned) == preferred).mean() > 0.6
    # All at one rank, as at the end of an epoch.
    assigned = assign_to_ranks(work.tolist(), 16, preferred=[3] * 160)
    assert loads(work, assigned, 16).max() < 1.04 * work.sum() / 16
    # Of one rank too many: the surplus goes elsewhere.
    assert assign_to_ranks([1, 1, 1, 1], 2, preferred=[0, 0, 0, 1]) == [0, 0, 1, 1]
    # What prefers none goes where there is room.
    assert assign_to_ranks([9, 1, 1, 1, 1, 1, 1], 2, preferred=[-1, 1, 1, -1, 1, -1, 1]) == [0, 1, 1, 1, 1, 1, 1]


@dataclass(frozen=True)
class AtHome(Shuffled):
    """Records with a rank that has their images."""

    homes: Any = None

    def windows(self, epoch: int) -> list[list[int]]:
        return []

    def slots(self, epoch: int) -> Any:
        return self.homes


@pytest.mark.parametrize("packing", ["none", "samples", "shared-image"])
def test_records_are_computed_where_their_images_are(packing: Any) -> None:
    lengths = pages_of(np.random.default_rng(6), 400, 2)
    homes = lengths.page % 4
    settings: dict[str, Any] = {"batch_size": 64, "pack_tokens": 8192, "shared_image_max": 4, "world_size": 4}
    plan = BatchPlan(lengths, packing, costs=COSTS, order=AtHome(len(lengths), 0, homes), **settings)
    at_home = [
        homes[index] == rank
        for step in plan.steps(0)
        for rank, rows in enumerate(step)
        for row in rows
        for group in row
        for index in group
    ]
    assert len(at_home) == 800
    assert np.mean(at_home) > 0.6
    assert most_over_mean(plan) < 1.05


def test_rows_of_equal_work() -> None:
    assert fill_rows([5, 4, 3, 2], 7) == [[0, 3], [1, 2]]
    assert even_rows([5, 4, 3, 2], [5, 4, 3, 2], 14, 2) == [[0, 3], [1, 2]]
    assert even_rows([5, 1], [5, 1], 14, 3) == [[0], [1]]
    assert even_rows([1, 1, 9], [4, 4, 4], 8, 2) == [[2], [0, 1]]
    assert even_rows([1, 1, 1], [4, 4, 4], 5, 2) is None
    assert abreast([1, 5, 3, 4, 2], 2) == [[1, 2, 0], [3, 4]]
    assert abreast([1, 5, 3, 4, 2], 2, preferred=[1, 1, 1, 1, 0]) == [[3, 4], [1, 2, 0]]
    assert abreast([1, 5, 3, 4, 2, 6], 2, preferred=[1, 1, -1, -1, -1, -1]) == [[5, 3, 4], [1, 2, 0]]
    assert even_rows([1, 1], [9, 9], 5, 2) == [[0], [1]]  # longer than a row: by itself


def test_work_is_what_the_model_computes() -> None:
    """Tokens, crops and pairs of a packed row counted anew; pairs by the mask that every backend is tested against."""
    prefix, below = np.array([30, 30, 30, 0]), np.array([5, 7, 2, 11])
    crops, targets = np.array([4, 4, 4, 0]), np.array([2, 3, 1, 4])
    lengths = RecordLengths(prefix + below, np.array([28, 28, 28, 0]), targets, crops, prefix, np.array([0, 0, 0, 1]))
    costs = Costs(token=1e9, pair=1e3, crop=1e12, image_token=1e6, target=1.0)
    tokens, layout = 30 + 5 + 7 + 2 + 11, ((30, 5, 7, 2), (0, 11))
    pairs = 2 * int(visible(layout).sum()) - tokens
    plan = BatchPlan(lengths, "shared-image", batch_size=4, pack_tokens=100, shared_image_max=4, costs=costs)
    assert plan.work(((0, 1, 2), (3,))) == 1e9 * tokens + 1e3 * pairs + 4e12 + 28e6 + 10
    # The same page in two groups of a row is encoded once; alone, records have all that they need.
    apart = 2 * int(visible(((30, 5, 7), (0, 32))).sum()) - 74
    assert plan.work(((0, 1), (2,))) == 1e9 * 74 + 1e3 * apart + 4e12 + 28e6 + 6
    # A padded row: as many as the longest of it.
    padded = BatchPlan(lengths, batch_size=4, micro_batch_size=2, costs=costs)
    assert padded.work(((1,), (3,))) == 1e9 * 2 * 37 + 1e3 * 2 * 37**2 + 4e12 + 28e6 + 7


def test_what_a_step_costs() -> None:
    """Counted anew: 23 layers of CLIP ViT-L over 577 patches, 32 of Phi-3's decoder."""
    shape = ModelShape.of(Phi3VConfig())
    products, attention = 23 * 2 * 577 * (4 * 1024**2 + 2 * 1024 * 4096), 23 * 4 * 577**2 * 1024
    token = 32 * 2 * (4 * 3072**2 + 3 * 3072 * 8192)
    full = shape.training_costs()
    assert full.token == 3 * token
    assert full.crop == 3 * (products + attention)
    assert full.pair == 3 * 32 * 2 * 3072
    assert full.target == 3 * 2 * 3072 * 32064
    lora = shape.training_costs(adapters=True)
    assert (lora.token, lora.crop, lora.pair) == (2 * token, 2 * products + 3 * attention, full.pair)
    assert shape.training_costs(tower_trained=False).crop == products + attention
    kept = shape.training_costs(tower_trained=False, features_kept=True)
    assert (kept.crop, kept.image_token, kept.token) == (0, 0, full.token)
    again = shape.training_costs(decoder_again=True, tower_again=True)
    assert (again.token, again.crop) == (4 * token, 4 * (products + attention))


def most_over_mean(plan: BatchPlan) -> float:
    """Mean over the whole steps of an epoch."""
    values = []
    for step in list(plan.steps(0))[:-1]:
        work = [sum(map(plan.work, rows)) for rows in step]
        values.append(max(work) / np.mean(work))
    return float(np.mean(values))


@pytest.mark.parametrize("packing", ["none", "samples"])
def test_ranks_have_equal_work(packing: Any) -> None:
    """By tokens alone crops are left out, which cost 50 tokens each beside the 144 that they make."""
    lengths = pages_of(np.random.default_rng(2), 500, 1)
    settings: dict[str, Any] = {"batch_size": 64, "pack_tokens": 8192, "world_size": 8}
    assert most_over_mean(BatchPlan(lengths, packing, costs=COSTS, **settings)) < 1.02


def test_a_group_is_cut_in_two_where_a_rank_would_wait_for_it() -> None:
    """One page with 30 long questions among ten pages with one: its prefix twice is less than the wait."""
    page = np.concatenate([np.zeros(30, dtype=np.int64), np.arange(1, 11)])
    prefix = np.full(40, 100)
    lengths = RecordLengths(prefix + 100, 0 * prefix, 0 * prefix, 0 * prefix, prefix, page)
    plan = BatchPlan(lengths, "shared-image", batch_size=40, pack_tokens=9000, shared_image_max=30, world_size=2)
    (step,) = plan.steps(0)
    groups = [group for rows in step for row in rows for group in row]
    assert sorted(index for group in groups for index in group) == list(range(40))
    assert sorted(map(len, groups))[-2:] == [15, 15]
    assert most_over_mean_of(plan, step) < 1.05
    # Pages that are nearly all prefix stay whole: two halves are nearly two pages.
    whole = BatchPlan(
        pages_of(np.random.default_rng(0), 5, 4),
        "shared-image",
        batch_size=20,
        pack_tokens=9000,
        shared_image_max=4,
        world_size=2,
        costs=COSTS,
    )
    (step,) = whole.steps(0)
    assert {len(group) for rows in step for row in rows for group in row} == {4}


def most_over_mean_of(plan: BatchPlan, step: Any) -> float:
    work = [sum(map(plan.work, rows)) for rows in step]
    return float(max(work) / np.mean(work))


@pytest.mark.parametrize("packing", ["none", "samples", "shared-image"])
def test_rows_that_ranks_compute_at_the_same_time_are_alike(packing: Any) -> None:
    """Where ranks meet in every row, a step takes as long as its largest row at each place."""
    lengths = pages_of(np.random.default_rng(3), 400, 3)
    plan = BatchPlan(
        lengths,
        packing,
        batch_size=96,
        micro_batch_size=2,
        pack_tokens=8192,
        shared_image_max=8,
        world_size=4,
        costs=COSTS,
    )

    def waiting(equal: bool) -> float:
        times, least = 0.0, 0.0
        for step in plan.steps(0, equal=equal):
            work = [[plan.work(row) for row in rows] for rows in step]
            most = max(map(len, work))
            assert not equal or len({len(rows) for rows in step}) == 1
            rows = [own + [min(own)] * (most - len(own)) for own in work]
            times += sum(map(max, zip(*rows, strict=True)))
            least += sum(map(sum, work)) / 4
        return times / least

    assert waiting(True) < 1.1
    assert waiting(True) < waiting(False)
    for step, other in zip(plan.steps(1), plan.steps(1, equal=True), strict=True):
        of_steps = [sorted(i for rows in each for row in rows for g in row for i in g) for each in (step, other)]
        assert of_steps[0] == of_steps[1]
