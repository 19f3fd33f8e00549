"""One row of the table of training speed: one method and variant, with the set-up and loop of `phi3v train`."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from phi3v.bench.counting import Clock, CountingLoop, StepWork, one_thread
from phi3v.bench.profile import StepProfile
from phi3v.bench.recipe import CropDataset, RecipeLoop, run_padded_crops
from phi3v.bench.settings import BASELINES, BenchSettings, Row, Variant
from phi3v.config import Attention, Packing, RunConfig
from phi3v.data.readers import Readers
from phi3v.errors import UserError
from phi3v.machine import accelerator_of
from phi3v.model.shape import ModelShape
from phi3v.plan.hardware import this_machine
from phi3v.plan.inputs import TrainSetup, setup_from_config
from phi3v.plan.memory import CUDA_CONTEXT
from phi3v.plan.planner import Planner
from phi3v.plan.throughput import training_flops
from phi3v.train.collectives import HostCollectives
from phi3v.train.device import choose_device
from phi3v.train.methods.loading import flash_obstacle
from phi3v.train.methods.strategies import summarize
from phi3v.train.observers.faults import StepFaults
from phi3v.train.observers.progress import peak_memory_gb
from phi3v.train.prepare import PreparedRun, prepare
from phi3v.train.state import Observer


def row_config(row: Row, settings: BenchSettings, model: Path, data: Path, folder: Path) -> RunConfig:
    """The configuration of a row, as `phi3v train` would take it."""
    config = RunConfig()
    config.model.path, config.model.num_crops = str(model), settings.num_crops
    config.model.attention = _attention(row.variant)
    config.data.train, config.data.image_check = str(data), "header"
    if not torch.cuda.is_available():
        config.data.num_workers = 0  # reading is counted with the rest
    config.method.name, config.method.lora.rank = row.method, settings.rank
    packing: Packing = row.variant if row.variant == "samples" or row.variant == "shared-image" else "none"
    config.data.packing, config.data.pack_tokens = packing, settings.pack_tokens
    config.data.shared_image_max = settings.shared_image_max
    training = config.training
    training.output_dir, training.progress_bar = str(folder), False
    training.precision, training.batch_size = settings.precision, settings.batch_size
    training.logging_steps = settings.steps + 1
    training.max_steps = settings.steps + 1 + settings.profile
    trained_whole = row.method in ("full", "frozen-vision")
    in_fewer_bits: Any = "adamw_8bit" if importlib.util.find_spec("bitsandbytes") else "adamw_bf16"
    auto: Any = in_fewer_bits if trained_whole and torch.cuda.is_available() else "adamw"
    training.optimizer = auto if settings.optimizer == "auto" else settings.optimizer
    if row.variant in BASELINES:
        training.activation_checkpointing, training.self_check = "full", "off"
        return config
    training.kernels, training.fp8, training.compile = settings.kernels, settings.fp8, settings.compile
    if row.variant == "padded":
        training.micro_batch_size = min(settings.micro_batch, settings.batch_size)
    if row.variant == "lean":
        training.lean, training.max_grad_norm = True, 0.0
        training.optimizer = "adamw_bf16" if settings.optimizer == "adamw_bf16" else "adamw_8bit"
        training.batch_size = training.micro_batch_size = settings.lean_batch
    return config


def _attention(variant: Variant) -> Attention:
    if variant == "recipe":
        return "eager"
    if variant != "recipe-flash":
        return "auto"
    if not torch.cuda.is_available():
        return "sdpa"
    gpu = accelerator_of(torch.device("cuda", torch.cuda.current_device()))
    return "flash_attention_2" if flash_obstacle(gpu, torch.bfloat16, "flash_attn") is None else "sdpa"


def measure_row(row: Row, settings: BenchSettings, model: Path, data: Path) -> dict[str, Any]:
    """Measure a row; where it cannot run, ``error`` says why.

    Returns:
        ``attention`` and ``checkpointing`` as chosen; ``not_as_asked``, what the self-check found; ``batch_size``;
        ``steps`` that were timed; ``samples_per_second``, ``questions_per_second``, ``pages_per_second`` (as they went
        through the tower) and
        ``tokens_per_second`` of all devices; ``samples_per_second_range``, the slowest and the fastest step;
        ``tokens_per_sample``; ``tflop_per_sample`` and ``mfu``, the share of the device's rate (None where the rate is
        not known, and on a CPU); ``peak_gb`` (10**9 bytes of a device; on a CPU the process's so far) and
        ``planned_peak_gb``, what `phi3v plan` says of it, without the driver's own part (None of the recipe's
        variants); ``profile``, if asked for, see `profile.summarize_trace`. A second is as `counting.timed_by` says.
    """
    with _clean_memory(), _memory_limit(settings.memory_gb), one_thread(not torch.cuda.is_available()):
        try:
            with tempfile.TemporaryDirectory() as folder:
                config = row_config(row, settings, model, data, Path(folder) / "run")
                return _measure(config, row, settings)
        except torch.OutOfMemoryError:
            if torch.distributed.is_initialized():
                raise  # the other ranks wait in a reduction; only a new launch can go on
            return {"error": "out of memory"}
        except UserError as error:
            return {"error": str(error).splitlines()[0]}


@contextmanager
def _clean_memory() -> Iterator[None]:
    """Start with an empty device, so that the peak is the row's own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _memory_limit(gigabytes: float | None) -> Iterator[None]:
    """As on a smaller GPU, but for what its driver keeps for itself."""
    if gigabytes is None:
        yield
        return
    if not torch.cuda.is_available():
        raise UserError("only a GPU's memory can be limited", where="--memory-gb", hint="leave it out")
    total = torch.cuda.get_device_properties().total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _measure(config: RunConfig, row: Row, settings: BenchSettings) -> dict[str, Any]:
    runtime = choose_device(config.training.precision)
    setup = prepare(config, Console(quiet=True), runtime, HostCollectives(runtime.world_size))
    clock = Clock(settings.seconds, setup.collectives, steps=settings.steps)
    profile = StepProfile(settings.steps + 1)
    loop = _loop(setup, row, [clock, profile] if settings.profile else [clock])
    with loop.readers:
        loop.run()
    if not clock.seconds:
        return {"error": "the data has no second step"}
    steps = loop.work[1 : 1 + len(clock.seconds)]
    work = loop.mean_step(steps)
    seconds = statistics.median(clock.seconds)
    ranks = setup.runtime.world_size
    speeds = [ranks * step.samples / own for step, own in zip(steps, clock.seconds, strict=True)]
    peak = round(peak_memory_gb(), 2)  # before the planner reads the data
    return {
        "attention": setup.facts.attention,
        "checkpointing": setup.checkpointing.split(" ")[0],
        "not_as_asked": [finding.what for finding in setup.checked.findings],
        "optimizer": config.training.optimizer,
        "gpus": setup.runtime.world_size if setup.runtime.device.type == "cuda" else 0,
        "precision": setup.runtime.precision,
        "batch_size": config.training.batch_size,
        "steps": len(clock.seconds),
        "samples_per_second": _round(work.samples / seconds),
        "samples_per_second_range": [_round(min(speeds)), _round(max(speeds))],
        "questions_per_second": _round(work.questions / seconds),
        "pages_per_second": _round(work.pages / seconds),
        "tokens_per_second": round(work.tokens / seconds, 1),
        "tokens_per_sample": round(work.tokens / work.samples, 1),
        **_utilisation(setup, work, seconds),
        "peak_gb": peak,
        "planned_peak_gb": None if row.variant in BASELINES else _planned_peak(setup),
        **({"profile": profile.table} if settings.profile else {}),
    }


