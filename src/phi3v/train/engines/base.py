"""What the rest of ``train/`` knows of how the ranks hold a run's model and optimizer.

Every method that moves tensors is a collective: all ranks call it, in the same order. Names are those of the unwrapped
model. Nothing assumes that ranks share a disk: rank 0 alone reads and writes, the others get what they need from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from phi3v.train.engines.choice import EngineChoice

if TYPE_CHECKING:
    from phi3v.train.loop import Phi3VTrainer

# What is left to write of a save. It touches host memory and files only, so a thread may do it.
DeferredWrite = Callable[[], None]


class WrongEngineError(RuntimeError):
    """Another engine runs than the one that was chosen."""


def no_op() -> None:
    """What is left where all is written, or where another rank writes."""


class Engine(ABC):
    """How the ranks hold model and optimizer.

    Attributes:
        meets_in_every_row: all ranks have to run the same number of rows a step.
        asynchronous: what `save_optimizer` leaves to do may be left to a thread.
        can_drop_step: a step whose gradient is not finite leaves the weights as they are, if its gradients are set to
            None before the optimizer's step.
    """

    meets_in_every_row: ClassVar[bool] = False
    asynchronous: ClassVar[bool] = True
    can_drop_step: ClassVar[bool] = True

    def __init__(self, rank: int, world_size: int, choice: EngineChoice) -> None:
        self.rank = rank
        self.world_size = world_size
        self.choice = choice

    @property
    def name(self) -> str:
        return self.choice.name

    def shard(self, model: Any) -> None:
        """Divide the weights before the optimizer is made, where the engine wants that."""
        return

    def adopt(self, trainer: Phi3VTrainer) -> None:
        """Do for a trainer what the library's ``Accelerator`` would do, where the engine does it itself."""
        return

    @abstractmethod
    def check(self, trainer: Phi3VTrainer) -> None:
        """Look whether this engine is what runs; called when training begins.

        Raises:
            WrongEngineError: it is not.
        """

    @abstractmethod
    def full_state_dict(self, model: Any) -> dict[str, torch.Tensor] | None:
        """Whole tensors of the model by the names of its ``state_dict``, as ``save_pretrained`` takes them.

        In the precision they are trained in. Of an adapter only what its save needs. They may be the model's own
        tensors. ``None`` on all ranks but the first.
        """

    @abstractmethod
    def load_full_state_dict(self, model: Any, tensors: dict[str, torch.Tensor] | None) -> None:
        """Put whole tensors into the model, on every rank.

        Args:
            tensors: all that is trained, by the names of ``full_state_dict``, on rank 0; ``None`` on the others.
        """

    @abstractmethod
    def save_optimizer(self, trainer: Phi3VTrainer, folder: Path, *, copy: bool = True) -> DeferredWrite:
        """Save optimizer, gradient scaler and schedule to ``folder``, which exists.

        Args:
            copy: what the next step changes; without, all is written before it.

        Returns:
            What is left to do, which touches neither model nor optimizer. Files are complete once it has run.
        """

    @abstractmethod
    def load_optimizer(self, trainer: Phi3VTrainer, folder: Path | None) -> None:
        """Take up what `save_optimizer` saved.

        Args:
            folder: ``None`` on all ranks but the first.
        """

    @abstractmethod
    def as_saved(self, model: Any, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """A whole model on every rank with the weights as they would be saved; the trained one stays as it is.

        Args:
            dtype: of the checkpoint; adapters stay as they are.
        """

    @abstractmethod
    def finished(self, model: Any, dtype: torch.dtype) -> Any:
        """As `as_saved`, for good: training is over."""


def wrong_engine(wanted: str, found: str) -> WrongEngineError:
    """The error for it; a run must not go on as something else than it says."""
    return WrongEngineError(f"the engine is {wanted}, but what trains is {found}")


def base_of(model: Any) -> Any:
    """The model below adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
