"""A sample's logits do not depend on its neighbours, on padding, or on which side the padding is.

Tolerance 2e-5, as for the reference numbers: padding changes the shape of matrix products and the SDPA kernel, hence
the order of float32 sums, and nothing else.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_inputs import Sample, pad_batch

TOLERANCE = 2e-5


def check_each_row_is_as_alone(model: Any, samples: list[Sample], side: str) -> None:
    given = pad_batch(samples, side)
    with torch.no_grad():
        together = model(**given).logits
        for row, alone in enumerate(samples):
            own = given["attention_mask"][row].bool()
            torch.testing.assert_close(
                together[row][own],
                model(**alone.inputs()).logits[0],
                atol=TOLERANCE,
                rtol=0,
                msg=lambda text, row=row: f"row {row}, padded {side}: {text}",
            )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(side: str, load_golden: Any, sample: Any) -> None:
    """Lengths of 789, 37, 1421 and 21, one image, none, two, none."""
    one, two = sample("model", "one_image"), sample("model", "two_images")
    short = Sample(one.input_ids[:, -21:])
    assert short.input_ids.min() >= 0
    check_each_row_is_as_alone(load_golden(), [one, sample("text"), two, short], side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_images_with_other_numbers_of_padded_crops(side: str, load_golden: Any, sample: Any) -> None:
    """Two samples of num_crops 4 and 16: the first is zero-padded to 17 crops."""
    check_each_row_is_as_alone(load_golden(), [sample("model", "one_image"), sample("model", "tall_and_wide_16")], side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rope_factors_are_chosen_by_sample(side: str, load_golden: Any, sample: Any) -> None:
    """The switch at 800 lies between the samples' lengths (789, 805, 1421): a long neighbour changes no short one.

    The official code would give the first row the long factors here, from the largest position of the batch.
    """
    samples = [sample("model", "one_image"), sample("model", "long_rope"), sample("model", "two_images")]
    assert [s.length for s in samples] == [789, 805, 1421]
    check_each_row_is_as_alone(load_golden(original_max_position_embeddings=800), samples, side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_rows_equal_the_reference(
    side: str, golden_cases: dict[str, Any], golden_arrays: dict[str, torch.Tensor], load_golden: Any, sample: Any
) -> None:
    """Not only equal to ourselves alone: the reference's own logits, out of one padded batch."""
    names = ("one_image", "two_images")
    given = pad_batch([sample("model", name) for name in names], side)
    with torch.no_grad():
        logits = load_golden()(**given).logits
    for row, name in enumerate(names):
        (case,) = [c for c in golden_cases["model"] if c["name"] == name]
        own = logits[row][given["attention_mask"][row].bool()][case["positions"]]
        torch.testing.assert_close(own, golden_arrays[f"model/{name}/logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_of_a_batch_are_those_of_its_rows(side: str, load_golden: Any, sample: Any) -> None:
    """With one normaliser for all. 1e-5 of the largest entry of a gradient: float32 sums of thousands of terms."""
    samples = [sample("model", "one_image"), sample("model", "two_images")]
    total = float(sum((s.labels[:, 1:] != -100).sum() for s in samples))

    def run(batches: list[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
        model = load_golden()
        loss = 0.0
        for given, labels in batches:
            part = model(**given, labels=labels, loss_normalizer=total).loss
            part.backward()
            loss += part.item()
        return loss, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    given = pad_batch(samples, side)
    labels = torch.full_like(given["input_ids"], -100)
    for row, one in enumerate(samples):
        labels[row, given["attention_mask"][row].bool()] = one.labels[0]
    loss, gradients = run([(given, labels)])
    loss_alone, gradients_alone = run([(s.inputs(), s.labels) for s in samples])
    assert loss == pytest.approx(loss_alone, abs=1e-5)
    assert gradients.keys() == gradients_alone.keys()
    for key, alone in gradients_alone.items():
        # + 1e-8 for k_proj.bias, whose gradient is zero but for rounding.
        torch.testing.assert_close(gradients[key], alone, atol=1e-5 * float(alone.abs().max()) + 1e-8, rtol=0)


def test_text_runs_the_vision_part_where_ranks_gather_its_weights(load_golden: Any, sample: Any) -> None:
    """In training also without gradients, as for KTO's estimate: another rank's row may have an image."""
    model, inputs, calls = load_golden(), sample("text").inputs(), []
    model.model.vision_embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    for gathers, trains, expected in ((False, True, 0), (True, False, 0), (True, True, 1)):
        model.model.always_runs_vision = gathers
        with torch.no_grad():
            model.train(trains)(**inputs)
        assert len(calls) == expected
