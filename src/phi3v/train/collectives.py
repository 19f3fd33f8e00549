"""What the processes of a run tell each other beside the devices' own traffic.

It goes from host to host, so that no step waits for a device on its account.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from phi3v.errors import UserError

T = TypeVar("T")


class HostCollectives:
    """Sums and lists over all ranks. Every method is a collective: all ranks call it, in the same order.

    Args:
        world_size: ranks; of one rank everything is its own.
        timeout: how long to wait for the others.

    Attributes:
        group: of the hosts; None of one rank.
    """

    def __init__(self, world_size: int, timeout: timedelta = timedelta(minutes=30)) -> None:
        self.world_size = world_size
        self.group = distributed.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        if self.world_size == 1:
            return [float(value) for value in values]
        numbers = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(numbers, group=self.group)
        summed: list[float] = numbers.tolist()
        return summed

    def all_gather(self, value: Any) -> list[Any]:
        """The value of every rank, in their order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def run_on_first(self, rank: int, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, which alone does it; the others, perhaps on other machines, are told.

        Raises:
            UserError: that of rank 0, on all.
        """
        found: Any = None
        wrong = None
        if rank == 0:
            try:
                found = work()
            except UserError as error:
                wrong = (error.what, error.where, error.hint)
        found, wrong = self.broadcast((found, wrong))
        if wrong is not None:
            raise UserError(wrong[0], where=wrong[1], hint=wrong[2])
        given: T = found
        return given

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0."""
        if self.world_size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]
