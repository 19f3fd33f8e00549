"""A tuned model, wherever it is: a model, an adapter, or the run that made it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from phi3v.config import MethodConfig, ModelConfig, RunConfig, load_config
from phi3v.errors import UserError
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.checkpoint_folder import checkpoints, step_of
from phi3v.train.device import Compute
from phi3v.train.loading import inspect_model, keep_trainable_layout, load_processor, load_weights, quantization
from phi3v.train.run_folder import read_tuned_from

ADAPTER_CONFIG = "adapter_config.json"
SAVES = ("final", "best")  # the folders of a run that hold a model or an adapter


@dataclass(frozen=True)
class Tuned:
    """Where a tuned model is.

    Attributes:
        base: a model folder or a hub id: the model itself, or what the adapter goes on.
        adapter: the adapter's folder, if it is one.
        run: the configuration of the run it comes from; of no known run, the defaults.
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
    def is_quantised(self) -> bool:
        """Whether its adapter was trained on a 4-bit model."""
        return self.adapter is not None and self.run.method.name == "qlora"


def find_tuned(name: str, base: str | None = None) -> Tuned:
    """Find out what ``name`` is: a run folder (its ``final/`` is meant), a checkpoint, an adapter, a model, a hub id.

    Args:
        base: what an adapter goes on, in place of what it says itself.

    Raises:
        UserError: a run without a result, or an adapter that does not say what it goes on.
    """
    folder = Path(name)
    if folder.name == "model" and is_checkpoint(folder.parent):
        folder = folder.parent
    of_checkpoint = is_checkpoint(folder)
    of_run = folder.parent if folder.name in SAVES or of_checkpoint else folder
    run, run_folder = RunConfig(), None
    if (of_run / "config.yaml").is_file():
        run, run_folder = load_config(of_run / "config.yaml"), of_run
        if folder == of_run:
            folder = folder / "final"
            if not folder.is_dir():
                there = [of_run / "best"] if (of_run / "best").is_dir() else checkpoints(of_run)
                hint = f"take {there[0]}" if there else "did the run end early?"
                raise UserError("is a run without a result: final/ is missing", where=name, hint=hint)
    if of_checkpoint:
        folder = folder / "model"
    adapter_config = folder / ADAPTER_CONFIG
    if not adapter_config.is_file():
        return Tuned(str(folder) if folder.is_dir() else name, None, run, run_folder, of_checkpoint)
    if base is None:
        try:
            base = json.loads(adapter_config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except ValueError as error:
            raise UserError(f"is no JSON: {error}", where=str(adapter_config), hint="copy it again") from None
    if not base:
        raise UserError(
            "does not say which model the adapter goes on", where=str(adapter_config), hint="name it with --base"
        )
    return Tuned(base, folder, run, run_folder, of_checkpoint)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run."""
    return step_of(folder) >= 0 and (folder / "model").is_dir()


def load_tuned(tuned: Tuned, compute: Compute, *, num_crops: int | None = None) -> tuple[Any, Phi3VProcessor]:
    """The model, as its run measured it, and its processor.

    Args:
        num_crops: crops of a page at most; by default as the model was saved.

    Raises:
        UserError: there is no such model, or it cannot be loaded here.
    """
    method = MethodConfig("qlora", lora=tuned.run.method.lora) if tuned.is_quantised else MethodConfig()
    trained = tuned.run.model.attention
    # Those two are for training: packed rows, and shared pages.
    model = ModelConfig(tuned.base, num_crops=num_crops, attention="auto" if trained in ("varlen", "flex") else trained)
    config = RunConfig(model=model, method=method)
    facts = inspect_model(config, compute)
    own = tuned.adapter is not None and (tuned.adapter / "preprocessor_config.json").is_file()
    processor = load_processor(RunConfig(model=ModelConfig(str(tuned.adapter), num_crops=num_crops)) if own else config)
    under_adapter = compute.dtype if compute.autocast_dtype is not None else torch.float32
    kwargs: dict[str, Any] = {
        "attn_implementation": facts.attention,
        "dtype": facts.stored_dtype if tuned.adapter is None else under_adapter,
    }
    if tuned.is_quantised:
        kwargs["quantization_config"] = quantization(method.lora, compute.dtype)
    if tuned.is_quantised or compute.device.type == "cuda":
        kwargs["device_map"] = {"": compute.device}
    loaded = load_weights(tuned.base, **kwargs)
    if tuned.is_quantised:
        keep_trainable_layout(loaded)
    if tuned.adapter is not None:
        try:
            loaded = PeftModel.from_pretrained(loaded, str(tuned.adapter))
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise UserError(f"the adapter cannot be loaded: {error}", where=str(tuned.adapter)) from error
    return loaded.eval(), processor
