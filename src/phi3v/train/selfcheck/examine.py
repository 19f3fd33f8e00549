"""Every fast path of a run, once forward and backward on one small row, beside the plain path.

The model is the run's own shape cut down to a few layers: same widths, heads, vocabulary and method, for kernels are
chosen by these, with random weights that make every part matter (each product keeps its input's scale, so attention
is far from uniform). Three computations are compared: the plain path in float32, which counts as exact; the plain path
in the run's precision; and that with a fast path added. The fast one may be `TIMES` as far from float32 as the plain
one, in the loss, the logits at the answers, and the gradient of every trained tensor. Fast paths are added one to the
other, so what passes last is the whole of what the run uses.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

import phi3v.model.loss as loss_module
from phi3v.config import LoraConfig, MethodConfig, RunConfig
from phi3v.model.configuration import CLIP_VIT_L_14_336, Phi3VConfig
from phi3v.model.loss import find_targets
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.train.compute.fast_paths import FastPaths, apply_fast_paths
from phi3v.train.device import RuntimeDevice, is_out_of_memory
from phi3v.train.methods.gradient_check import FP16_SCALES, ZERO_BY_NATURE
from phi3v.train.methods.loading import weight_dtypes
from phi3v.train.methods.strategies import apply_method
from phi3v.train.objectives import make_objective
from phi3v.train.selfcheck.small_parts import UPDATE_OFF, four_bit_products, updates
from phi3v.train.selfcheck.verdict import Verdict

LAYERS = 2  # of the decoder, whose last one is computed otherwise than the others; of the tower, those that run
# Flash attention's own tests allow its gradients 3 times the error of the plain computation in the same dtype.
TIMES = 3.0
# In any case, and of the plain path in half precision, beside which there is none: what is zero is off by 1. Sums of
# bfloat16 that a device does not take in float32 are off by a third.
MOST = 0.5
# e4m3 has 3 bits of mantissa where bfloat16 has 7, and rounds to 1/16 where that rounds to 1/256.
FLOAT8_UNITS = 16.0
SMALL_GRADIENT = 1e-4  # of the norm of all: a smaller one is compared with this


@dataclass(frozen=True)
class CheckCase:
    """What is checked.

    Attributes:
        model: of the run.
        stored: dtype of its checkpoint.
        row: of the run's data, on the host.
    """

    config: RunConfig
    model: Phi3VConfig
    stored: torch.dtype
    runtime: RuntimeDevice
    paths: FastPaths
    row: Mapping[str, Any]

    @property
    def unit(self) -> float:
        """A unit of rounding of the run's precision; float32's are counted generously, for sums come in any order."""
        unit = torch.finfo(self.runtime.dtype).eps
        return unit if self.runtime.autocast_dtype is not None else 32 * unit


@dataclass(frozen=True)
class Outcome:
    """What one computation gives, in float32 on its device."""

    loss: torch.Tensor
    logits: torch.Tensor  # [targets, vocabulary]
    gradients: dict[str, torch.Tensor]

    def distances(self, exact: Outcome) -> dict[str, float]:
        """How far each part is from the exact one, relative to its size; infinite where it is not finite."""
        whole = torch.stack([gradient.norm() for gradient in exact.gradients.values()]).norm()
        off = {"the loss": _distance(self.loss, exact.loss), "the logits": _distance(self.logits, exact.logits)}
        for name, gradient in exact.gradients.items():
            own = self.gradients.get(name)
            least = SMALL_GRADIENT * whole
            off[f"the gradient of {name}"] = math.inf if own is None else _distance(own, gradient, least)
        return off


def _distance(found: torch.Tensor, exact: torch.Tensor, least: torch.Tensor | float = 0.0) -> float:
    distance = ((found - exact).norm() / (exact.norm() + least)).item()
    return distance if math.isfinite(distance) else math.inf


def examine(case: CheckCase, known: Mapping[tuple[str, Any], Verdict] | None = None) -> Iterator[Verdict]:
    """A verdict on every path, each announced by one that says ``trying``.

    Args:
        known: verdicts that need not be found again, by path and value.
    """
    known = known or {}
    used = case.paths.plain()
    yield Verdict("precision", case.runtime.precision, "trying")
    try:
        exact = compute(case, used, exact=True)
        plain = compute(case, used).distances(exact)
    except Exception as error:  # without it nothing can be said of the others
        yield Verdict("precision", case.runtime.precision, "unchecked", in_short(error))
        return
    most = dict.fromkeys(plain, MOST)
    if case.runtime.autocast_dtype is not None:
        yield _judged("precision", case.runtime.precision, plain, None, most)
    for name, (*fast, _plain) in case.paths.alternatives().items():
        for value in fast:
            verdict = known.get((name, value))
            if verdict is None:
                yield Verdict(name, value, "trying")
                verdict = _try(case, replace(used, **{name: value}), name, value, plain, exact)
            yield verdict
            if verdict.state != "failed":
                used = replace(used, **{name: value})
                if name != "checkpointing":
                    break
    for name, value, work in _parts(case):
        verdict = known.get((name, value))
        if verdict is None:
            yield Verdict(name, value, "trying")
            verdict = _caught(name, value, functools.partial(work, case))
        yield verdict


def _try(
    case: CheckCase, paths: FastPaths, name: str, value: Any, plain: Mapping[str, float], exact: Outcome
) -> Verdict:
    unit = FLOAT8_UNITS if paths.fp8 else 1.0
    allowed = {part: min(TIMES * unit * max(distance, case.unit), MOST) for part, distance in plain.items()}
    return _caught(name, value, lambda: _judged(name, value, compute(case, paths).distances(exact), plain, allowed))


def _caught(name: str, value: Any, work: Callable[[], Verdict]) -> Verdict:
    try:
        return work()
    except Exception as error:  # whatever a kernel may raise
        return Verdict(name, value, "unchecked" if is_out_of_memory(error) else "failed", in_short(error))


def _parts(case: CheckCase) -> Iterator[tuple[str, Any, Callable[[CheckCase], Verdict]]]:
    """What is examined without the model."""
    yield "optimizer", case.config.training.optimizer, _optimizer
    if case.config.method.name == "qlora":
        yield "four_bit", "nf4", _four_bit


def _optimizer(case: CheckCase) -> Verdict:
    name = case.config.training.optimizer
    off = {
        f"the update of a {'matrix' if exact.dim() > 1 else 'vector'}": _distance(found, exact)
        for _, found, exact in updates(case.config, case.runtime.device)
    }
    return _judged("optimizer", name, off, None, dict.fromkeys(off, UPDATE_OFF[name]))


def _four_bit(case: CheckCase) -> Verdict:
    found = four_bit_products(case.config, case.runtime, case.model.hidden_size)
    off = {part: _distance(kernel, exact) for part, (kernel, _, exact) in found.items()}
    plain = {part: _distance(own, exact) for part, (_, own, exact) in found.items()}
    allowed = {part: TIMES * max(distance, case.unit) for part, distance in plain.items()}
    return _judged("four_bit", "nf4", off, plain, allowed)


def _judged(
    path: str, value: Any, off: Mapping[str, float], plain: Mapping[str, float] | None, allowed: Mapping[str, float]
) -> Verdict:
    """By the part that is furthest off for what is allowed it."""
    worst = max(off, key=lambda part: off[part] / allowed[part])
    state: Any = "passed" if off[worst] <= allowed[worst] else "failed"
    found = off[worst] if math.isfinite(off[worst]) else None
    what = worst if found is not None else f"{worst} is not finite or missing"
    return Verdict(path, value, state, what, found, plain[worst] if plain else None, allowed[worst])


def compute(case: CheckCase, paths: FastPaths, *, exact: bool = False) -> Outcome:
    """The row forward and backward.

    Args:
        exact: in float32, and attention as it is written down.
    """
    runtime = case.runtime
    device, dtype = runtime.device, None if exact else runtime.autocast_dtype
    model = make_model(case, paths.attention, exact=exact)
    apply_fast_paths(model, paths)
    model.train()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept: list[torch.Tensor] = []
    handle = base.model.register_forward_hook(lambda _module, _inputs, output: kept.append(output.last_hidden_state))
    row = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in case.row.items()}
    objective = make_objective(case.config.objective)
    gradients: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as stack:
        if exact:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        autocast = torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()
        for scale in FP16_SCALES if dtype == torch.float16 else (1.0,):  # what is too large the scaler lowers
            kept.clear()
            model.zero_grad(set_to_none=True)
            with autocast, _small_chunks(base.config.vocab_size):
                loss = objective.probe_loss(lambda inputs: model(**inputs), row)
            (loss * scale).backward()
            gradients = {
                name: parameter.grad.float() / scale
                for name, parameter in model.named_parameters()
                if parameter.grad is not None and not name.endswith(ZERO_BY_NATURE)
            }
            if all(gradient.isfinite().all() for gradient in gradients.values()):
                break
        handle.remove()
        targets = find_targets(row["labels"])
        states = kept[0].detach().flatten(0, 1)
        if len(states) != len(targets):
            states = states[targets - 1]
        with torch.no_grad(), autocast:
            logits = base.lm_head(states.to(next(base.lm_head.parameters()).dtype)).float()
    return Outcome(loss.detach().float(), logits, gradients)


@contextlib.contextmanager
def _small_chunks(vocabulary: int) -> Iterator[None]:
    """Let a small row have several chunks in the loss, four tokens each."""
    before = loss_module.LOGITS_PER_CHUNK
    loss_module.LOGITS_PER_CHUNK = 4 * vocabulary
    try:
        yield
    finally:
        loss_module.LOGITS_PER_CHUNK = before


def make_model(case: CheckCase, attention: str, *, exact: bool = False) -> Any:
    """A model of the run's shape with few layers, the same weights every time, and the run's method applied."""
    config, runtime = copy.deepcopy(case.model), case.runtime
    config.num_hidden_layers = min(LAYERS, config.num_hidden_layers)
    tower = config.clip_vision_config or CLIP_VIT_L_14_336
    # One layer more than run: the features are those before the last.
    config.clip_vision_config = dict(tower) | {"num_hidden_layers": min(LAYERS + 1, tower["num_hidden_layers"])}
    config.attention_dropout = config.embd_pdrop = config.resid_pdrop = 0.0
    loaded, trained = weight_dtypes(case.config, case.stored, runtime)
    if exact:
        loaded = trained = torch.float32
    with torch.device("meta"):
        model = Phi3VForCausalLM._from_config(config, attn_implementation=attention, dtype=loaded)
    model = model.to_empty(device=runtime.device)
    for module in model.modules():
        if isinstance(module, CLIPVisionEmbeddings):
            module.position_ids = torch.arange(module.num_positions, device=runtime.device).expand((1, -1))
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        adapted = apply_method(model, _method(case.config.method), trained)
        _fill(adapted, runtime)
    return adapted


def _method(method: MethodConfig) -> MethodConfig:
    """The same parts, adapted by what has no randomness of its own; of 4-bit weights there is another check."""
    if not method.uses_adapters:
        return method
    lora: LoraConfig = replace(method.lora, dropout=0.0, init="gaussian")
    return replace(method, name="lora", lora=lora)


@torch.no_grad()
def _fill(model: nn.Module, runtime: RuntimeDevice) -> None:
    """Random weights that keep the scale of what they multiply, representable in the run's precision."""
    generator = torch.Generator(runtime.device).manual_seed(0)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, device=runtime.device)
        if parameter.dim() > 1 and id(parameter) not in embeddings and not name.endswith("_GN"):
            # Adapters a little smaller: beside the weights that they are added to they would sharpen attention.
            values *= (0.3 if ".lora_" in name else 1.0) * (parameter.numel() / len(parameter)) ** -0.5
        elif parameter.dim() == 1:
            values = values / 10 + (0.0 if name.endswith("bias") else 1.0)
        parameter.copy_(values.to(runtime.dtype))


def in_short(error: BaseException) -> str:
    """What an error says, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
