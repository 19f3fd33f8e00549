"""Logits, loss and gradients against the reference numbers, in float32.

Tolerances: the reference ran eager attention and we run SDPA, so sums are in another order. On logits of about 1 that
is 1e-6 (float32 has 1.2e-7 of resolution, through 3 layers); 2e-5 leaves room for other builds of torch and is far
below any mistake, which shows at 1e-2 and above. The loss is a mean of such logits: 1e-5. Gradient norms are sums of
squares over thousands of entries and agree to 1e-6 of their size; 1e-3 is asked.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

NAMES = ("one_image", "two_images", "tall_and_wide_16", "long_rope")


@pytest.mark.parametrize("image_ids", ["official", "of one token"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_gradients(
    name: str,
    image_ids: str,
    golden_cases: dict[str, Any],
    golden_arrays: dict[str, torch.Tensor],
    load_golden: Any,
    sample: Any,
) -> None:
    (case,) = [c for c in golden_cases["model"] if c["name"] == name]
    given = sample("model", name)
    assert given.length == case["length"]
    model = load_golden(original_max_position_embeddings=case["original_max_position_embeddings"])
    ids = given.input_ids
    if image_ids == "of one token":
        ids = ids.masked_fill(ids < 0, model.config.image_token_id)
    # Without an attention mask, as the reference ran.
    output = model(ids, pixel_values=given.pixel_values, image_sizes=given.image_sizes, labels=given.labels)
    logits = output.logits[0, case["positions"]]
    torch.testing.assert_close(logits, golden_arrays[f"model/{name}/logits"], atol=2e-5, rtol=0)
    assert output.loss.item() == pytest.approx(case["loss"], abs=1e-5)

    output.loss.backward()
    norms = {key: p.grad.double().norm().item() for key, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == case["grad_norms"].keys()
    for key, expected in case["grad_norms"].items():
        if key.endswith("k_proj.bias"):
            # Adding one vector to every key adds one number to a query's every score, which softmax ignores: this
            # gradient is zero but for rounding, and rounding has no relative accuracy. Both are below 1e-9, a
            # hundred thousand times below the smallest real one.
            assert max(norms[key], expected) < 1e-8, key
        else:
            assert norms[key] == pytest.approx(expected, rel=1e-3), key


def test_every_case_is_covered(golden_cases: dict[str, Any]) -> None:
    assert tuple(case["name"] for case in golden_cases["model"]) == NAMES


def test_a_mask_of_ones_changes_nothing(load_golden: Any, sample: Any) -> None:
    """1e-6: another SDPA kernel may run, on the same numbers."""
    given = sample("model", "one_image")
    model = load_golden()
    with torch.no_grad():
        plain = model(given.input_ids, pixel_values=given.pixel_values, image_sizes=given.image_sizes).logits
        masked = model(**given.inputs()).logits
    torch.testing.assert_close(masked, plain, atol=5e-6, rtol=0)


def test_attention_backends_agree(load_golden: Any, sample: Any) -> None:
    """Eager is what the reference ran; 2e-5 as for the reference itself."""
    given = sample("model", "two_images").inputs()
    with torch.no_grad():
        sdpa = load_golden()(**given).logits
        eager = load_golden(attn_implementation="eager")(**given).logits
    torch.testing.assert_close(eager, sdpa, atol=2e-5, rtol=0)


def test_logits_to_keep(load_golden: Any, sample: Any) -> None:
    """1e-6: the head's matrix product over fewer rows may be blocked differently."""
    given = sample("text").inputs()
    model = load_golden()
    with torch.no_grad():
        full = model(**given).logits
        last = model(**given, logits_to_keep=1).logits
        none = model(**given, logits_to_keep=None, labels=given["input_ids"])
    assert last.shape == (1, 1, model.config.vocab_size)
    torch.testing.assert_close(last, full[:, -1:], atol=1e-6, rtol=0)
    assert none.logits is None
    assert none.loss.isfinite()


def test_gradient_checkpointing_changes_nothing(load_golden: Any, sample: Any) -> None:
    """The same operations run twice, so only the order of accumulation could differ: 1e-6 of the largest entry."""
    given = sample("model", "one_image")

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = load_golden().train()  # every dropout of the checkpoint is 0
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**given.inputs(), labels=given.labels).loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, atol=1e-6 * float(gradient.abs().max()) + 1e-12, rtol=0)
