"""The plan of batches, in random cases, and how a row is built."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import RandomSampler

from phi3v.data.batches import BatchPlan, RowPlan, Step, rows_of_rank
from phi3v.data.collate import Page, Sample, pack_row, shared_tokens
from phi3v.data.lengths import RecordLengths, measure_table
from phi3v.data.order import Shuffled
from phi3v.data.readers import Readers
from phi3v.data.rows import RowDataset, read_steps
from phi3v.data.table import open_table
from phi3v.model.shape import Costs
from phi3v.processing.hd_transform import ImageAlignmentError
from phi3v.processing.processor import Phi3VProcessor


def lengths_of(tokens: Any, prefix: Any, page: Any, crops: Any = None) -> RecordLengths:
    """Lengths of which the plan needs no more."""
    zeros = np.zeros_like(tokens)
    return RecordLengths(tokens, zeros, zeros, zeros if crops is None else crops, prefix, page)


def random_lengths(rng: np.random.Generator, count: int) -> RecordLengths:
    """Pages of 1 to 15 records, of 100 to 600 tokens and 2 to 80 more for each record."""
    pages = np.repeat(np.arange(count), rng.integers(1, 16, size=count))[:count]
    prefix = rng.integers(100, 600, size=count)[pages]
    return lengths_of(prefix + rng.integers(2, 80, size=count), prefix, pages)


def check_epoch(plan: BatchPlan, steps: list[Step]) -> None:
    """What holds for every plan."""
    lengths = plan.lengths
    seen: Counter[int] = Counter()
    for step in steps:
        assert len(step) == plan.world_size
        for rows in step:
            assert rows or len(groups_of(step)) < plan.world_size
            for row in rows:
                assert sum(map(plan.tokens, row)) <= plan.pack_tokens or [len(group) for group in row] == [1]
                for group in row:
                    seen.update(group)
                    assert len({lengths.page[index] for index in group}) == 1
                    assert plan.packing == "shared-image" or len(group) == 1
    assert len(steps) == plan.num_steps
    assert sorted(seen) == list(range(len(lengths.tokens)))
    assert set(seen.values()) == {1}  # every record once


def groups_of(step: Step) -> list[Any]:
    return [group for rows in step for row in rows for group in row]


def samples(step: Step) -> int:
    return sum(map(len, groups_of(step)))


def rank_tokens(plan: BatchPlan, step: Step) -> list[int]:
    return [sum(plan.tokens(group) for row in rows for group in row) for rows in step]


@pytest.mark.parametrize("packing", ["samples", "shared-image"])
def test_random_plans(packing: Any) -> None:
    rng = np.random.default_rng(0)
    for case in range(40):
        world = int(rng.integers(1, 5))
        batch = int(rng.integers(world, 40))
        lengths = random_lengths(rng, int(rng.integers(world, 300)))
        settings = {
            "batch_size": batch,
            "batch_tokens": int(rng.integers(500, 9000)) if case % 2 else None,
            "pack_tokens": int(rng.integers(150, 4000)),
            "shared_image_max": int(rng.integers(1, 12)),
            "world_size": world,
            "seed": case,
        }
        plan = BatchPlan(lengths, packing, **settings)
        epochs = [list(plan.steps(epoch)) for epoch in range(2)]
        for steps in epochs:
            check_epoch(plan, steps)
            if settings["batch_tokens"] is None:
                assert all(samples(step) == batch for step in steps[:-1])
                assert 1 <= samples(steps[-1]) <= batch
        # Made again, the same; another epoch or seed, another order.
        assert epochs[0] == list(BatchPlan(lengths, packing, **settings).steps(0))
        if len(lengths.tokens) > 20:
            assert epochs[0] != epochs[1]
            assert epochs[0] != list(BatchPlan(lengths, packing, **settings | {"seed": case + 1}).steps(0))


def test_ranks_have_like_numbers_of_tokens() -> None:
    """Never further apart than the largest group of the step, and over an epoch within a tenth."""
    rng = np.random.default_rng(1)
    plan = BatchPlan(
        random_lengths(rng, 3000), "shared-image", batch_size=64, pack_tokens=4096, shared_image_max=8, world_size=4
    )
    steps = list(plan.steps(0))
    totals = np.array([rank_tokens(plan, step) for step in steps])
    for step, tokens in zip(steps, totals, strict=True):
        largest = max(plan.tokens(group) for rows in step for row in rows for group in row)
        assert tokens.max() - tokens.min() <= largest
    assert totals.sum(0).max() < 1.1 * totals.sum(0).min()


@pytest.mark.parametrize("packing", ["none", "samples", "shared-image"])
def test_ranks_have_like_work_crops_included(packing: Any) -> None:
    """By tokens alone, ranks with images and ranks with texts would be far apart."""
    rng = np.random.default_rng(3)
    tokens, crops = rng.integers(200, 400, 512), np.where(rng.random(512) < 0.5, 17, 0)
    lengths = lengths_of(tokens, np.zeros(512, int), np.arange(512), crops)

    def spread(crop: float) -> float:
        """Of the work with crops between the ranks, the mean over steps as a share of a rank's."""
        plan = BatchPlan(
            lengths, packing, batch_size=64, micro_batch_size=2, pack_tokens=2000, world_size=4, costs=Costs(crop=crop)
        )
        apart = []
        for step in plan.steps(0):
            rows = [[index for row in rows for group in row for index in group] for rows in step]
            work = [sum(tokens[index] + 50 * crops[index] for index in records) for records in rows]
            apart.append((max(work) - min(work)) / np.mean(work))
        return float(np.mean(apart))

    assert spread(50.0) < 0.5 * spread(0.0)
    assert spread(50.0) < 0.1


