"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): weights rounded so that a layer's outputs on given records stay.

The records go through the decoder layer by layer; each layer's weights are fitted to what reaches it through the
rounded layers before it. One layer is loaded at a time.

Shapes: ``n`` records, ``T`` tokens of one, ``H`` hidden; ``O`` outputs and ``I`` inputs of a linear layer, ``G`` groups
of its inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.initialization import no_init_weights

from phi3v.data.collate import PageReader, Sample, make_sample, stack_images
from phi3v.data.lengths import LENGTH_HINT
from phi3v.data.table import open_table
from phi3v.errors import UserError
from phi3v.model.checkpoint import EMBEDDING, SECOND_EMBEDDING, stored_tensors
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.modeling import Phi3VModel
from phi3v.processing.processor import Phi3VProcessor

RECORDS = 64
FEWEST = 16
# Of all records: in float32 they weigh 2.5 GB between two layers of the released models.
TOKENS = 200_000
BLOCK = 128  # columns whose errors are added to the rest at once
DAMPING = 0.01  # of the mean of the diagonal, added to it (as in the paper)


class Rounding(Protocol):
    """How weights are stored (see `compressed.Layer`)."""

    bits: int
    group_size: int | None

    def scales(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(O, G) of a weight (O, I)."""


def read_calibration(model: str, data: Path) -> list[Sample]:
    """Records with images, drawn from a data file, with their answers, as ``model`` (a folder or a hub id) reads them.

    Raises:
        UserError: the file or an image cannot be used, too few records have an image, or one is too long.
    """
    processor = Phi3VProcessor.from_pretrained(model)
    context = Phi3VConfig.from_pretrained(model).max_position_embeddings
    table = open_table(data, special_text="escape", exif_orientation=processor.image_processor.exif_orientation)
    with_images = table.image_counts().nonzero()[0]
    if len(with_images) < FEWEST:
        raise UserError(
            f"{len(with_images)} of its {len(table)} records have an image, and at least {FEWEST} are needed",
            where=f"--calibrate {data}",
            hint="give records like those that the model was tuned on; without --calibrate none are needed",
        )
    reader = PageReader(table, processor.image_processor)
    samples: list[Sample] = []
    for index in np.random.default_rng(0).permutation(with_images)[:RECORDS].tolist():
        record = table[index]
        sample = make_sample(reader, record, processor)
        if len(sample.input_ids) > context:
            raise UserError(
                f"has {len(sample.input_ids)} tokens, and the model reads {context}",
                where=table.where(record),
                hint=LENGTH_HINT,
            )
        samples.append(sample)
        if len(samples) >= FEWEST and sum(len(sample.input_ids) for sample in samples) > TOKENS:
            break
    return samples


@torch.no_grad()
def fit_weights(
    model: Path, samples: Sequence[Sample], names: Collection[str], rounding: Rounding
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The weights of ``names``, layer by layer, fitted to ``samples``.

    Yields:
        The name, the weight (O, I) float32 with the values that its stored form stands for, and its scales (O, G).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Phi3VConfig.from_pretrained(model)
    depth, config.num_hidden_layers = config.num_hidden_layers, 1  # a layer for all, one after the other
    with no_init_weights():
        decoder = Phi3VModel._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    beside = {f"model.{name}" for name in decoder.state_dict() if not name.startswith(("layers.", "norm."))}
    _load(decoder, model, "model.", beside)
    states = _embed(decoder.to(device), samples)
    decoder.vision_embed_tokens = decoder.embed_tokens = None
    layer = decoder.layers[0]

    def run(state: torch.Tensor) -> torch.Tensor:
        state = state.to(device)
        positions = torch.arange(state.shape[1], device=device)[None]
        outputs: torch.Tensor = layer(state, position_embeddings=decoder.rotary_emb(state, positions))
        return outputs.cpu()

    for index in range(depth):
        prefix = f"model.layers.{index}."
        dtypes = _load(layer, model, prefix, {f"{prefix}{name}" for name in layer.state_dict()})
        linears = {
            f"{prefix}{name}.weight": module
            for name, module in layer.named_modules()
            if f"{prefix}{name}.weight" in names
        }
        with _Hessians(linears) as hessians:
            for state in states:
                run(state)
        for name, linear in linears.items():
            weight, scales = fit(linear.weight, hessians.pop(name), rounding, dtypes[name])
            linear.weight.copy_(weight)
            yield name, weight.cpu(), scales.cpu()
        for place, state in enumerate(states):
            states[place] = run(state)


def _load(module: nn.Module, model: Path, prefix: str, names: Collection[str]) -> dict[str, torch.dtype]:
    """Copy the tensors ``names`` into ``module``; gives the dtypes in which they are stored."""
    own, dtypes = module.state_dict(), {}
    for _, name, tensor in stored_tensors(model, {*names, SECOND_EMBEDDING} if EMBEDDING in names else names):
        name = EMBEDDING if name == SECOND_EMBEDDING else name
        own[name.removeprefix(prefix)].copy_(tensor)
        dtypes[name] = tensor.dtype
    if missing := set(names) - set(dtypes):
        raise RuntimeError(f"{model} has no {min(missing)}")
    return dtypes


def _embed(decoder: Phi3VModel, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """What the first layer gets of each sample: (1, T, H) on the host."""
    device = decoder.embed_tokens.weight.device
    states = []
    for sample in samples:
        images = stack_images([sample])
        if sample.pages:
            images["pages"] = images["pages"].to(device)
        states.append(decoder.embed(torch.tensor([sample.input_ids], device=device), **images).cpu())
    return states


class _Hessians(dict[str, torch.Tensor]):
    """While entered: the mean of ``x x^T`` (I, I) over the inputs ``x`` that reach each linear layer, float32."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._linears = linears
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, linear in self._linears.items():
            self._hooks.append(linear.register_forward_pre_hook(partial(self._add, name)))
        return self

    def _add(self, name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2)  # [T, I]
        if name in self:
            self[name].addmm_(rows.T, rows)
        else:
            self[name] = rows.T @ rows

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()


def fit(
    weight: torch.Tensor, hessian: torch.Tensor, rounding: Rounding, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight (O, I) column by column; what a column loses, those after it make up for (algorithm 1).

    Columns of large inputs come first, with the scales of the weight as it was, so that the order need not be stored.
    On a tuned tiny model this halved the divergence that the order of the paper left.

    Args:
        hessian: (I, I), a multiple of the mean of ``x x^T`` over the inputs.
        dtype: of the scales.

    Returns:
        The weight as it is stored, in float32, and its scales (O, G).
    """
    scales = rounding.scales(weight, dtype)
    low, high = -(2 ** (rounding.bits - 1)), 2 ** (rounding.bits - 1) - 1
    order = hessian.diagonal().argsort(descending=True)
    factor = _inverse_factor(hessian[order][:, order])
    inputs = weight.shape[1]
    of_group = order // (rounding.group_size or inputs)
    rest = weight.float()[:, order]
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors = torch.empty_like(rest[:, start:end])
        for column in range(start, end):
            scale = scales[:, of_group[column]].float()
            rounded = (rest[:, column] / scale).round().clamp(low, high) * scale
            error = (rest[:, column] - rounded) / factor[column, column]
            rest[:, column + 1 : end] -= error[:, None] * factor[column, column + 1 : end]
            rest[:, column] = rounded
            errors[:, column - start] = error
        rest[:, end:] -= errors @ factor[start:end, end:]
    return torch.empty_like(rest).index_copy_(1, order, rest), scales


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, float32."""
    damped = hessian.double()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that was always 0 is rounded to the nearest
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
