"""The check at the start of every run finds what would train nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_helpers import load

from phi3v.config import LoraConfig, MethodConfig
from phi3v.data.collate import Collator
from phi3v.data.rows import RowDataset
from phi3v.data.table import open_table
from phi3v.errors import UserError
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.compute.checkpointing import apply_checkpointing
from phi3v.train.methods.gradient_check import check_gradients


@pytest.fixture
def batch(easy_vqa: Path, small_model_dir: Path) -> dict[str, torch.Tensor]:
    processor = Phi3VProcessor.from_pretrained(small_model_dir)
    dataset = RowDataset(open_table(easy_vqa / "train.jsonl"), processor)
    return Collator(processor.tokenizer.pad_token_id)([dataset.samples((0,))[0]])


@pytest.mark.parametrize("name", ["full", "frozen-vision", "lora", "qlora"])
def test_passes_and_leaves_no_trace(small_model_dir: Path, batch: dict[str, torch.Tensor], name: str) -> None:
    model = load(small_model_dir, MethodConfig(name, lora=LoraConfig(rank=4)))  # type: ignore[arg-type]
    apply_checkpointing(model, "full")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    count = check_gradients(model, batch)
    assert count == sum(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_reentrant_checkpointing_over_frozen_embeddings_is_found(
    small_model_dir: Path, batch: dict[str, torch.Tensor]
) -> None:
    """The published frozen-vision speed most likely trained nothing; such a run must not start here."""
    model = load(small_model_dir, MethodConfig("frozen-vision"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.disable_input_require_grads()  # the library's own remedy, which versions of it lacked
    with pytest.raises(UserError, match="trainable, but has no gradient"):
        check_gradients(model, batch)


def test_a_detached_part_is_found(small_model_dir: Path, batch: dict[str, torch.Tensor]) -> None:
    model = load(small_model_dir, MethodConfig("full"))
    model.model.vision_embed_tokens.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(UserError, match=r"vision_embed_tokens.*no gradient"):
        check_gradients(model, batch)


def test_a_tensor_that_is_multiplied_away_is_found(small_model_dir: Path, batch: dict[str, torch.Tensor]) -> None:
    model = load(small_model_dir, MethodConfig("full"))
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 0.0 * output)
    with pytest.raises(UserError, match=r"layers\.1\.mlp.*its gradient is zero"):
        check_gradients(model, batch)


def test_a_gradient_that_is_not_finite_is_found(small_model_dir: Path, batch: dict[str, torch.Tensor]) -> None:
    model = load(small_model_dir, MethodConfig("full"))
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UserError, match=r"model\.norm\.weight: its gradient is not finite"):
        check_gradients(model, batch)


def test_a_frozen_tensor_with_a_gradient_is_found(small_model_dir: Path, batch: dict[str, torch.Tensor]) -> None:
    model = load(small_model_dir, MethodConfig("frozen-vision"))
    frozen = model.model.vision_embed_tokens.img_projection[0].weight

    def leak(module: torch.nn.Module, args: object, output: object) -> None:
        frozen.grad = torch.ones_like(frozen)

    model.model.norm.register_forward_hook(leak)
    with pytest.raises(UserError, match="frozen, but has a gradient"):
        check_gradients(model, batch)


def test_nothing_trainable_is_an_error(small_model_dir: Path, batch: dict[str, torch.Tensor]) -> None:
    model = load(small_model_dir, MethodConfig("full")).requires_grad_(False)
    with pytest.raises(UserError, match="nothing is trainable"):
        check_gradients(model, batch)
