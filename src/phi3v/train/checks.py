"""What makes a run impossible: the one list. ``phi3v train`` raises the first, ``phi3v doctor`` shows all, and
``phi3v plan`` asks it of machines that are not here, for every set-up that it offers.

A check is a pure function of what is configured and of what is known of machine, model and data. What has to be looked
up to know that (files, weights, a server) is refused where it is looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from phi3v.config import RunConfig
from phi3v.errors import UserError
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.train.compute.activations import RECOMPUTES_ALL
from phi3v.train.compute.float8 import require_torchao
from phi3v.train.data_facts import DataFacts
from phi3v.train.device import RuntimeDevice
from phi3v.train.engines.choice import DIVIDED_OPTIMIZER, EngineChoice, choose_engine
from phi3v.train.methods.loading import choose_attention, require_bitsandbytes
from phi3v.train.methods.optimizers import keeps_bf16_weights
from phi3v.train.methods.strategies import target_modules, trained_parts


@dataclass(frozen=True)
class Case:
    """A run to be checked; of what is not known yet, nothing is refused.

    Attributes:
        runtime: of the machine that it is to run on, which may be another than this.
        model: without weights, and no method applied to it.
    """

    config: RunConfig
    runtime: RuntimeDevice
    model: Phi3VForCausalLM | None = None
    data: DataFacts | None = None

    @cached_property
    def engine(self) -> EngineChoice:
        return choose_engine(self.config, self.runtime)

    @cached_property
    def trained(self) -> frozenset[str]:
        """The parts that learn something; none where that cannot be told."""
        try:
            return trained_parts(self.model, self.config.method) if self.model is not None else frozenset()
        except UserError:  # `lora_targets` says why
            return frozenset()


Check = Callable[[Case], Iterator[UserError]]


def refusals(case: Case) -> list[UserError]:
    """Everything that makes the run impossible."""
    return [refusal for check in CHECKS for refusal in check(case)]


def require_possible(case: Case) -> None:
    """Raise the first of `refusals`, if there is one."""
    for refusal in refusals(case):
        raise refusal


def _raised(work: Callable[[], object]) -> Iterator[UserError]:
    """What a choice raises where there is nothing to choose."""
    try:
        work()
    except UserError as error:
        yield error


def float_weights(case: Case) -> Iterator[UserError]:
    if case.model is not None and getattr(case.model.config, "quantization_config", None) is not None:
        yield UserError(
            "its weights are quantised, and rounded weights cannot be trained",
            where=f"model.path {case.config.model.path}",
            hint="name the float model that it was made from; method.name qlora trains on 4-bit weights of that",
        )


def one_process(case: Case) -> Iterator[UserError]:
    wanted = case.config.distributed.engine
    if case.runtime.world_size == 1 and wanted not in ("auto", "ddp"):
        yield UserError(
            f"{wanted} divides a model over several processes, and there is one",
            where="distributed.engine",
            hint="start it with torchrun --nproc_per_node N, or leave the engine at auto",
        )


def offloading(case: Case) -> Iterator[UserError]:
    if case.config.distributed.offload_optimizer and not case.engine.is_zero:
        yield UserError(
            f"only zero1, zero2 and zero3 keep the optimizer's state in the host's memory, not {case.engine.name}",
            where="distributed.offload_optimizer",
            hint="set distributed.engine to zero2, or leave it out",
        )


def deepspeed(case: Case) -> Iterator[UserError]:
    where, training, name = "distributed.engine", case.config.training, case.engine.name
    if not case.engine.is_zero:
        return
    if not case.runtime.gpu.has("deepspeed"):
        hint = 'pip install "phi3v[deepspeed]"'
        yield UserError(f"{name} needs DeepSpeed, which is not installed", where=where, hint=hint)
    if training.optimizer != DIVIDED_OPTIMIZER:
        yield UserError(
            f"{name} lays tensors end to end and cuts them up; the moments of {training.optimizer} could not "
            "be told apart again when they are saved",
            where="training.optimizer",
            hint="use adamw, whose state is divided over the ranks; or set distributed.engine to ddp",
        )
    if name != "zero3":
        return
    if case.config.method.name == "qlora":
        yield UserError("zero3 does not divide 4-bit weights", where=where, hint="use fsdp2, which does, or ddp")
    if training.compile:
        yield UserError(
            "zero3 gathers weights in hooks that torch.compile would break up",
            where="training.compile",
            hint="set distributed.engine to zero2, or training.compile to false",
        )
    if training.kernels == "liger":
        yield UserError(
            "Liger's loss reads the head's weight itself, which zero3 has divided by then",
            where="training.kernels",
            hint="set distributed.engine to zero2, or training.kernels to torch",
        )


def fsdp(case: Case) -> Iterator[UserError]:
    if case.engine.name != "fsdp2":
        return
    optimizer = case.config.training.optimizer
    if optimizer != DIVIDED_OPTIMIZER:
        yield UserError(
            f"fsdp2 divides every weight over the ranks, and {optimizer} updates whole ones",
            where="training.optimizer",
            hint="use adamw, whose state is divided over the ranks; or set distributed.engine to ddp",
        )
    if case.runtime.precision == "fp16":
        yield UserError(
            "fsdp2 is not proven with fp16's loss scale",
            where="distributed.engine",
            hint="use zero3, or training.precision bf16 or fp32",
        )


def checkpoint_format(case: Case) -> Iterator[UserError]:
    config, where = case.config, "checkpoint.format"
    is_whole = config.method.uses_adapters or config.training.optimizer != DIVIDED_OPTIMIZER
    if config.checkpoint.format == "sharded" and is_whole:
        yield UserError("adapters, and moments but adamw's, are saved whole", where=where, hint="leave it at auto")


def replicas(case: Case) -> Iterator[UserError]:
    wanted, ranks, where = case.config.distributed.replicas, case.runtime.world_size, "distributed.replicas"
    if wanted == 1:
        return
    if case.engine.name != "fsdp2":
        yield UserError(
            f"replicas of a sharded model are fsdp2's, and the engine is {case.engine.name}",
            where=where,
            hint="set distributed.engine to fsdp2, or leave it at 1",
        )
    elif ranks % wanted:
        yield UserError(
            f"{ranks} ranks cannot be split into {wanted} equal replicas",
            where=where,
            hint="use the number of machines, or another divisor of the number of ranks",
        )


def reduce_dtype(case: Case) -> Iterator[UserError]:
    wanted = case.config.distributed.reduce_dtype
    if wanted == "fp32" and case.engine.name == "ddp" and keeps_bf16_weights(case.config.training):
        yield UserError(
            "ddp sums gradients in the dtype of the weights, which is bf16",
            where="distributed.reduce_dtype",
            hint="leave it at auto, or use training.optimizer adamw or adamw_8bit, which keep float32 weights",
        )


def batch(case: Case) -> Iterator[UserError]:
    yield from _raised(lambda: case.config.accumulation_steps(case.runtime.world_size))


def optimizer(case: Case) -> Iterator[UserError]:
    training = case.config.training
    where = "training.lean" if training.lean else "training.optimizer"
    if training.optimizer == "adamw_8bit" and not case.runtime.gpu.has("bitsandbytes"):
        yield UserError("adamw_8bit needs bitsandbytes", where=where, hint='pip install "phi3v[qlora]"')
    if keeps_bf16_weights(training) and case.runtime.precision != "bf16":
        yield UserError(
            f"the trained weights would be in bf16, but the precision is {case.runtime.precision}",
            where=where,
            hint="set training.precision to bf16, or training.optimizer to adamw or adamw_8bit without training.lean",
        )


def lean(case: Case) -> Iterator[UserError]:
    config, training, where = case.config, case.config.training, "training.lean"
    if not training.lean:
        return
    if training.optimizer == "adamw":
        yield UserError(
            "lean mode holds no float32 weights, and adamw needs them",
            where="training.optimizer",
            hint="use adamw_8bit or adamw_bf16",
        )
    if training.max_grad_norm > 0:
        yield UserError(
            "each gradient is used up before the norm of all is known, so they cannot be clipped by it",
            where="training.max_grad_norm",
            hint="set it to 0, or training.lean to false",
        )
    share = case.runtime.world_size * training.micro_batch_size
    if config.data.packing != "none":
        yield UserError(
            "each backward pass is an optimizer step, and a step of packed rows may have several",
            where=where,
            hint="set data.packing to none, or training.lean to false",
        )
    elif training.batch_size > share:
        yield UserError(
            f"each backward pass is an optimizer step, so {training.batch_size // share} micro-batches cannot be "
            "accumulated",
            where=where,
            hint="set training.micro_batch_size to the share of training.batch_size that a device has",
        )
    if case.runtime.world_size > 1:
        yield UserError(
            "each gradient is used up before the ranks could add theirs",
            where=where,
            hint="run on one device, or set training.lean to false",
        )
    if training.activation_checkpointing not in ("auto", *RECOMPUTES_ALL):
        yield UserError(
            f"lean mode recomputes all activations, not {training.activation_checkpointing}",
            where="training.activation_checkpointing",
            hint="leave it at auto",
        )


def activation_offload(case: Case) -> Iterator[UserError]:
    training = case.config.training
    if training.compile and training.activation_checkpointing == "offload":
        yield UserError(
            "a compiled layer contains its checkpoint, and the hooks that move its input cannot be compiled",
            where="training.activation_checkpointing",
            hint="use full, or set training.compile to false",
        )


def kernels(case: Case) -> Iterator[UserError]:
    if case.config.training.kernels != "liger":
        return
    where, hint = "training.kernels", "use torch"
    if case.runtime.gpu.type != "cuda":
        yield UserError(f"Liger's kernels need a GPU, this is {case.runtime.gpu.type}", where=where, hint=hint)
        return
    if case.runtime.precision == "fp16":  # its loss takes the gradient before fp16's loss scale
        yield UserError("Liger's loss does not train in fp16", where=where, hint=hint)
    if not case.runtime.gpu.has("liger_kernel"):
        yield UserError("Liger is not installed", where=where, hint='pip install "phi3v[gpu]"')


def float8(case: Case) -> Iterator[UserError]:
    if not case.config.training.fp8:
        return
    where, hint, gpu = "training.fp8", "set it to false", case.runtime.gpu
    if case.config.method.name == "qlora":
        yield UserError("the decoder's weights are in four bits with qlora", where=where, hint=f"use lora, or {hint}")
    if gpu.type != "cuda":
        yield UserError(f"FP8 needs a GPU, this is {gpu.type}", where=where, hint=hint)
        return
    if not gpu.float8:
        what = f"{gpu.name} has no products of float8; NVIDIA's cards of compute capability 8.9 and newer do"
        yield UserError(what, where=where, hint=hint)
        return
    if case.runtime.precision != "bf16":
        yield UserError(
            f"what is not FP8 must be bf16, and the precision is {case.runtime.precision}",
            where=where,
            hint="set training.precision to bf16",
        )
    if gpu.is_here:
        yield from _raised(require_torchao)


def four_bits(case: Case) -> Iterator[UserError]:
    gpu = case.runtime.gpu
    if case.config.method.name != "qlora":
        return
    if not gpu.four_bit:
        what = f"4-bit weights need Turing or newer, {gpu.name} is older"
        yield UserError(what, where="method.name", hint="use lora")
    if gpu.is_here:
        yield from _raised(require_bitsandbytes)


def attention(case: Case) -> Iterator[UserError]:
    yield from _raised(lambda: choose_attention(case.config, case.runtime))


def trackers(case: Case) -> Iterator[UserError]:
    for name in case.config.training.report_to:
        if not case.runtime.gpu.has(name):
            yield UserError(f"{name} is not installed", where="training.report_to", hint=f"pip install {name}")


def evaluation_data(case: Case) -> Iterator[UserError]:
    if case.config.data.eval is None and case.config.evaluation.eval_steps is not None:
        what, hint = "there is no data to evaluate on", "set data.eval to a JSONL file"
        yield UserError(what, where="evaluation.eval_steps", hint=hint)


def lora_targets(case: Case) -> Iterator[UserError]:
    model, method = case.model, case.config.method
    if model is not None and method.uses_adapters:
        yield from _raised(lambda: target_modules(model, method.lora))


def feature_cache(case: Case) -> Iterator[UserError]:
    where = "training.feature_cache"
    if case.config.training.feature_cache == "off":
        return
    if case.engine.divides_weights:
        yield UserError(
            f"with {case.engine.name} all ranks run every layer together, and with cached features some skip the "
            "tower's",
            where=where,
            hint="set distributed.engine to zero2, or training.feature_cache to off",
        )
    if "vision" in case.trained:
        yield UserError(
            "the vision tower is trained, so its features change at every step",
            where=where,
            hint="set it to off, or freeze the tower: method.name frozen-vision, or method.lora.parts without vision",
        )


def objective(case: Case) -> Iterator[UserError]:
    config, data, name = case.config, case.data, case.config.objective.name
    if not config.objective.is_preference:
        if data is not None and data.bad_answer is not None:
            yield UserError(
                "its answer is labelled bad, and sft would teach it",
                where=data.bad_answer,
                hint="set objective.name to kto, which learns from labels, or leave such records out",
            )
        return
    if config.training.loss_weighting != "sample":
        yield UserError(
            f"{name} weighs whole answers, not their tokens",
            where="training.loss_weighting",
            hint="set it to sample",
        )
    if data is None:
        return
    pairs = 'a worse answer beside "assistant" in the last turn: "rejected": "…" (docs/preferences.md)'
    if config.objective.takes_pairs and data.no_pair is not None:
        missing = data.records - data.pairs
        yield UserError(
            f"{name} learns from pairs of answers, and {missing:,} of {data.records:,} records have no rejected one",
            where=data.no_pair,
            hint=f"give each {pairs}" + ("; or set objective.name to kto, which takes labels" if data.labels else ""),
        )
    if name == "kto" and data.no_judgement is not None:
        missing = data.records - data.pairs - data.labels
        yield UserError(
            f"kto learns from good and bad answers, and {missing:,} of {data.records:,} records have neither a label "
            "nor a rejected answer",
            where=data.no_judgement,
            hint=f'give each "label": true or false, or {pairs}',
        )
    if name == "kto" and data.records == 1:
        hint = "give it more records"
        yield UserError("kto compares each record with another one, and there is one", where=data.where, hint=hint)


def images(case: Case) -> Iterator[UserError]:
    if case.data is not None and not case.data.has_images and case.trained & {"vision", "projector"}:
        yield UserError(
            "no record has an image, so the vision part would learn nothing",
            where=case.data.where,
            hint="use method.name frozen-vision, or method.lora.parts [decoder, head]",
        )


def references(case: Case) -> Iterator[UserError]:
    if case.data is not None and case.data.unusable is not None:
        yield case.data.unusable


CHECKS: tuple[Check, ...] = (
    float_weights,
    one_process,
    offloading,
    deepspeed,
    fsdp,
    checkpoint_format,
    replicas,
    reduce_dtype,
    batch,
    optimizer,
    lean,
    activation_offload,
    kernels,
    float8,
    four_bits,
    attention,
    trackers,
    evaluation_data,
    lora_targets,
    feature_cache,
    images,
    objective,
    references,
)
