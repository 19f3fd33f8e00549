"""What of the vision part runs, what never does, and how crops are laid out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_inputs import pad_batch

from phi3v.model.vision import merge_patches, real_crops
from phi3v.processing.hd_transform import CROP_SIZE, cut_flat_pages, flatten_pages, num_distinct_crops

TOWER = "model.vision_embed_tokens.img_processor.vision_model"


def test_padded_crops_never_run(load_golden: Any, sample: Any) -> None:
    """300x900 has 3 of 4 crops, 640x480 and 1275x1650 have 4 (of 16 where the batch is padded to 17)."""
    model = load_golden()
    entered: list[int] = []
    tower = model.model.vision_embed_tokens.img_processor
    tower.vision_model.embeddings.register_forward_pre_hook(lambda _, args: entered.append(args[0].shape[0]))
    given = pad_batch([sample("model", "two_images"), sample("model", "tall_and_wide_16")], "right")
    real = [1 + int(size.prod()) // CROP_SIZE**2 for size in given["image_sizes"]]
    assert given["pixel_values"].shape[:2] == (4, 17)
    assert real[:2] == [4, 5]
    with torch.no_grad():
        model(**given)
    assert entered == [sum(real)]
    assert sum(real) < 4 * 17


def test_values_of_padded_crops_do_not_matter(load_golden: Any, sample: Any) -> None:
    """Even NaN: they are never read."""
    model = load_golden()
    given = sample("model", "two_images").inputs()
    with torch.no_grad():
        clean = model(**given).logits
        given["pixel_values"] = given["pixel_values"].clone()
        given["pixel_values"][0, 4:] = float("nan")
        assert torch.equal(model(**given).logits, clean)


def test_a_page_that_is_its_own_global_view_runs_once(load_golden: Any) -> None:
    """The other page of 336 x 336 differs from its global view, as no processor makes it, and runs twice."""
    vision = load_golden().model.vision_embed_tokens
    entered: list[int] = []
    vision.img_processor.vision_model.embeddings.register_forward_pre_hook(
        lambda _, args: entered.append(args[0].shape[0])
    )
    same, other = torch.randn(2, 3, CROP_SIZE, CROP_SIZE, generator=torch.manual_seed(1))
    pixel_values = torch.stack([torch.stack([same, same]), torch.stack([other, same])])
    sizes = [(CROP_SIZE, CROP_SIZE)] * 2
    with torch.no_grad():
        given, counts = real_crops(pixel_values, sizes)
        together = vision(given, sizes, counts)
        assert entered == [3]
        crops = vision.img_processor(same[None])
    page, glb = together[:156], together[157 : 157 + 156]
    assert torch.equal(page, glb)
    with torch.no_grad():
        rows = vision._rows_with_ends(merge_patches(crops, 1, 1))
        # Sums are taken in another order for another number of rows.
        torch.testing.assert_close(page, vision.img_projection(rows), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[313 : 313 + 156], together[313 + 157 :])


def test_last_layer_and_final_norm_never_run(load_golden: Any, sample: Any) -> None:
    model = load_golden()
    vision = model.model.vision_embed_tokens.img_processor.vision_model
    ran: list[str] = []
    watched = {f"layer {i}": layer for i, layer in enumerate(vision.encoder.layers)}
    watched["post_layernorm"] = vision.post_layernorm
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        model(**sample("model", "one_image").inputs())
    assert ran == ["layer 0", "layer 1", "layer 2"]
    assert len(vision.encoder.layers) == 4


def test_unused_parameters_are_exactly_those_without_gradient(load_golden: Any, sample: Any) -> None:
    model = load_golden()
    unused = dict(model.unused_parameters())
    expected = {name for name, _ in model.named_parameters() if name.startswith(f"{TOWER}.encoder.layers.3.")}
    assert len(expected) == 16
    expected |= {f"{TOWER}.post_layernorm.weight", f"{TOWER}.post_layernorm.bias"}
    assert unused.keys() == expected
    given = sample("model", "one_image")
    model(**given.inputs(), labels=given.labels).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == unused.keys()
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in unused.items())


def test_merge_keeps_neighbours_and_reading_order() -> None:
    """Each patch carries its own coordinates on the page: 2x2 neighbours must meet, rows first."""
    rows, columns = 2, 3
    y, x = torch.meshgrid(torch.arange(rows * 24), torch.arange(columns * 24), indexing="ij")
    page = torch.stack([y, x], -1).float()  # [48, 72, 2]
    crops = page.view(rows, 24, columns, 24, 2).permute(0, 2, 1, 3, 4).reshape(rows * columns, 576, 2)
    merged = merge_patches(crops, rows, columns)
    assert merged.shape == (24, 36, 8)
    for i, j in ((0, 0), (11, 12), (12, 11), (23, 35)):
        expected = [[2 * i, 2 * j], [2 * i, 2 * j + 1], [2 * i + 1, 2 * j], [2 * i + 1, 2 * j + 1]]
        assert merged[i, j].view(4, 2).tolist() == expected


@pytest.mark.parametrize("size", [(336, 336), (336, 1008), (672, 336)])
def test_number_of_features(size: tuple[int, int], load_golden: Any) -> None:
    rows, columns = size[0] // 336, size[1] // 336
    vision = load_golden().model.vision_embed_tokens
    with torch.no_grad():
        features = vision(torch.zeros(num_distinct_crops(rows, columns), 3, 336, 336), [size])
    assert features.shape == ((rows * columns + 1) * 144 + 1 + (rows + 1) * 12, 64)


def test_text_only_training_batch_gives_zero_gradients_to_the_vision_part(load_golden: Any, sample: Any) -> None:
    """Zero, not None: ranks of one step must reduce the same tensors. And exactly the tensors an image batch has."""
    model = load_golden().train()
    given = sample("text").inputs()
    loss = model(**given, labels=given["input_ids"]).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient is None} == dict(model.unused_parameters()).keys()
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        assert gradient.isfinite().all(), name
        assert gradient.any() == ("vision_embed_tokens" not in name), name
    model.eval()
    with torch.no_grad():  # and the loss is the one without the detour
        assert model(**given, labels=given["input_ids"]).loss.item() == pytest.approx(loss.item(), abs=1e-6)


def test_text_only_batch_runs_no_tower_where_it_is_frozen(load_golden: Any, sample: Any) -> None:
    model = load_golden().train()
    model.model.vision_embed_tokens.requires_grad_(False)
    ran: list[int] = []
    model.model.vision_embed_tokens.register_forward_hook(lambda *_: ran.append(1))
    given = sample("text").inputs()
    model(**given, labels=given["input_ids"]).loss.backward()
    assert not ran
    assert all(p.grad is None for p in model.model.vision_embed_tokens.parameters())


def test_mixed_batch_trains_both(load_golden: Any, sample: Any) -> None:
    """A text-only row beside one with an image: no NaN, and every used tensor has a gradient."""
    model = load_golden().train()
    given = pad_batch([sample("text"), sample("model", "one_image")], "right")
    labels = given["input_ids"].masked_fill((given["attention_mask"] == 0) | (given["input_ids"] < 0), -100)
    model(**given, labels=labels).loss.backward()
    unused = dict(model.unused_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in unused), name
        assert parameter.grad is None or (parameter.grad.isfinite().all() and parameter.grad.any()), name


def test_a_page_of_one_crop_is_looked_at_once(load_golden: Any) -> None:
    """Its global view is that crop again: known of a uint8 page by its size, and seen in ``pixel_values``.

    Where they differ, as they may in a caller's tensors, both are computed. 1e-6: the same products for one crop as
    for two.
    """
    from PIL import Image

    from phi3v import Phi3VImageProcessor

    model = load_golden().model.vision_embed_tokens
    entered: list[int] = []
    embeddings = model.img_processor.vision_model.embeddings
    embeddings.register_forward_pre_hook(lambda _, args: entered.append(args[0].shape[0]))
    picture = Image.linear_gradient("L").convert("RGB")
    processor = Phi3VImageProcessor(num_crops=1)
    pixel_values = processor([picture])["pixel_values"]
    other = pixel_values.clone()
    other[0, 0, 0, 0, 0] += 1e-3
    size = [(CROP_SIZE, CROP_SIZE)]
    with torch.no_grad():
        of_page = model(cut_flat_pages(flatten_pages([processor.page(picture)]), size), size)
        crops, counts = real_crops(pixel_values, size)
        once = model(crops, size, counts)
        crops, counts = real_crops(other, size)
        twice = model(crops, size, counts)
    assert entered == [1, 1, 2]
    assert torch.equal(of_page, once)
    torch.testing.assert_close(once[:156], twice[:156], atol=1e-6, rtol=1e-6)  # the page, not its global view
