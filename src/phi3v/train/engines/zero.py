"""DeepSpeed's ZeRO (arXiv 1910.02054): optimizer state, then gradients, then weights are divided over the ranks.

DeepSpeed is driven here, not by way of the ``Trainer``, which knows it on GPUs only. Losses come normalised by the
whole step, so DeepSpeed is told of no accumulation; which micro-batch ends a step is said to it each time.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper

from phi3v.config import RunConfig
from phi3v.train.device import Compute
from phi3v.train.engines.base import wrong_engine
from phi3v.train.engines.choice import EngineChoice
from phi3v.train.engines.fsdp import base_of
from phi3v.train.engines.sharded import ShardedEngine

if TYPE_CHECKING:
    from phi3v.train.trainer import Phi3VTrainer

BUCKET = 500_000_000  # elements, as in the public recipe


class ZeroEngine(ShardedEngine):
    """Stages 1, 2 and 3.

    In half precision DeepSpeed computes on half-precision weights and keeps float32 ones in the optimizer; what is
    measured and saved are these.
    """

    def __init__(self, model: Any, choice: EngineChoice, config: RunConfig, compute: Compute) -> None:
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
            zero |= {"allgather_bucket_size": BUCKET, "round_robin_gradients": True}
        if self.config.distributed.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.config.training.max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.compute.precision == "bf16"},
            "fp16": {"enabled": self.compute.precision == "fp16"},
        }

    def adopt(self, trainer: Phi3VTrainer) -> None:
        accelerator = trainer.accelerator
        prepare_optimizer = accelerator.prepare_optimizer

        def prepare_model(model: Any, *args: Any, **kwargs: Any) -> Any:
            self._start(model, trainer.optimizer)
            return self._engine

        def wrapped_optimizer(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            return prepare_optimizer(self._optimizer)

        def backward(loss: torch.Tensor, **kwargs: Any) -> None:
            self._steps.backward(loss, sync_gradients=accelerator.sync_gradients)

        accelerator.prepare_model = prepare_model
        accelerator.prepare_optimizer = wrapped_optimizer
        accelerator.backward = backward
        accelerator.clip_grad_norm_ = lambda *args, **kwargs: self._steps.get_global_grad_norm()
        accelerator.no_sync = lambda model: contextlib.nullcontext()

    def _start(self, model: Any, optimizer: Any) -> None:
        deepspeed = import_deepspeed(self.compute.device.type)
        settings = self.settings()
        if self.stage == 3:
            # As the library has it: what is smaller stays on every rank.
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 10 * model.config.hidden_size
            base = base_of(model)
            base.model.meets_in_vision = True
            base.loss_kernel = "whole"
        self._engine, zero_optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
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
        divides_gradients = getattr(optimizer, "partition_gradients", True)
        if not isinstance(optimizer, expected) or divides_gradients != (self.stage > 1):
            raise wrong_engine(self.choice.name, f"DeepSpeed with {type(optimizer).__name__}")
        if self.stage == 3 and not any(p.ds_tensor.numel() < p.ds_numel for p in engine.module.parameters()):
            raise wrong_engine(self.choice.name, "DeepSpeed with undivided weights")

    def whole_tensors(self, model: Any, *, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param
        from deepspeed.zero import GatheredParameters

        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter)
            elif not trained_only:
                if name in self._kept:
                    yield name, self._kept[name].to(self.compute.device)
                elif self.stage == 3:
                    with GatheredParameters([parameter]):
                        yield name, parameter.detach().clone()
                else:
                    yield name, parameter.detach()

    def _put(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param
        from deepspeed.zero import GatheredParameters

        safe_set_full_fp32_param(parameter, value)
        if self.stage == 3:
            with GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)

    def _shape(self, parameter: Any) -> torch.Size:
        return parameter.ds_shape if self.stage == 3 else parameter.shape


def import_deepspeed(device_type: str) -> Any:
    """DeepSpeed, without its remarks on the terminal."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    return deepspeed