def test_tokens_a_step() -> None:
    """Steps of batch_tokens, give or take a group."""
    lengths = random_lengths(np.random.default_rng(2), 2000)
    plan = BatchPlan(
        lengths, "shared-image", batch_size=1, batch_tokens=20_000, pack_tokens=4096, shared_image_max=8, seed=3
    )
    tokens = [sum(rank_tokens(plan, step)) for step in plan.steps(0)]
    assert 0.9 * 20_000 < np.mean(tokens) < 1.1 * 20_000
    assert max(tokens) < 20_000 + 2 * 1200


def test_a_page_is_shared_and_its_questions_limited() -> None:
    """Ten questions of each of 50 pages, at most four together: 4 + 3 + 3, and far fewer tokens than apart."""
    pages = np.repeat(np.arange(50), 10)
    lengths = lengths_of(np.full(500, 320), np.full(500, 300), pages)
    plan = BatchPlan(lengths, "shared-image", batch_size=500, pack_tokens=2000, shared_image_max=4)
    sizes = np.diff(plan.chunks(0).starts, append=500).tolist()
    assert Counter(sizes) == {4: 100, 2: 50} or Counter(sizes) == {4: 50, 3: 100}
    assert plan.epoch_tokens() == 150 * 300 + 500 * 20
    # In one step, what chance brings together shares its page again, as far as a row has room.
    (step,) = plan.steps(0)
    assert sum(rank_tokens(plan, step)) == 50 * 300 + 500 * 20


