"""The optimizers of a run: AdamW with its weights and moments in float32, or in fewer bits.

Bytes a trained parameter takes, gradient included: ``adamw`` 16, ``adamw_8bit`` 10, ``adamw_bf16`` 8; in lean mode,
where a gradient is used up in the backward pass that makes it, ``adamw_bf16`` 6 and ``adamw_8bit`` 4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from phi3v.config import RunConfig, TrainingConfig
from phi3v.train.methods.strategies import part_of

Moments = Literal["bf16", "8bit"]

BLOCK = 256  # values that share a scale, as bitsandbytes has it
# Smaller tensors keep float32 moments, as with bitsandbytes: they cost nothing and norms are sensitive.
MIN_8BIT_SIZE = 4096
# Names of tensors without weight decay, as in transformers' `Trainer`.
NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
SLICE = 2**24  # values updated at a time, which bounds the float32 copies; a multiple of BLOCK


def start_moments(optimizer: torch.optim.Optimizer, steps: float) -> None:
    """Let every parameter of torch's AdamW have moments, of zero and of so many steps, as it would make them itself."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            "step": torch.tensor(steps),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
        for index, parameter in enumerate(parameters)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 to bfloat16, up or down with probabilities that make the expectation exact.

    A bfloat16 is the upper half of a float32: a uniform 16-bit number is added to the lower half, which is then cut
    off. Rounding to nearest would lose every update below half a unit in the last place, 0.2 % of the weight.
    """
    noise = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return ((values.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, the arithmetic of torch's own) for bfloat16 weights, without a float32 copy of them.

    Each update is computed in float32 and rounded stochastically. The noise depends on seed, step and tensor alone, so
    every rank rounds alike and a resumed run rounds as an uninterrupted one. float32 weights are not rounded.

    Args:
        params: parameters or groups of them.
        moments: ``bf16``, rounded as the weights, or ``8bit``, blocks of 256 in bitsandbytes' dynamic format
            (arXiv 2110.02861).
        seed: of the noise.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments: Moments = "bf16",
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments = moments
        self.seed = seed
        self.in_backward = False
        self._generators: dict[torch.device, torch.Generator] = {}
        self._codes: dict[tuple[bool, torch.device], torch.Tensor] = {}

    @functools.cached_property
    def _place(self) -> dict[torch.Tensor, tuple[int, int]]:
        """The group and the index of every parameter; groups may change until the first step."""
        pairs = ((number, parameter) for number, group in enumerate(self.param_groups) for parameter in group["params"])
        return {parameter: (number, index) for index, (number, parameter) in enumerate(pairs)}

    def step_in_backward(self) -> None:
        """From now on update each parameter as soon as its gradient is there, and drop the gradient.

        `step` then does nothing. A backward pass is a step, so gradients can be neither accumulated nor clipped by
        their norm.
        """
        self.in_backward = True
        for parameter in self._place:
            parameter.register_post_accumulate_grad_hook(self._update_and_drop)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        if self.in_backward:
            return
        for parameter in self._place:
            if parameter.grad is not None:
                self._update(parameter)

    def _update_and_drop(self, parameter: torch.Tensor) -> None:
        self._update(parameter)
        parameter.grad = None

    @torch.no_grad()
    def _update(self, parameter: torch.Tensor) -> None:
        number, index = self._place[parameter]
        group, state = self.param_groups[number], self.state[parameter]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state |= self._new_moment(name, parameter)
        state["step"] += 1
        assert parameter.grad is not None
        generator = self._generator(parameter.device, state["step"], index)
        beta1, beta2 = group["betas"]
        rate = group["lr"] / (1 - beta1 ** state["step"])
        correction = (1 - beta2 ** state["step"]) ** 0.5
        weights, gradients = parameter.view(-1), parameter.grad.reshape(-1)
        for start in range(0, len(weights), SLICE):
            part = slice(start, min(start + SLICE, len(weights)))
            gradient = gradients[part].float()
            first = self._read(state, "exp_avg", part).lerp_(gradient, 1 - beta1)
            second = self._read(state, "exp_avg_sq", part).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            new = weights[part].float() if weights.dtype != torch.float32 else weights[part]
            new.mul_(1 - group["lr"] * group["weight_decay"])
            new.addcdiv_(first, second.sqrt().div_(correction).add_(group["eps"]), value=-rate)
            if weights.dtype != torch.float32:
                weights[part] = round_stochastically(new, generator)
            self._write(state, "exp_avg", part, first, generator)
            self._write(state, "exp_avg_sq", part, second, generator)

    def _generator(self, device: torch.device, step: int, index: int) -> torch.Generator:
        generator = self._generators.setdefault(device, torch.Generator(device))
        return generator.manual_seed(((self.seed << 44) + (step << 20) + index) & (2**63 - 1))

    def _new_moment(self, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        size, device = parameter.numel(), parameter.device
        if self.moments == "bf16":
            return {name: torch.zeros(size, dtype=torch.bfloat16, device=device)}
        if size < MIN_8BIT_SIZE:
            return {name: torch.zeros(size, device=device)}
        zero = int(self._code(name == "exp_avg", device).abs().argmin())
        return {
            name: torch.full((size,), zero, dtype=torch.uint8, device=device),
            f"{name}_absmax": torch.zeros(-(-size // BLOCK), device=device),
        }

    def _code(self, signed: bool, device: torch.device) -> torch.Tensor:
        """The 256 values of the 8-bit format."""
        from bitsandbytes.functional import create_dynamic_map

        key = (signed, device)
        if key not in self._codes:
            self._codes[key] = create_dynamic_map(signed=signed).to(device)
        return self._codes[key]

    def _read(self, state: dict[str, Any], name: str, part: slice) -> torch.Tensor:
        """A moment's values as a float32 copy."""
        stored = state[name][part]
        if stored.dtype != torch.uint8:
            return stored.to(torch.float32, copy=True)
        absmax = state[f"{name}_absmax"][part.start // BLOCK : -(-part.stop // BLOCK)]
        scales = absmax.repeat_interleave(BLOCK)[: len(stored)]
        return self._code(name == "exp_avg", stored.device)[stored.int()] * scales

    def _write(
        self, state: dict[str, Any], name: str, part: slice, values: torch.Tensor, generator: torch.Generator
    ) -> None:
        stored = state[name]
        if stored.dtype == torch.bfloat16:
            stored[part] = round_stochastically(values, generator)
        elif stored.dtype == torch.float32:
            stored[part] = values
        else:
            from bitsandbytes.functional import quantize_blockwise

            code = self._code(name == "exp_avg", stored.device)
            stored[part], quantised = quantize_blockwise(values, code=code, blocksize=BLOCK)
            state[f"{name}_absmax"][part.start // BLOCK : -(-part.stop // BLOCK)] = quantised.absmax

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state; the library would cast every moment to the dtype of its weight."""
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for parameter, name in zip(self._place, names, strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                is_tensor = isinstance(value, torch.Tensor)
                self.state[parameter][key] = value.to(parameter.device, copy=True) if is_tensor else value


def make_optimizer(model: Any, config: RunConfig, *, fused: bool) -> torch.optim.Optimizer:
    """The optimizer of what is trained; weight decay spares biases and norms, as in transformers' ``Trainer``.

    Parameters get the learning rates of their parts, and B matrices LoRA+'s; the ``name`` of a group is its part.

    Args:
        fused: torch's fused AdamW, for ``adamw``.
    """
    training = config.training
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    one_rate = not has_several_rates(config)
    groups: list[dict[str, Any]] = []
    for decay in (True, False):
        divided: dict[tuple[str, float], list[torch.Tensor]] = {("", training.learning_rate): []} if one_rate else {}
        for name, parameter in trained.items():
            if (name in decayed) == decay:
                key = ("", training.learning_rate) if one_rate else _group_and_rate(name, config)
                divided.setdefault(key, []).append(parameter)
        for (name, rate), members in divided.items():
            about = {} if one_rate else {"name": name, "lr": rate}
            groups.append({"params": members, "weight_decay": training.weight_decay * decay, **about})
    arguments: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }
    if keeps_bf16_weights(training):
        moments: Moments = "8bit" if training.optimizer == "adamw_8bit" else "bf16"
        optimizer = StochasticAdamW(groups, **arguments, moments=moments, seed=training.seed)
        if training.lean:
            optimizer.step_in_backward()
        return optimizer
    if training.optimizer == "adamw_8bit":
        return _bitsandbytes_adamw(model, groups, arguments)
    return torch.optim.AdamW(groups, **arguments, fused=fused)


def _bitsandbytes_adamw(model: Any, groups: list[dict[str, Any]], arguments: dict[str, Any]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with 8-bit moments, 32-bit ones for embeddings, as in transformers' ``Trainer``."""
    from bitsandbytes.optim import AdamW, GlobalOptimManager

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    optimizer: torch.optim.Optimizer = AdamW(groups, **arguments, optim_bits=8)
    return optimizer


def takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step changes nothing if the attribute ``found_inf`` of the optimizer is 1, a value on the device.

    That is how torch's fused optimizers hear of a non-finite gradient from ``GradScaler``.
    """
    return bool(optimizer.defaults.get("fused"))


def _group_and_rate(name: str, config: RunConfig) -> tuple[str, float]:
    training, ratio = config.training, config.method.lora.lora_plus_ratio
    part = part_of(name)
    part = part if part in ("vision", "projector") else "decoder"
    rate = getattr(training.learning_rates, part) or training.learning_rate
    if ratio is not None and ".lora_B." in name:
        return f"{part}_B", rate * ratio
    return part, rate


def has_several_rates(config: RunConfig) -> bool:
    """Whether not all parameters share one learning rate."""
    rates = dataclasses.astuple(config.training.learning_rates)
    has_lora_plus = config.method.uses_adapters and config.method.lora.lora_plus_ratio is not None
    return has_lora_plus or any(rate is not None for rate in rates)


def keeps_bf16_weights(training: TrainingConfig) -> bool:
    """Whether trained weights are held in bfloat16, for lack of a float32 copy."""
    return training.lean or training.optimizer == "adamw_bf16"


def state_bytes(training: TrainingConfig) -> int:
    """Bytes of a trained parameter's gradient and moments."""
    gradient = 0 if training.lean else 2 if keeps_bf16_weights(training) else 4
    return gradient + moment_bytes(training)


def moment_bytes(training: TrainingConfig) -> int:
    """Bytes of a trained parameter's moments."""
    return {"adamw": 8, "adamw_8bit": 2, "adamw_bf16": 4}[training.optimizer]
