"""A training micro-batch reads nothing back from the device, from the embeddings to the last gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from device_reads import DeviceReads, sample
from torch._subclasses import FakeTensorMode

from phi3v import Phi3VForCausalLM
from phi3v.data.collate import Collator, pack_row
from phi3v.train.compute.checkpointing import apply_checkpointing


def batches() -> dict[str, tuple[str, dict[str, Any]]]:
    """Attention and batch of everything that training computes."""
    one, other, text = sample(9, ("a", 1)), sample(30, ("a", 1)), sample(20)
    two = sample(15, ("b", 2), ("a", 1))
    return {
        "padded": ("sdpa", Collator(0)([one, two, text])),
        "text alone": ("sdpa", Collator(0)([text, text])),
        "packed": ("packed_segments", pack_row([[one], [two], [text]])),
        "shared image": ("packed_segments", pack_row([[one, other], [two]])),
        "shared image, whole mask": ("packed_mask", pack_row([[one, other], [two]])),
    }


def run(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "counts"}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, loss_normalizer=2.0, logits_to_keep=None, use_cache=False).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_a_micro_batch_reads_nothing(tiny_model_dir: Path, policy: Any) -> None:
    """Found by counting, and by tensors that have no values to read."""
    model = Phi3VForCausalLM.from_pretrained(tiny_model_dir).train()
    apply_checkpointing(model, policy)
    made = batches()
    for name, (attention, batch) in made.items():
        model.set_attn_implementation(attention)
        with DeviceReads() as reads:
            assert run(model, batch).isfinite()
        # One of this test's own: whether the loss is finite.
        assert sum(reads.found.values()) == 1, (name, reads.found)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = Phi3VForCausalLM(model.config).train()
        apply_checkpointing(fake, policy)
        for name, (attention, batch) in made.items():
            fake.set_attn_implementation(attention)
            tensors = {n: mode.from_tensor(v) for n, v in batch.items() if isinstance(v, torch.Tensor)}
            run(fake, batch | tensors)
            gradients = [p.grad for p in fake.parameters() if p.requires_grad]
            assert sum(g is not None for g in gradients) > 50, name


def test_reads_are_found() -> None:
    """What the count is for: official inputs, whose layout the model reads itself."""
    values = torch.arange(4)
    with DeviceReads() as reads:
        values.sum().item()
        values[values > 2]
        values.nonzero()
    assert reads.found == {"aten._local_scalar_dense": 1, "aten.index": 1, "aten.nonzero": 1}
