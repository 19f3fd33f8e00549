"""DeepSpeed's ZeRO (arXiv 1910.02054): optimizer state, then gradients, then weights are divided over the ranks.

Losses come normalised by the whole step, so DeepSpeed is told of no accumulation; which micro-batch ends a step is
said to it each time.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import distributed

from phi3v.config import RunConfig
from phi3v.train.device import RuntimeDevice
from phi3v.train.engines.base import MOMENTS, base_of
from phi3v.train.engines.choice import EngineChoice
from phi3v.train.engines.sharded import ShardedEngine
from phi3v.train.pieces import WEIGHTS, Piece

BUCKET = 500_000_000  # elements, as in the public recipe


class ZeroEngine(ShardedEngine):
    """Stages 1, 2 and 3.

    In half precision DeepSpeed computes on half-precision weights and keeps float32 ones in the optimizer; what is
    evaluated and saved are these.
    """

    can_drop_step = False  # it steps at the end of the backward pass

    def __init__(self, model: Any, choice: EngineChoice, config: RunConfig, runtime: RuntimeDevice) -> None:
        super().__init__(model, choice, config, runtime)
        self.stage = int(choice.name[-1])
        # Frozen weights that half precision would change are saved as they were.
        self._kept = {
            name: parameter.detach().cpu()
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad and not torch.equal(parameter, parameter.to(runtime.dtype).to(parameter))
        }

    def settings(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        on_gpu = self.runtime.device.type == "cuda"  # needs two cards: side streams and pinning are DeepSpeed's own
        zero: dict[str, Any] = {
            "stage": self.stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": BUCKET,
            "overlap_comm": on_gpu,
        }
        if self.stage < 3:
            # The public recipe's round_robin_gradients stays off: with it DeepSpeed 0.19.8 mistakes which piece of the
            # float32 weights belongs to which parameter, so that a save would hold shuffled tensors.
            zero["allgather_bucket_size"] = BUCKET
        else:
            # As the library has it: what is smaller stays on every rank.
            zero["stage3_param_persistence_threshold"] = 10 * self._skeleton.config.hidden_size
        if self.config.distributed.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        reduce = self.config.distributed.reduce_dtype
        return {
            "train_micro_batch_size_per_gpu": 1,
            "communication_data_type": None if reduce == "auto" else reduce,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.config.training.max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # its AdamW is compiled at the first use; torch's runs anywhere
            "bf16": {"enabled": self.runtime.precision == "bf16"},
            "fp16": {"enabled": self.runtime.precision == "fp16"},
        }

    @property
    def fused(self) -> bool:
        return False

    def start(self) -> None:
        deepspeed = import_deepspeed(self.runtime.device.type)
        if self.stage == 3:
            base = base_of(self.model)
            base.model.always_runs_vision = True
            base.loss_kernel = "whole"
        self._engine, *_ = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=self.settings())

    def mismatch(self) -> str | None:
        from deepspeed.runtime.engine import DeepSpeedEngine
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        engine: Any = self._engine
        if not isinstance(engine, DeepSpeedEngine):
            return type(engine).__name__
        expected = DeepSpeedZeroOptimizer_Stage3 if self.stage == 3 else DeepSpeedZeroOptimizer
        if not isinstance(engine.optimizer, expected) or engine.zero_optimization_stage() != self.stage:
            return f"DeepSpeed with {type(engine.optimizer).__name__}"
        if self.stage == 3 and not any(p.ds_tensor.numel() < p.ds_numel for p in engine.module.parameters()):
            return "DeepSpeed with undivided weights"
        if bool(self.config.distributed.offload_optimizer) != bool(engine.zero_offload_optimizer()):
            return "DeepSpeed that keeps the optimizer elsewhere than configured"
        return None

    def forward(self, inputs: Mapping[str, Any], *, last: bool) -> Any:
        return self._engine(**inputs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        self._engine.backward(loss)

    def grad_norm(self) -> torch.Tensor:
        self._engine.step()  # in which the norm is found
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self.runtime.device)

    def step(self, norm: torch.Tensor) -> None:
        if not getattr(self._engine.optimizer, "overflow", False):
            self.schedule.step()

    def whole_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                whole = safe_get_full_fp32_param(parameter)
                if self.stage < 3 and not torch.equal(whole.to(parameter.dtype), parameter):
                    raise RuntimeError(f"DeepSpeed gave other float32 weights for {name} than it computes with")
                yield name, whole
            elif name in self._kept:
                yield name, self._kept[name].to(self.runtime.device)
            else:
                with self._gathered(parameter):
                    yield name, parameter.detach()

    @contextlib.contextmanager
    def _gathered(self, parameter: Any, *, changed: bool = False) -> Iterator[None]:
        """A parameter of stage 3 in one piece; what changes in it meanwhile holds on every rank."""
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0 if changed else None):
            yield

    def own_pieces(self, name: str, parameter: Any, kinds: Iterable[str]) -> Iterator[Piece]:
        place = self._place_of(parameter)
        if place is None:
            return
        group, first, count, start = place
        master = self._masters()[group]
        for kind in kinds:
            values = master if kind == WEIGHTS else self.optimizer_state()[master][kind]
            yield Piece(f"{kind}/{name}", values.detach().narrow(0, first, count), start, parameter_size(parameter))

    def _place_of(self, parameter: Any) -> tuple[int, int, int, int] | None:
        """Where this rank's piece of a parameter is: which master, from where, how many, and where in the parameter."""
        if self.stage < 3:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            inside, within = mapping.lp_fragment_address, mapping.hp_fragment_address
            return mapping.param_group_index, within.start, within.numel, inside.start
        zero = self._engine.optimizer
        group, first, padded = zero.grad_position[zero.get_param_id(parameter)]
        start = padded * self.runtime.rank
        count = min(padded, parameter_size(parameter) - start)
        return (group, first, count, start) if count > 0 else None

    @torch.no_grad()
    def refresh(self) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        for parameter in self.model.parameters():
            if parameter.requires_grad:
                whole = safe_get_full_fp32_param(parameter)
                with self._gathered(parameter, changed=True):
                    parameter.data.copy_(whole)

    def whole_moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.optimizer_state():
            return  # before the first step
        for name, parameter in self.model.named_parameters():
            for key in MOMENTS if parameter.requires_grad else ():
                if self.stage == 3:
                    yield f"{key}/{name}", safe_get_full_optimizer_state(parameter, key)
                    continue
                # Not by DeepSpeed's function, which 0.19.8 prepares before all groups have a state.
                whole = torch.zeros(parameter.numel(), device=self.runtime.device)
                for piece in self.own_pieces(name, parameter, [key]):
                    whole[piece.start : piece.start + len(piece)] = piece.values.to(whole)
                distributed.all_reduce(whole)
                yield f"{key}/{name}", whole.view_as(parameter)

    def start_moments(self, steps: float) -> None:
        for master in self._masters():
            entry = self.optimizer_state()[master]
            entry["step"] = torch.tensor(steps)
            for key in MOMENTS:
                entry.setdefault(key, torch.zeros_like(master))

    def _masters(self) -> Any:
        """The flat pieces of float32 weights that this rank steps."""
        zero = self._engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def optimizer_state(self) -> Any:
        return self._engine.optimizer.optimizer.state

    def scaler_state(self) -> dict[str, Any] | None:
        scaler = self._engine.optimizer.loss_scaler
        return {key: value for key, value in vars(scaler).items() if isinstance(value, (bool, int, float))}

    def put_scaler_state(self, state: Mapping[str, Any]) -> None:
        own = vars(self._engine.optimizer.loss_scaler)
        own.update({key: value for key, value in state.items() if key in own})
        if "scale" in state:  # of torch's scaler
            own["cur_scale"] = state["scale"]


def parameter_size(parameter: Any) -> int:
    """Elements of a whole parameter, also where stage 3 has divided it."""
    size: int = getattr(parameter, "ds_numel", None) or parameter.numel()
    return size


def import_deepspeed(device_type: str) -> Any:
    """DeepSpeed; it compiles nothing where torch does the same."""
    import deepspeed

    if device_type == "cpu":
        # It would compile a way around gloo, for minutes, at the first run on a machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls two collectives by the names that torch is about to give up.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return deepspeed
