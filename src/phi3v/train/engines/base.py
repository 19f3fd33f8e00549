"""How the ranks hold a run's model and optimizer: what the training loop calls.

Every method that moves tensors is a collective: all ranks call it, in the same order. Names are those of the unwrapped
model. Nothing assumes that ranks share a disk: rank 0 alone reads and writes, the others get what they need from it.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.optim.lr_scheduler import LambdaLR

from phi3v.config import RunConfig
from phi3v.train.device import RuntimeDevice
from phi3v.train.engines.choice import EngineChoice
from phi3v.train.methods.optimizers import make_optimizer
from phi3v.train.schedule import make_schedule

# What is left to write of a save. It touches host memory and files only, so a thread may do it.
DeferredWrite = Callable[[], None]


class WrongEngineError(RuntimeError):
    """Another engine runs than the one that was chosen."""


def no_op() -> None:
    """What is left to write where all is written, or where another rank writes."""


class Engine(ABC):
    """How the ranks hold model and optimizer.

    Args:
        model: loaded, with the method applied, not wrapped.

    Attributes:
        optimizer, schedule: made by `prepare`.
        meets_in_every_row: all ranks have to run the same number of rows a step.
        can_drop_step: a step whose gradient is not finite leaves the weights as they are.
    """

    meets_in_every_row: ClassVar[bool] = False
    can_drop_step: ClassVar[bool] = True

    optimizer: torch.optim.Optimizer
    schedule: LambdaLR

    def __init__(self, model: Any, choice: EngineChoice, config: RunConfig, runtime: RuntimeDevice) -> None:
        self.model = model
        self.choice = choice
        self.config = config
        self.runtime = runtime

    @property
    def name(self) -> str:
        return self.choice.name

    def prepare(self, total_steps: int) -> None:
        """Wrap or divide the model, and make optimizer and schedule.

        Raises:
            WrongEngineError: this engine is not what runs.
        """
        self.wrap()
        self.optimizer = make_optimizer(self.model, self.config, fused=self.fused)
        self.start()
        self.schedule = make_schedule(self.optimizer, self.config.training, total_steps)
        wrong = self.mismatch()
        if wrong is not None:
            raise WrongEngineError(f"the engine is {self.name}, but what trains is {wrong}")

    @property
    def fused(self) -> bool:
        """Whether AdamW may be torch's fused one."""
        return True

    def wrap(self) -> None:
        """Divide the weights before the optimizer is made, where the engine wants that."""
        return

    def start(self) -> None:
        """What needs the optimizer, and may regroup what it steps."""
        return

    @abstractmethod
    def mismatch(self) -> str | None:
        """What runs, in words, if it is not this engine: a run must not go on as something else than it says."""

    @abstractmethod
    def forward(self, inputs: Mapping[str, Any], *, last: bool) -> Any:
        """The model's output for one row.

        Args:
            last: of this rank's rows of the step.
        """

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of a forward pass."""
        dtype = self.runtime.autocast_dtype
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.runtime.device.type, dtype)

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add a row's gradients; with the last row they are summed over the ranks."""

    @abstractmethod
    def grad_norm(self) -> torch.Tensor:
        """The 2-norm of the step's whole gradient, the same on all ranks, on the device; then the gradient is clipped.

        Where gradients are scaled (fp16) they are unscaled first.
        """

    @abstractmethod
    def step(self, norm: torch.Tensor) -> None:
        """Update the weights, unless the gradient is not finite; advance the schedule; drop the gradients.

        Args:
            norm: as of `grad_norm`.
        """

    @abstractmethod
    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        """Whole tensors of the model by the names of its ``state_dict``, as ``save_pretrained`` takes them.

        In the precision they are trained in. Of an adapter only what its save needs. They may be the model's own
        tensors. ``None`` on all ranks but the first.
        """

    @abstractmethod
    def load_full_state_dict(self, tensors: dict[str, torch.Tensor] | None) -> None:
        """Put whole tensors into the model, on every rank.

        Args:
            tensors: all that is trained, by the names of ``full_state_dict``, on rank 0; ``None`` on the others.
        """

    @abstractmethod
    def save_optimizer(self, folder: Path, *, copy: bool = True) -> DeferredWrite:
        """Save optimizer, gradient scaler and schedule to ``folder``, which exists.

        Args:
            copy: what the next step changes; without, all is written before it.

        Returns:
            What is left to do, which touches neither model nor optimizer. Files are complete once it has run.
        """

    @abstractmethod
    def load_optimizer(self, folder: Path | None) -> None:
        """Load what `save_optimizer` saved.

        Args:
            folder: ``None`` on all ranks but the first.
        """

    @abstractmethod
    def whole_model(self, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """A whole model on every rank with the weights as they would be saved; the trained one stays as it is.

        Args:
            dtype: of the checkpoint; adapters stay as they are.
        """

    @abstractmethod
    def final_model(self, dtype: torch.dtype) -> Any:
        """As `whole_model`, for good: training is over."""


def base_of(model: Any) -> Any:
    """The model below adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
