"""Reading ahead in other processes: what comes, what goes wrong, and that nobody stays."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.data.faults import DataFaultsError, Fault
from phi3v.data.readers import Readers, reading
from phi3v.errors import UserError


def item(key: int) -> dict[str, Any]:
    return {
        "half": torch.full((2, 3), key, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 2, dtype=torch.int64),
        "scalar": torch.tensor(float(key)),
        "turned": torch.arange(6).view(2, 3).T,
        "pages": torch.full((300_000,), key, dtype=torch.uint8),
        "layout": ((key, 1),),
    }


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_items_come_in_order_and_whole(workers: int) -> None:
    with Readers(item, workers) as readers:
        for _ in range(2):  # epochs
            for key, found in enumerate(readers.read(range(20))):
                expected = item(key)
                assert found.keys() == expected.keys()
                for name, value in expected.items():
                    if isinstance(value, torch.Tensor):
                        assert found[name].dtype == value.dtype
                        assert torch.equal(found[name], value)
                        found[name] += 1  # theirs to change
                    else:
                        assert found[name] == value
    assert multiprocessing.active_children() == []


def test_neither_shared_memory_nor_file_descriptors_are_used_up() -> None:
    """Docker gives 64 MB of the one, a shell 1,024 of the others."""
    with Readers(item, 2) as readers:
        kept = []
        for found in readers.read(range(40)):
            kept.append(found)
            if len(kept) == 1:
                descriptors = len(os.listdir("/proc/self/fd"))
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        own = [f"torch_{pid}_" for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children()))]
        assert not [name for name in os.listdir("/dev/shm") if name.startswith(tuple(own))]


@pytest.mark.parametrize(
    "error",
    [
        UserError("cannot be read", where="a.png", hint="look"),
        DataFaultsError(Path("d.jsonl"), [Fault(Path("d.jsonl"), 3, "images", "is broken", "mend it")], total=1),
        ValueError("a fault of ours"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_in_its_place(error: Exception) -> None:
    def fetch(key: int) -> int:
        if key == 3:
            raise error
        return key

    with reading(fetch, range(6), 2) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(UserError if isinstance(error, UserError) else ValueError) as caught:
            next(items)
    assert str(caught.value) == str(error)


def test_a_killed_process_is_named(tmp_path: Path) -> None:
    def fetch(key: int) -> int:
        if key == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return key

    with reading(fetch, range(6), 2) as items, pytest.raises(UserError, match="killed, most likely for want of memory"):
        list(items)
    assert multiprocessing.active_children() == []


def test_no_wait_is_endless() -> None:
    def fetch(key: int) -> int:
        time.sleep(600)
        return key

    started = time.monotonic()
    with reading(fetch, range(2), 1, timeout=0.2) as items, pytest.raises(UserError, match="no batch came within"):
        next(items)
    assert multiprocessing.active_children() == []
    assert time.monotonic() - started < 60


def test_signals_of_a_job_are_left_to_the_process_that_trains() -> None:
    def fetch(key: int) -> int:
        if key:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
                os.kill(os.getpid(), number)
        return key

    with reading(fetch, range(4), 2) as items:
        assert list(items) == [0, 1, 2, 3]


def test_leaving_early_leaves_nothing() -> None:
    def run(use: Callable[[Any], Any]) -> None:
        with reading(item, range(1000), 2) as items:
            use(items)

    run(next)
    assert multiprocessing.active_children() == []
