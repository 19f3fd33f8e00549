"""DeepSpeed's ZeRO (arXiv 1910.02054): optimizer state, then gradients, then weights are divided over the ranks.

DeepSpeed is driven from here, not by way of the ``Trainer``, which knows it on GPUs only. Losses come normalised by the
whole step, so DeepSpeed is told of no accumulation; which micro-batch ends a step is said to it each time.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.nn import functional

from phi3v.config import RunConfig
from phi3v.train.device import RuntimeDevice
from phi3v.train.engines.base import base_of, wrong_engine
from phi3v.train.engines.choice import EngineChoice
from phi3v.train.engines.fsdp import MOMENTS
from phi3v.train.engines.sharded import ShardedEngine

if TYPE_CHECKING:
    from phi3v.train.loop import Phi3VTrainer

BUCKET = 500_000_000  # elements, as in the public recipe


class ZeroEngine(ShardedEngine):
    """Stages 1, 2 and 3.

    In half precision DeepSpeed computes on half-precision weights and keeps float32 ones in the optimizer; what is
    measured and saved are these.
    """

    can_drop_step = False  # it steps at the end of the backward pass

    def __init__(self, model: Any, choice: EngineChoice, config: RunConfig, compute: RuntimeDevice) -> None:
        super().__init__(model, choice, config, compute)
        self.stage = int(choice.name[-1])
        # Frozen weights that half precision would change are saved as they were.
        self._kept = {
            name: parameter.detach().cpu()
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad and not torch.equal(parameter, parameter.to(compute.dtype).to(parameter))
        }

    def settings(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        on_gpu = self.compute.device.type == "cuda"
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
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.config.training.max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # its AdamW is compiled at the first use; torch's runs anywhere
            "bf16": {"enabled": self.compute.precision == "bf16"},
            "fp16": {"enabled": self.compute.precision == "fp16"},
        }

    def adopt(self, trainer: Phi3VTrainer) -> None:
        accelerator = trainer.accelerator
        prepare_optimizer = accelerator.prepare_optimizer

        def prepare_model(model: Any, *args: Any, **kwargs: Any) -> Any:
            self._start(model, trainer.optimizer)
            return self._engine

        def backward(loss: torch.Tensor, **kwargs: Any) -> None:
            # Where a step ends, the optimizer's step belongs to it.
            self._steps.backward(loss, sync_gradients=accelerator.sync_gradients)

        accelerator.prepare_model = prepare_model
        accelerator.prepare_optimizer = lambda *args, **kwargs: prepare_optimizer(self._optimizer)
        accelerator.backward = backward
        accelerator.clip_grad_norm_ = lambda *args, **kwargs: self._steps.get_global_grad_norm()
        accelerator.no_sync = lambda model: contextlib.nullcontext()

    def _start(self, model: Any, optimizer: Any) -> None:
        deepspeed = import_deepspeed(self.compute.device.type)
        # accelerate has them only where DeepSpeed is installed.
        from accelerate.utils import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper

        if self.stage == 3:
            base = base_of(model)
            base.model.meets_in_vision = True
            base.loss_kernel = "whole"
        self._engine, zero_optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.settings()
        )
        self._steps = DeepSpeedEngineWrapper(self._engine)
        self._optimizer = DeepSpeedOptimizerWrapper(zero_optimizer)
        self._optimizer._is_accelerate_prepared = True

    def check(self, trainer: Phi3VTrainer) -> None:
        from deepspeed.runtime.engine import DeepSpeedEngine
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        engine: Any = trainer.model_wrapped
        if not isinstance(engine, DeepSpeedEngine):
            raise wrong_engine(self.choice.name, type(engine).__name__)
        expected = DeepSpeedZeroOptimizer_Stage3 if self.stage == 3 else DeepSpeedZeroOptimizer
        optimizer = engine.optimizer
        if not isinstance(optimizer, expected) or engine.zero_optimization_stage() != self.stage:
            raise wrong_engine(self.choice.name, f"DeepSpeed with {type(optimizer).__name__}")
        if self.stage == 3 and not any(p.ds_tensor.numel() < p.ds_numel for p in engine.module.parameters()):
            raise wrong_engine(self.choice.name, "DeepSpeed with undivided weights")
        if bool(self.config.distributed.offload_optimizer) != bool(engine.zero_offload_optimizer()):
            raise wrong_engine(self.choice.name, "DeepSpeed that keeps the optimizer elsewhere than configured")

    def whole_tensors(self, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                whole = safe_get_full_fp32_param(parameter)
                if self.stage < 3 and not torch.equal(whole.to(parameter.dtype), parameter):
                    raise RuntimeError(f"DeepSpeed gave other float32 weights for {name} than it computes with")
                yield name, whole
            elif name in self._kept:
                yield name, self._kept[name].to(self.compute.device)
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

    def put_whole(self, parameter: Any, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.stage == 3:
            safe_set_local_fp32_param(parameter, self._own_part(parameter, value))
        else:
            safe_set_full_fp32_param(parameter, value)
        with self._gathered(parameter, changed=True):
            parameter.data.copy_(value)

    def _own_part(self, parameter: Any, value: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor in stage 3, the last one padded."""
        size = parameter.ds_tensor.numel()
        flat = value.flatten()
        start = min(size * self.rank, flat.numel())
        part = flat[start : start + size]
        return functional.pad(part, (0, size - part.numel()))

    def whole_moments(self, trainer: Phi3VTrainer) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self._optimizer_state():
            return  # before the first step
        for name, parameter in trainer.model.named_parameters():
            for key in MOMENTS if parameter.requires_grad else ():
                if self.stage == 3:
                    yield f"{key}/{name}", safe_get_full_optimizer_state(parameter, key)
                    continue
                # Not by DeepSpeed's function, which 0.19.8 prepares before all groups have a state.
                whole = torch.zeros(parameter.numel(), device=self.compute.device)
                for place, piece in self._own_piece(parameter, key):
                    whole[place] = piece.to(whole)
                distributed.all_reduce(whole)
                yield f"{key}/{name}", whole.view_as(parameter)

    def _own_piece(self, parameter: Any, key: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """Stages 1 and 2: where this rank's piece of a moment lies in its parameter, if it has one, and the piece."""
        mapping = parameter._hp_mapping
        if mapping is not None:
            moment = self._optimizer_state()[self._masters()[mapping.param_group_index]][key]
            inside, within = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield slice(inside.start, inside.start + inside.numel), moment.narrow(0, within.start, within.numel)

    def steps_taken(self, trainer: Phi3VTrainer) -> float:
        return max((float(entry["step"]) for entry in self._optimizer_state().values()), default=0.0)

    def put_moments(self, trainer: Phi3VTrainer, steps: float, moments: Iterator[tuple[str, torch.Tensor]]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        for master in self._masters() if steps else ():
            entry = self._optimizer_state()[master]
            entry["step"] = torch.tensor(steps)
            for key in MOMENTS:
                entry.setdefault(key, torch.zeros_like(master))
        own: dict[str, Any] = dict(trainer.model.named_parameters())
        for key_and_name, value in moments:
            key, name = key_and_name.split("/", 1)
            if self.stage == 3:
                safe_set_local_optimizer_state(own[name], self._own_part(own[name], value), key)
                continue
            for place, piece in self._own_piece(own[name], key):
                piece.copy_(value.flatten()[place])

    def _masters(self) -> Any:
        """The flat pieces of float32 weights that this rank steps."""
        zero = self._engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _optimizer_state(self) -> Any:
        """Of the optimizer that DeepSpeed drives, by its flat pieces."""
        return self._engine.optimizer.optimizer.state

    def scaler_state(self, trainer: Phi3VTrainer) -> dict[str, Any] | None:
        scaler = self._engine.optimizer.loss_scaler
        return {key: value for key, value in vars(scaler).items() if isinstance(value, (bool, int, float))}

    def put_scaler_state(self, trainer: Phi3VTrainer, state: dict[str, Any]) -> None:
        vars(self._engine.optimizer.loss_scaler).update(state)


def import_deepspeed(device_type: str) -> Any:
    """DeepSpeed; it compiles nothing where torch does the same."""
    import deepspeed

    if device_type == "cpu":
        # It would compile a way around gloo, for minutes, at the first run on a machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls two collectives by the names that torch is about to give up.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return deepspeed
