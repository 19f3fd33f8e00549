"""How the ranks hold a run's model and optimizer: what the training loop calls.

Every method that moves tensors is a collective: all ranks call it, in the same order. Names are those of the unwrapped
model. Whole tensors are read and written by rank 0 alone, which gives the others what they need, so that ranks need not
share a disk; where they do, each can read and write its own pieces.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.optim.lr_scheduler import LambdaLR

from phi3v.config import RunConfig
from phi3v.train.device import RuntimeDevice
from phi3v.train.engines.choice import EngineChoice
from phi3v.train.methods.optimizers import make_optimizer
from phi3v.train.pieces import WEIGHTS, Piece
from phi3v.train.schedule import make_schedule, resume_schedule

# AdamW's two moments of each parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")

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

    def pieces(self) -> Iterator[Piece]:
        """What this rank holds of every trained weight, in the precision it is trained in, and of its moments.

        No collective, and no copies: what is written into the values is what trains, after `refresh`. Moments are there
        once a step was taken or `start_moments` was called.
        """
        state = self.optimizer_state()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield from self.own_pieces(name, parameter, (WEIGHTS, *(MOMENTS if state else ())))

    @abstractmethod
    def own_pieces(self, name: str, parameter: Any, kinds: Iterable[str]) -> Iterator[Piece]:
        """As `pieces`, of one parameter; nothing if this rank holds nothing of it.

        Args:
            kinds: of `WEIGHTS` and `MOMENTS`.
        """

    @abstractmethod
    def start_moments(self, steps: float) -> None:
        """Let every parameter have moments, to be overwritten, of so many steps."""

    def refresh(self) -> None:
        """Compute with the weights that were written into `pieces`; a collective."""
        return

    def optimizer_state(self) -> Mapping[Any, Any]:
        """The moments and the steps of what this rank updates."""
        return self.optimizer.state

    def steps_taken(self) -> float:
        """AdamW's count of steps, which corrects its moments."""
        return max((float(entry["step"]) for entry in self.optimizer_state().values()), default=0.0)

    def scaler_state(self) -> dict[str, Any] | None:
        """Of fp16's loss scale."""
        return None

    def put_scaler_state(self, state: Mapping[str, Any]) -> None:
        """The reverse; what another engine's scaler calls otherwise is left out."""
        return

    def facts(self) -> dict[str, Any]:
        """Schedule, loss scale and count of steps, as JSON has them."""
        return {
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler_state(),
            "steps": self.steps_taken(),
        }

    def load_facts(self, facts: Mapping[str, Any]) -> None:
        """The reverse of `facts`; the moments are there then, to be overwritten."""
        if facts["steps"]:
            self.start_moments(facts["steps"])
        resume_schedule(self.schedule, facts["schedule"])
        if facts["scaler"] is not None:
            self.put_scaler_state(facts["scaler"])

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
