"""A tuned model, wherever it is: a model, an adapter, or the run that made it."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers.utils import cached_file

from phi3v.config import DataConfig, MethodConfig, ModelConfig, RunConfig, load_config
from phi3v.errors import UserError
from phi3v.json_files import content_of, read_json
from phi3v.paths import find_model, now_at
from phi3v.processing.hd_transform import PREPROCESSOR_CONFIG
from phi3v.processing.processor import Phi3VProcessor
from phi3v.runtime import graph_kind, load_runtime
from phi3v.train.assemble import whole_model
from phi3v.train.checkpoint_folder import checkpoints, is_sharded, step_of
from phi3v.train.device import RuntimeDevice
from phi3v.train.methods.loading import (
    ModelFacts,
    inspect_graphs,
    inspect_model,
    keep_trainable_layout,
    load_processor,
    load_weights,
    quantization,
)
from phi3v.train.methods.weights import read_tuned_from

ADAPTER_CONFIG = "adapter_config.json"
SAVES = ("final", "best")  # the folders of a run that hold a model or an adapter


@dataclass(frozen=True)
class FinetunedModel:
    """Where a tuned model is.

    Attributes:
        base: a model folder or a hub id: the model itself, or what the adapter goes on.
        adapter: the adapter's folder, if it is one.
        run: the configuration of the run it comes from; of no known run, the defaults and what its processor says.
        run_folder: the folder of that run, if it is known.
        is_checkpoint: it was saved in the middle of the run, in the precision that it is trained in.
    """

    base: str
    adapter: Path | None = None
    run: RunConfig = field(default_factory=RunConfig)
    run_folder: Path | None = None
    is_checkpoint: bool = False

    @property
    def origin(self) -> str | None:
        """What it was tuned from, as far as it is known: a folder or a hub id."""
        if self.adapter is not None:
            return self.base
        return self.run.model.path if self.run_folder is not None else read_tuned_from(Path(self.base))

    @property
    def graphs(self) -> str | None:
        """What runs it, where it is an export as graphs (`phi3v.runtime`)."""
        return graph_kind(self.base) if self.adapter is None else None

    @property
    def is_quantised(self) -> bool:
        """Whether its adapter was trained on a 4-bit model."""
        return self.adapter is not None and self.run.method.name == "qlora"


def resolve_model(name: str, base: str | None = None) -> FinetunedModel:
    """Find out what ``name`` is: a run folder (its ``final/`` is meant), a checkpoint, an adapter, a model, a hub id.

    Args:
        base: the model that it was tuned from, in place of what adapter or run say.

    Raises:
        UserError: nothing is there, a run has no result, or the model that an adapter goes on is not where it was.
    """
    if base is not None:
        base = find_model(base, f"--model {base}")
    folder = Path(find_model(name, f"model.path {name}"))
    if not folder.is_dir():
        return FinetunedModel(name, run=_without_run(name))
    folder, run_folder = _place_in_run(folder)
    run = (
        load_config(run_folder / "config.yaml", of_run=True).now_in(run_folder)
        if run_folder is not None
        else _without_run(str(folder))
    )
    if base is not None:
        run = replace(run, model=replace(run.model, path=base))
    if run_folder is not None and folder == run_folder:
        folder = folder / "final"
        if not folder.is_dir():
            there = [run_folder / "best"] if (run_folder / "best").is_dir() else checkpoints(run_folder)
            hint = f"take {there[0]}" if there else "did the run end early?"
            raise UserError("is a run without a result: final/ is missing", where=name, hint=hint)
    of_checkpoint = is_checkpoint(folder)
    if of_checkpoint:
        folder = whole_model(folder, run.model.path) if is_sharded(folder) else folder / "model"
    if not (folder / ADAPTER_CONFIG).is_file():
        return FinetunedModel(str(folder), None, run, run_folder, of_checkpoint)
    if base is None:
        base = _base_of(folder / ADAPTER_CONFIG)
        if run_folder is not None:
            base = now_at(base, run.training.output_dir, run_folder)
        where, hint = f"{base}, which {folder} goes on", "name the folder or hub id where it is now: --model MODEL"
        base = find_model(base, where, hint=hint)
        # Before their paths were made absolute, runs may have named a folder as the hub names a model.
        is_old = run_folder is not None and not os.path.isabs(run.training.output_dir)
        if is_old and not os.path.isdir(base) and not isinstance(try_to_load_from_cache(base, "config.json"), str):
            raise UserError("no model there: no such folder, and none from the hub is at hand", where=where, hint=hint)
    return FinetunedModel(base, folder, run, run_folder, of_checkpoint)


def _without_run(model: str) -> RunConfig:
    """What is known of how a model or adapter was tuned, without the run that tuned it."""
    with suppress(OSError):  # which is said where the model is loaded
        found = cached_file(model, PREPROCESSOR_CONFIG, _raise_exceptions_for_missing_entries=False)
        if found is not None and read_json(Path(found)).get("exif_orientation") is False:
            return RunConfig(data=DataConfig(exif_orientation=False))
    return RunConfig()


def _place_in_run(folder: Path) -> tuple[Path, Path | None]:
    """A folder, for the model in a checkpoint the checkpoint; and the run that it is or belongs to, if any."""
    for place in (folder, folder.resolve()):  # a link of another name may lead into a run
        place = place.parent if place.name == "model" and is_checkpoint(place.parent) else place
        run = place.parent if place.name in SAVES or is_checkpoint(place) else place
        if (run / "config.yaml").is_file():
            return place, run
    return place, None


def _base_of(adapter_config: Path) -> str:
    """The model that an adapter says it goes on."""
    base = read_json(adapter_config).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            "does not say which model the adapter goes on", where=str(adapter_config), hint="name it with --model"
        )
    return base


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run."""
    return step_of(folder) >= 0 and (folder / "model").is_dir()


