"""Processes that read data ahead of what needs it.

Torch's ``DataLoader`` passes tensors through shared memory, one file descriptor each, so Docker's 64 MB of ``/dev/shm``
and a small ``ulimit -n`` are too little for pages of images; and at exit SIGTERM ends its processes, which those of a
training job have to survive. Here batches come through pipes, and the code that reads ends the processes.
"""

from __future__ import annotations

import contextlib
import errno
import io
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, cast

import torch

from phi3v.data.progress import in_order
from phi3v.errors import UserError

AHEAD = 2  # batches that a process may be ahead
WATCH_SECONDS = 1.0
SECONDS_TO_END = 5.0
# Signals that may come to all processes of a job. The one that trains decides what becomes of them.
JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_fetch: Callable[[Any], Any]


class Readers:
    """Calls a function for keys in order, ahead of time in ``num_workers`` processes, or when asked if there are none.

    A context manager: at its end the processes are gone. They also end by themselves once their parent is gone.

    Args:
        fetch: makes an item of a key. The processes are forked, so it may refer to anything that they only read.
        timeout: seconds to wait for one item.
    """

    def __init__(self, fetch: Callable[[Any], Any], num_workers: int = 0, *, timeout: float = 1800.0) -> None:
        self.fetch = fetch
        self.num_workers = num_workers
        self.timeout = timeout
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Readers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, keys: Iterable[Any]) -> Generator[Any]:
        """The items of ``keys``, in their order; what ``fetch`` raises is raised where its item would come.

        Raises:
            UserError: a process was killed, or gave nothing in time.
        """
        if self.num_workers == 0:
            yield from map(self.fetch, keys)
            return
        with contextlib.closing(in_order(keys, self._submit, AHEAD * self.num_workers)) as items:
            for _, future in items:
                yield self._wait(future)

    def close(self) -> None:
        """End the processes, by force if one does not end by itself."""
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        processes = list((pool._processes or {}).values())
        manager = cast(threading.Thread | None, pool._executor_manager_thread)
        pool.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + SECONDS_TO_END
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join(WATCH_SECONDS)
        # This thread waits for the processes too, and only the first to wait for one learns that it has ended.
        if manager is not None:
            manager.join(WATCH_SECONDS)

    def _submit(self, key: Any) -> Future[bytes]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.num_workers, multiprocessing.get_context("fork"), _begin, (self.fetch, os.getpid())
            )
        try:
            return self._pool.submit(_run, key)
        except BrokenProcessPool:
            raise _killed() from None
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM):
                raise
            raise UserError(
                f"no process to read data could be started: {error.strerror}",
                where="data.num_workers",
                hint="lower it, or raise the limit (ulimit -n, ulimit -u)",
            ) from None

    def _wait(self, future: Future[bytes]) -> Any:
        try:
            return pickle.loads(future.result(timeout=self.timeout))
        except BrokenProcessPool:
            raise _killed() from None
        except NotYet:
            if future.done():  # a timeout that the item itself met
                raise
            raise UserError(
                f"no batch came within {self.timeout / 60:g} minutes",
                where="data.num_workers",
                hint="check that the disk with the images responds, or raise distributed.timeout_minutes",
            ) from None


def _killed() -> UserError:
    return UserError(
        "a process that reads data was killed, most likely for want of memory",
        where="data.num_workers",
        hint="lower it (0 reads in the training process), or give the job more memory",
    )


def _begin(fetch: Callable[[Any], Any], parent: int) -> None:
    """What a reading process does first."""
    global _fetch
    _fetch = fetch
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(0)


def _run(key: Any) -> bytes:
    try:
        item = _fetch(key)
    except UserError as error:  # one of its subclasses may not travel
        raise UserError(str(error)) from None
    file = io.BytesIO()
    _PlainPickler(file, protocol=5).dump(item)
    return file.getvalue()


class _PlainPickler(pickle.Pickler):
    """Writes tensors as their bytes, where torch would write the name of a piece of shared memory."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _tensor, (value.contiguous().view(-1).view(torch.uint8).numpy(), value.dtype, value.shape)
        return NotImplemented


def _tensor(content: Any, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(content).view(dtype).view(shape)


@contextlib.contextmanager
def reading(
    fetch: Callable[[Any], Any], keys: Iterable[Any], num_workers: int = 0, *, timeout: float = 1800.0
) -> Iterator[Iterator[Any]]:
    """`Readers` for one pass over ``keys``."""
    with Readers(fetch, num_workers, timeout=timeout) as readers, contextlib.closing(readers.read(keys)) as items:
        yield items