@pytest.mark.parametrize("pack_tokens", [400, 900, 5000])
def test_the_order_of_pages_is_that_of_the_plain_way(pack_tokens: int) -> None:
    """Page by page, record by record: what runs were started with goes on as it began."""
    rng = np.random.default_rng(pack_tokens)
    lengths = random_lengths(rng, 200)
    plan = BatchPlan(lengths, "shared-image", batch_size=8, pack_tokens=pack_tokens, shared_image_max=4, seed=7)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(7 + 2)).tolist()
    pages: dict[int, list[int]] = {}
    for index in order:
        pages.setdefault(int(lengths.page[index]), []).append(index)
    chunks: list[list[int]] = []
    for records in pages.values():
        limit, room, size = -(-len(records) // -(-len(records) // 4)), 0, 0
        for index in records:
            added = int(lengths.tokens[index] - lengths.prefix[index])
            if size in (0, limit) or added > room:
                chunks.append([])
                room, size = pack_tokens - int(lengths.prefix[index]), 0
            chunks[-1].append(index)
            room, size = room - added, size + 1
    chunks.sort(key=lambda chunk: order.index(min(chunk)))
    assert plan.chunks(2).records.tolist() == list(chain(*chunks))
    assert np.diff(plan.chunks(2).starts, append=200).tolist() == list(map(len, chunks))


@dataclasses.dataclass
class Twice:
    """Every record twice an epoch."""

    records: int

    def __len__(self) -> int:
        return 2 * self.records

    def of_epoch(self, epoch: int) -> Any:
        return np.random.default_rng(epoch).permutation(2 * self.records) % self.records


@pytest.mark.parametrize("packing", ["none", "samples", "shared-image"])
def test_a_record_may_come_twice_an_epoch(packing: Any) -> None:
    """Beside others of its page also in one group; one that shares nothing never with itself."""
    lengths = random_lengths(np.random.default_rng(4), 60)
    alone = np.arange(60) % 3 == 0
    page, prefix = np.where(alone, 100 + np.arange(60), lengths.page), np.where(alone, 0, lengths.prefix)
    lengths = lengths_of(lengths.tokens, prefix, page)
    plan = BatchPlan(
        lengths, packing, batch_size=24, pack_tokens=2000, shared_image_max=8, world_size=3, order=Twice(60)
    )
    assert (len(plan), plan.num_steps) == (120, 5)
    groups = [group for step in plan.steps(1) for group in groups_of(step)]
    assert Counter(chain(*groups)) == dict.fromkeys(range(60), 2)
    assert all(len(group) == 1 for group in groups if alone[group[0]])
    assert packing != "shared-image" or any(len(set(group)) < len(group) for group in groups)


def test_a_plan_holds_little_beside_the_lengths() -> None:
    """Every rank has one. Arrays of eight bytes, and no list of all records: those take 40 a number."""
    count = 50_000
    lengths = random_lengths(np.random.default_rng(5), count)
    tracemalloc.start()
    try:
        plan = BatchPlan(lengths, "shared-image", batch_size=64, pack_tokens=4000, shared_image_max=8, world_size=4)
        for _ in islice(plan.steps(0), 20):
            pass
        assert tracemalloc.get_traced_memory()[1] < 200 * count
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 60 * count


def test_where_nothing_is_shared_the_order_is_one() -> None:
    lengths = dataclasses.replace(random_lengths(np.random.default_rng(0), 40), page=np.arange(40))
    for epoch in range(3):
        orders = []
        for packing in ("samples", "shared-image"):
            plan = BatchPlan(lengths, packing, batch_size=8, pack_tokens=2000, shared_image_max=8, seed=5)  # type: ignore[arg-type]
            orders.append(plan.chunks(epoch).records.tolist())
        assert orders[0] == orders[1]
        # That of padded batches: torch's sampler, seeded with the run's seed and the epoch.
        generator = torch.Generator().manual_seed(5 + epoch)
        assert orders[0] == list(RandomSampler(range(40), generator=generator))


def test_a_page_with_many_records_comes_no_earlier_than_others() -> None:
    """Mean place of 10 pages of five among 50 of one: within 4 standard errors of the middle."""
    pages = np.concatenate([np.arange(50), np.repeat(np.arange(50, 60), 5)])
    lengths = lengths_of(np.full(100, 320), np.full(100, 300), pages)
    plan = BatchPlan(lengths, "shared-image", batch_size=10, pack_tokens=2000, shared_image_max=8)
    sizes = [np.diff(plan.chunks(epoch).starts, append=100) for epoch in range(200)]
    places = [place / 59 for each in sizes for place in np.flatnonzero(each == 5)]
    assert len(places) == 2000
    assert np.mean(places) == pytest.approx(0.5, abs=4 * 0.29 / np.sqrt(2000))


def plans(world: int) -> list[BatchPlan]:
    lengths = random_lengths(np.random.default_rng(0), 7)
    padded = BatchPlan(lengths, batch_size=4, micro_batch_size=2, world_size=world, seed=3)
    common: dict[str, Any] = {"pack_tokens": 1500, "shared_image_max": 4, "world_size": world, "seed": 3}
    packed: list[BatchPlan] = [
        BatchPlan(lengths, packing, batch_size=4, batch_tokens=tokens, **common)
        for packing in ("samples", "shared-image")
        for tokens in (None, 1500)
    ]
    return [padded, *packed]


@pytest.mark.parametrize("world", [2, 3, 9])
@pytest.mark.parametrize("equal", [False, True])
def test_a_step_has_the_same_records_on_any_number_of_ranks(world: int, equal: bool) -> None:
    """Each once, also where records, steps and ranks do not divide, or a step has fewer records than ranks."""
    for one, several in zip(plans(1), plans(world), strict=True):
        for epoch in range(2):
            alone = [sorted(index for row in step[0] for group in row for index in group) for step in one.steps(epoch)]
            ranks = [list(rows_of_rank(several, rank, epoch, equal=equal)) for rank in range(world)]
            together: list[list[int]] = [[] for _ in alone]
            for rows in ranks:
                step = 0
                for plan in rows:
                    if not plan.fills:
                        together[step] += [index for group in plan.row for index in group]
                    step += plan.ends_step
                assert step == len(alone)
            assert [sorted(records) for records in together] == alone
            assert sorted(chain(*alone)) == list(range(7))
            if equal:
                assert len({len(rows) for rows in ranks}) == 1


def test_a_plan_goes_on_from_any_step_without_reading_what_is_skipped() -> None:
    read: list[Any] = []

    def fetch(row: RowPlan) -> dict[str, Any]:
        read.append(row)
        return {"ends_step": row.ends_step}

    for plan in plans(2):
        whole = list(plan.steps(1))
        for first in range(len(whole)):
            assert list(plan.steps(1, first)) == whole[first:]
            read.clear()
            assert len(list(read_steps(plan, 0, Readers(fetch), 1, first_step=first))) == len(whole) - first
            assert read == list(rows_of_rank(plan, 0, 1, first_step=first))


def test_padded_batches_come_in_the_order_of_the_librarys_sampler() -> None:
    lengths = lengths_of(np.full(40, 9), np.zeros(40, int), np.arange(40))
    (step, *_) = BatchPlan(lengths, batch_size=8, micro_batch_size=2, world_size=2, seed=5).steps(1)
    order = list(RandomSampler(range(40), generator=torch.Generator().manual_seed(5 + 1)))
    assert step == [
        [((order[0],), (order[1],)), ((order[4],), (order[5],))],
        [((order[2],), (order[3],)), ((order[6],), (order[7],))],
    ]


def sample(ids: list[int], answer: int) -> Sample:
    """``answer``: tokens at the end that are targets."""
    return Sample(ids, [-100] * (len(ids) - answer) + ids[-answer:], [])


@pytest.mark.parametrize("equal", [False, True])
def test_padded_rows_hold_records_of_like_lengths(equal: bool) -> None:
    """Of lengths far apart nearly nothing is padded, and a step's records stay those that chance drew."""
    tokens = np.where(np.random.default_rng(4).random(400) < 0.5, 20, 1000)
    lengths = lengths_of(tokens, np.zeros(400, int), np.arange(400))
    plan = BatchPlan(lengths, batch_size=40, micro_batch_size=4, world_size=2, seed=5)
    order = list(RandomSampler(range(400), generator=torch.Generator().manual_seed(5)))
    for number, step in enumerate(plan.steps(0, equal=equal)):
        rows = [[tokens[index] for (index,) in row] for rows in step for row in rows]
        assert sum(len(set(row)) > 1 for row in rows) <= 1
        records = sorted(index for rows in step for row in rows for (index,) in row)
        assert records == sorted(order[40 * number : 40 * number + 40])


def test_with_a_row_for_each_rank_none_has_two() -> None:
    """Gradients of several rows take memory that the planner counts only where there are more rows than ranks."""
    tokens = np.array([1000, 10, 10, 10])
    lengths = lengths_of(tokens, np.zeros(4, int), np.arange(4))

    class Home(Shuffled):
        """All but one have their images at the second rank."""

        def windows(self, epoch: int) -> list[list[int]]:
            return [[0, 1]]

        def slots(self, epoch: int) -> Any:
            return np.array([0, 1, 1, 1])

    (step,) = BatchPlan(lengths, batch_size=4, world_size=4, order=Home(4, 0)).steps(0)
    assert [len(rows) for rows in step] == [1, 1, 1, 1]


def test_what_is_shared_ends_before_the_answers() -> None:
    one = sample([1, 5, 6, 7, 8, 9], 2)
    assert shared_tokens([one]) == 0
    assert shared_tokens([one, sample([1, 5, 6, 2, 8, 9], 2)]) == 3
    # The same question twice, with different answers: its last token speaks for each.
    assert shared_tokens([one, sample([1, 5, 6, 7, 3, 9], 2)]) == 3
    assert shared_tokens([one, sample([1, 5, 6], 1), sample([1, 5, 6, 7, 8, 9, 9], 1)]) == 1


def test_placeholders_that_do_not_fit_their_images(
    table: Any, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found where a row is made, with both counts, line and record: the model takes the row as it is."""
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir)
    dataset = RowDataset(table, processor, packed=True)
    monkeypatch.setattr(Page, "num_img_tokens", 312)
    record = table[1]
    where = rf"jsonl:{record.line} \(record {record.id}\): image 1 has 312 placeholder tokens but 313 features"
    with pytest.raises(ImageAlignmentError, match=where):
        dataset.samples((1,))
    with pytest.raises(ImageAlignmentError, match=r"records .* share images and differ before the last of them"):
        pack_row([[sample([1, -1, 5, 6], 1), sample([2, -1, 5, 6], 1)]])


def test_a_row() -> None:
    row = pack_row([[sample([1, 5, 6, 7, 8], 2), sample([1, 5, 4, 9], 1)], [sample([1, 3], 1)]])
    assert row["layout"] == ((2, 3, 2), (0, 2))
    assert row["input_ids"].tolist() == [[1, 5, 6, 7, 8, 4, 9, 1, 3]]
    assert row["labels"].tolist() == [[-100, -100, -100, 7, 8, -100, 9, -100, 3]]
    assert row["loss_weights"].tolist() == [[0, 0, 0, 0.5, 0.5, 0, 1, 0, 1]]
    assert row["counts"][:4] == (3.0, 3, 3, 9)
    by_token = pack_row([[sample([1, 5, 6, 7, 8], 2)]], "token")
    assert by_token["loss_weights"].tolist() == [[0, 0, 0, 1, 1]]
    assert "pages" not in row


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two questions about one image, one about two, one about none, and a talk that brings its second one late."""
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 30), "white").save(tmp_path / "images" / f"{name}.png")
    turns = [
        [{"images": ["a.png"], "user": "what is it?", "assistant": "a circle"}],
        [{"images": ["a.png", "b.png"], "user": "are they alike?", "assistant": "yes"}],
        [{"images": ["a.png"], "user": "what colour is it?", "assistant": "red"}],
        [{"user": "are you there?", "assistant": "yes"}],
        [
            {"images": ["a.png"], "user": "what is it?", "assistant": "a circle"},
            {"images": ["b.png"], "user": "and this?", "assistant": "a square"},
        ],
    ]
    lines = [json.dumps({"id": str(k), "source": "test", "conversations": t}) for k, t in enumerate(turns)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    return open_table(tmp_path / "data.jsonl")


def test_records_are_measured_without_decoding(table: Any, tiny_model_dir: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir)
    lengths = measure_table(table, processor).at(1)
    dataset = RowDataset(table, processor, packed=True)
    streams = [dataset.samples((index,))[0].input_ids for index in range(5)]
    assert lengths.tokens.tolist() == [len(ids) for ids in streams]
    prefixes = [max(k for k, token in enumerate(ids) if token < 0) + 1 for ids in streams[:3]]
    assert lengths.prefix.tolist() == [*prefixes, 0, 0]
    page = lengths.page.tolist()
    assert page[0] == page[2]
    assert len(set(page)) == 4
    # A switch of factors between the two keeps them apart.
    between = measure_table(table, processor).at(1, int(lengths.tokens[[0, 2]].min()))
    assert lengths.tokens[0] != lengths.tokens[2]
    assert between.page[0] != between.page[2]


def test_the_loader_gives_each_rank_its_rows(table: Any, tiny_model_dir: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir)
    plan = BatchPlan(
        measure_table(table, processor).at(1),
        "shared-image",
        batch_size=5,
        pack_tokens=700,
        shared_image_max=4,
        world_size=2,
    )
    dataset = RowDataset(table, processor, packed=True)
    (step,) = plan.steps(3)
    tokens = 0
    for rank in range(2):
        (rows,) = read_steps(plan, rank, Readers(dataset.__getitem__), 3)
        assert [len(row["layout"]) for row in rows] == [len(row) for row in step[rank]]
        for row in rows:
            assert row["input_ids"].shape == (1, sum(map(sum, row["layout"])))
            tokens += row["input_ids"].shape[1]
    assert tokens <= sum(sum(rank_tokens(plan, step)) for step in plan.steps(3))
    assert dataclasses.asdict(plan.lengths)["tokens"].sum() > tokens  # the two questions share their image


def test_ranks_that_meet_in_every_row_have_equally_many(table: Any, tiny_model_dir: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir)
    lengths = measure_table(table, processor).at(1)
    plan = BatchPlan(lengths, "samples", batch_size=3, pack_tokens=1, shared_image_max=4, world_size=2)
    dataset = RowDataset(table, processor, packed=True)
    uneven, equal = (
        [[dataset[row] for row in rows_of_rank(plan, rank, 0, equal=equal)] for rank in range(2)]
        for equal in (False, True)
    )
    assert len(uneven[0]) != len(uneven[1])
    assert len(equal[0]) == len(equal[1]) == max(map(len, uneven))
    for before, after in zip(uneven, equal, strict=True):
        assert sum(row["ends_step"] for row in after) == plan.num_steps
        # What is trained on, and what is counted, stays.
        for name in ("weight", "samples", "questions", "tokens"):
            total = [sum(getattr(row["counts"], name) for row in rows) for rows in (before, after)]
            assert total[0] == pytest.approx(total[1])
        assert sum(float(row["loss_weights"].sum()) for row in after) == pytest.approx(
            sum(float(row["loss_weights"].sum()) for row in before)
        )


def test_a_group_has_its_images_once(table: Any, tiny_model_dir: Path) -> None:
    dataset = RowDataset(table, Phi3VProcessor.from_pretrained(tiny_model_dir), packed=True)
    row = pack_row([dataset.samples((0, 2)), dataset.samples((1,))])
    assert row["page_index"] == (0, 0, 1)  # another group shows a page again: it is shipped once
    assert row["image_sizes"] == ((336, 336),) * 2
    assert row["pages"].shape == (2 * 336 * 336, 3)
    assert row["pages"].dtype == torch.uint8
    assert int((row["input_ids"] < 0).sum()) == 3 * 313
