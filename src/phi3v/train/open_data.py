"""The data of a run, opened: its tables, what an epoch takes of them, and the questions to evaluate on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phi3v.config import RunConfig
from phi3v.data.check import ensure_checked
from phi3v.data.collate import QuestionDataset
from phi3v.data.mixture import open_sources
from phi3v.data.order import Mixed, Order, ShardOrder, ShardWindows, epoch_counts
from phi3v.data.shards.index import require_data
from phi3v.data.shards.store import ShardStore
from phi3v.data.table import RecordTable
from phi3v.errors import UserError
from phi3v.findings import Finding
from phi3v.processing.processor import Phi3VProcessor


def open_data(config: RunConfig) -> tuple[RecordTable, RecordTable | None]:
    """The checked data files.

    Raises:
        UserError: no data, or faults in it.
    """
    hashes = [
        ensure_checked(
            path,
            **config.data.reading,
            image_level=config.data.image_check,
            progress=config.training.progress_bar,
        ).sha256
        for path in data_files(config)
    ]
    return open_tables(config, hashes, progress=config.training.progress_bar)


def open_tables(
    config: RunConfig, hashes: Sequence[str | None] = (), *, progress: bool
) -> tuple[RecordTable, RecordTable | None]:
    """The data files, of which only the records are looked at.

    Args:
        hashes: SHA-256 of each of `data_files`, where they were checked.

    Raises:
        UserError: no data, or faults in it.
    """
    data = config.data
    data_files(config)
    known = hashes or [None] * len(data.paths)
    split = len(data.train_sources)
    table = open_sources(
        data.train,
        known[:split],
        compare_images=data.packing == "shared-image",
        **data.reading,
        progress=progress,
    )
    if data.eval is None:
        return table, None
    return table, open_sources(data.eval, known[split:], **data.reading, progress=progress)


def data_files(config: RunConfig) -> list[Path]:
    """The files to train on and, where there are such, those to evaluate on.

    Raises:
        UserError: there is none to train on, or one does not exist.
    """
    if config.data.train is None:
        raise UserError("no training data", where="data.train", hint="give a JSONL file: --data.train FILE.jsonl")
    files = [Path(path) for _, path in config.data.paths]
    for file in files:
        require_data(file)
    return files


def order_of(config: RunConfig, table: RecordTable) -> Order | None:
    """What an epoch takes of the sources of a mixture, or in which order of shards; of one file all records."""
    sizes = tuple(map(len, table.sources))
    counts = epoch_counts(config.data.train_sources, sizes, config.data.mixture_ends) if sizes else [len(table)]
    return _order(table, counts, config.data.shuffle_window, config.training.seed)


def each_once(table: RecordTable) -> Order | None:
    """All records once, in an order that goes through the shards of a source one after the other."""
    return _order(table, list(map(len, table.sources or [table])), 1, 0)


def _order(table: RecordTable, counts: Sequence[int], window: int, seed: int) -> Order | None:
    """The order of so many records of each source, of which so many shards are read at the same time."""

    def windows(table: RecordTable, count: int) -> ShardWindows | None:
        if not table.shards:
            return None
        fetched = isinstance(table.images, ShardStore) and table.images.are_fetched(count / len(table))
        return ShardWindows(table.shards, window, seed, fetched)

    if not table.sources:
        return windows(table, counts[0])
    return Mixed(tuple(map(len, table.sources)), tuple(counts), seed, tuple(map(windows, table.sources, counts)))


def questions_of(
    config: RunConfig, table: RecordTable | None, processor: Phi3VProcessor, at_most: int | None = None
) -> QuestionDataset | None:
    """The questions to evaluate on: as many as configured, and ``at_most`` so many."""
    if table is None:
        return None
    limits = [limit for limit in (config.evaluation.max_questions, at_most) if limit is not None]
    seed, records = config.training.seed, None
    if table.sources:
        sizes = tuple(map(len, table.sources))
        records = Mixed(sizes, tuple(epoch_counts(config.data.eval_sources, sizes, "first")), seed).of_epoch(0)
    return QuestionDataset(table, processor, limit=min(limits, default=None), seed=seed, records=records)


def few_shards(order: Order | None, ranks: int) -> Finding | None:
    """What is said where ranks have no shard of their own to fetch, and too few records that are in none."""
    if not isinstance(order, ShardOrder):
        return None
    in_shards = (order.slots(0)[order.of_epoch(0)] >= 0).mean()
    together = max(map(len, order.windows(0)), default=0)
    if together >= ranks * in_shards:
        return None
    of_records = f", which {in_shards:.0%} of the records are in" if in_shards < 1 else ""
    return Finding(
        "shards",
        "warn",
        f"of {together} shards at a time{of_records}, {ranks - together} of {ranks} ranks have none, and ask for "
        "images one by one",
        "raise data.shuffle_window, or make smaller shards (`phi3v data shard --shard-size`)",
    )


def probe_index(table: RecordTable) -> int:
    """A record for the gradient check: the first one with an image, or the first."""
    with_images = table.image_counts().nonzero()[0]
    return int(with_images[0]) if len(with_images) else 0