def _planned_peak(setup: PreparedRun) -> float:
    """10**9 bytes that `phi3v plan` predicts with the checkpointing that was chosen, as torch's allocator counts."""
    planner = Planner(setup.config, progress=False)
    machine = replace(this_machine(), gpus=setup.runtime.world_size)
    policy: Any = setup.checkpointing.split(" ")[0]
    planned = replace(setup_from_config(setup.config, machine, planner.num_crops), checkpointing=policy)
    peak = planner.memory(planned, machine).peak
    return round((peak if machine.gpu.is_cpu else peak - CUDA_CONTEXT) / 1e9, 2)


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _loop(setup: PreparedRun, row: Row, observers: list[Observer]) -> CountingLoop:
    kind: type[CountingLoop] = CountingLoop
    dataset: Any = setup.dataset()
    if row.variant in BASELINES:
        run_padded_crops(setup.model, setup.processor.image_processor.num_crops)
        kind = RecipeLoop
        dataset = CropDataset(setup.train_table, setup.processor)
    readers = Readers(dataset.__getitem__, setup.num_workers)
    return kind(setup, readers, StepFaults(setup), observers=observers)


def _utilisation(setup: PreparedRun, work: StepWork, seconds: float) -> dict[str, Any]:
    """Model operations of what was computed once: neither padded crops nor what is recomputed count."""
    tower_trained = any(part.part == "vision" and part.trainable for part in summarize(setup.model))
    shape = ModelShape.of(setup.model.config)
    plan = TrainSetup(method=setup.config.method)
    flops = training_flops(shape, plan, work.sample_work(), tower_trained=tower_trained).model
    gpu = this_machine().gpu
    known = gpu.tflops > 0 and not gpu.is_cpu
    rate = gpu.tflops * 1e12 * setup.runtime.world_size
    return {
        "tflop_per_sample": _round(flops / work.samples / 1e12),
        "mfu": round(flops / seconds / rate, 3) if known else None,
    }