@dataclass(frozen=True)
class Inspected:
    """What is known of a tuned model before its weights are loaded."""

    config: RunConfig
    facts: ModelFacts
    processor: Phi3VProcessor


def described(tuned: FinetunedModel, runtime: RuntimeDevice) -> str:
    """Where a model computes and how, for the command line."""
    if tuned.graphs is not None:
        return f"graphs: {tuned.graphs}, on the CPU"
    return f"device: {runtime.device}, {runtime.precision} ({runtime.reason})"


def inspect_tuned(tuned: FinetunedModel, runtime: RuntimeDevice, *, num_crops: int | None = None) -> Inspected:
    """Look at a model without loading its weights.

    Args:
        num_crops: crops of a page at most; by default as the model was saved.

    Raises:
        UserError: there is no such model, or it cannot be loaded here.
    """
    method = MethodConfig("qlora", lora=tuned.run.method.lora) if tuned.is_quantised else MethodConfig()
    trained = tuned.run.model.attention
    # Those two are for training: packed rows, and shared pages.
    model = ModelConfig(tuned.base, num_crops=num_crops, attention="auto" if trained in ("varlen", "flex") else trained)
    data = DataConfig(exif_orientation=tuned.run.data.exif_orientation)
    config = RunConfig(model=model, method=method, data=data)
    facts = inspect_graphs(config) if tuned.graphs is not None else inspect_model(config, runtime)
    if facts.quantisation is not None:
        facts.quantisation.require_library(tuned.base)
    if tuned.adapter is not None:
        with content_of(tuned.adapter / ADAPTER_CONFIG):
            PeftConfig.from_pretrained(str(tuned.adapter))
    own = tuned.adapter is not None and (tuned.adapter / PREPROCESSOR_CONFIG).is_file()
    own_config = replace(config, model=ModelConfig(str(tuned.adapter), num_crops=num_crops))
    return Inspected(config, facts, load_processor(own_config if own else config))


def load_tuned(
    tuned: FinetunedModel, runtime: RuntimeDevice, *, num_crops: int | None = None, inspected: Inspected | None = None
) -> tuple[Any, Phi3VProcessor]:
    """The model, as its run evaluated it, or a `Runtime` of graphs; and its processor.

    Args:
        num_crops, inspected: as for and of `inspect_tuned`.

    Raises:
        UserError: there is no such model, or it cannot be loaded here.
    """
    inspected = inspected or inspect_tuned(tuned, runtime, num_crops=num_crops)
    if tuned.graphs is not None:
        return load_runtime(tuned.base), inspected.processor
    facts, method = inspected.facts, inspected.config.method
    dtype = facts.stored_dtype
    if tuned.adapter is not None:
        dtype = runtime.dtype if runtime.autocast_dtype is not None else torch.float32
    elif facts.quantisation is not None and dtype != torch.float32 and runtime.autocast_dtype is not None:
        dtype = runtime.dtype  # autocast does not mix bf16 and fp16
    kwargs: dict[str, Any] = {"attn_implementation": facts.attention, "dtype": dtype}
    if tuned.is_quantised:
        kwargs["quantization_config"] = quantization(method.lora, runtime.dtype)
    if tuned.is_quantised or facts.quantisation is not None or runtime.device.type == "cuda":
        kwargs["device_map"] = {"": runtime.device}
    loaded = load_weights(tuned.base, **kwargs)
    if tuned.is_quantised:
        keep_trainable_layout(loaded)
    if facts.quantisation is not None:
        facts.quantisation.settle(loaded, Path(tuned.base), dtype)
    if tuned.adapter is not None:
        try:
            loaded = PeftModel.from_pretrained(loaded, str(tuned.adapter))
        except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"the adapter cannot be loaded: {error}", where=str(tuned.adapter)) from error
    return loaded.eval(), inspected.processor
