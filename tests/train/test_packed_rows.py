"""A record's loss and gradients do not depend on how it is packed.

One step over the same records, four ways: each alone, one padded batch, packed rows, rows with shared pages. The model
is the tiny one with LongRoPE's switch moved to where some of the records lie on each side of it; one test has a record
beyond the real switch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.data.batches import BatchPlan, RowPlan
from phi3v.data.collate import Collator, LossWeighting
from phi3v.data.lengths import measure_table
from phi3v.data.rows import RowDataset
from phi3v.data.table import RecordTable, open_table
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.compute.checkpointing import apply_checkpointing

# Of the loss and of the whole gradient as one vector: float32 (resolution 1.2e-7) sums in another order.
TOLERANCE = 1e-6
# Of a tensor by itself, relative to its largest entry: deep in the vision tower the sums go over every token behind,
# and a padded batch already differs from records alone by 3e-6 there.
TENSOR_TOLERANCE = 1e-5
SWITCH = 345  # tokens; the pages of easy-vqa have 313 tokens, with question and answer 330 to 350


@pytest.fixture(scope="module")
def records(easy_vqa: Path) -> Path:
    """Three questions of a page, four of another, a conversation, one without a picture, one longer than the switch."""
    lines = [json.loads(line) for line in (easy_vqa / "test.jsonl").read_text().splitlines()[:60]]
    pages: dict[str, list[Any]] = {}
    for line in lines:
        pages.setdefault(line["conversations"][0]["images"][0], []).append(line)
    first, second, third, *_ = pages.values()
    chosen = [*first[:3], *second[:4], third[0], third[1]]
    chosen[0]["conversations"][0]["assistant"] = "a blue rectangle on a white ground, and nothing else"
    chosen[4]["conversations"][0]["user"] += " Look at it closely, take your time, and think of circles and triangles."
    chosen[7]["conversations"] += [{"user": "are you sure?", "assistant": "yes"}]
    chosen[8]["conversations"][0]["images"] = []
    path = easy_vqa / "packed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in chosen))
    return path


class Step:
    """The loss and all gradients of one step over all records of a file."""

    def __init__(self, model_dir: Path, file: Path, weighting: LossWeighting, **overrides: Any) -> None:
        self.processor = Phi3VProcessor.from_pretrained(model_dir)
        self.table: RecordTable = open_table(file)
        self.weighting = weighting
        self.collate = Collator(self.processor.tokenizer.pad_token_id, loss_weighting=weighting)
        self.dataset = RowDataset(self.table, self.processor)
        # SDPA for ordinary rows, its segments for packed ones.
        self.model = Phi3VForCausalLM.from_pretrained(model_dir, attn_implementation="packed_segments", **overrides)

    def batches(self, size: int) -> list[dict[str, Any]]:
        every = [self.dataset.samples((index,))[0] for index in range(len(self.dataset))]
        return [self.collate(every[start : start + size]) for start in range(0, len(every), size)]

    def rows(self, packing: Any, pack_tokens: int, backend: str = "packed_segments") -> list[dict[str, Any]]:
        self.model.set_attn_implementation(backend)
        num_crops = self.processor.image_processor.num_crops
        lengths = measure_table(self.table, self.processor).at(num_crops, self.model.config.long_context_start)
        count = len(self.table)
        plan = BatchPlan(lengths, packing, batch_size=count, pack_tokens=pack_tokens, shared_image_max=count)
        dataset = RowDataset(self.table, self.processor, self.weighting, packed=True)
        ((rows,),) = plan.steps(0)
        made = [dataset[RowPlan(row, ends_step=False)] for row in rows]
        assert all(row["counts"][3] <= pack_tokens or len(row["layout"]) == 1 for row in made)
        return [{name: value for name, value in row.items() if name != "ends_step"} for row in made]

    def run(self, batches: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
        self.model.zero_grad()
        self.model.train()  # as in training; nothing in it is random
        total, loss = sum(batch["counts"][0] for batch in batches), 0.0
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "counts"}
            part = self.model(**inputs, loss_normalizer=total, logits_to_keep=None, use_cache=False).loss
            part.backward()
            loss += part.item()
        return loss, {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def assert_same(
    got: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]], what: str
) -> None:
    assert got[0] == pytest.approx(expected[0], rel=TOLERANCE), what
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        # + 1e-8 for k_proj.bias, whose gradient is zero but for rounding.
        worst = float((got[1][name] - gradient).abs().max())
        assert worst <= TENSOR_TOLERANCE * float(gradient.abs().max()) + 1e-8, f"{what}, {name}: {worst}"
    difference = torch.stack([(got[1][name] - gradient).norm() for name, gradient in expected[1].items()]).norm()
    whole = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    assert float(difference) <= TOLERANCE * float(whole), f"{what}: {float(difference / whole)}"


@pytest.mark.parametrize("weighting", ["sample", "token"])
def test_every_packing_gives_the_same_gradients(small_model_dir: Path, records: Path, weighting: LossWeighting) -> None:
    step = Step(small_model_dir, records, weighting, original_max_position_embeddings=SWITCH)
    expected = step.run(step.batches(1))
    assert max(float(gradient.abs().max()) for gradient in expected[1].values()) > 0.1
    assert_same(step.run(step.batches(len(step.dataset))), expected, "padded batch")
    separate = sum(len(step.dataset.samples((index,))[0].input_ids) for index in range(len(step.dataset)))
    # All in one row; in several rows, for which groups are cut.
    for packing, pack_tokens in (("samples", 800), ("shared-image", 100_000), ("shared-image", 800)):
        rows = step.rows(packing, pack_tokens)
        assert (len(rows) == 1) == (pack_tokens == 100_000)
        tokens = sum(row["counts"][3] for row in rows)
        assert tokens == separate if packing == "samples" else tokens < separate
        assert_same(step.run(rows), expected, f"{packing}, rows of {pack_tokens}")
    assert_same(step.run(step.rows("shared-image", 100_000, "packed_mask")), expected, "the whole mask")
    apply_checkpointing(step.model, "selective")
    assert_same(step.run(step.rows("shared-image", 800)), expected, "recomputed")


def test_a_page_behind_other_text_is_another_page(small_model_dir: Path, records: Path) -> None:
    """System messages and texts before an image are part of what is shared; a turn of weight 0 is only read."""
    (line, *_) = (json.loads(line) for line in records.read_text().splitlines())
    image = line["conversations"][0]["images"]

    def turn(user: str, **keys: object) -> dict[str, object]:
        return {"images": image, "user": user, "assistant": "yes"} | keys

    made: list[tuple[str | None, list[dict[str, object]]]] = [
        (None, [turn("is it red?")]),
        ("Be brief.", [turn("is it red?")]),
        ("Be brief.", [turn("is it a circle?", assistant="a wrong guess", weight=0), turn("no?", images=[])]),
        ("Be exact.", [turn("is it red?")]),
        (None, [turn("see : is it red?", image_offsets=[4])]),
        (None, [turn("see : is it blue?", image_offsets=[4])]),
        (None, [turn("look at : is it red?", image_offsets=[8])]),
        (None, [turn("a  b  c", images=image * 2, image_offsets=[2, 5])]),
        (None, [turn("a  b  c", images=image * 2, image_offsets=[5, 5])]),
    ]
    lines = [
        {"id": str(k), "conversations": turns} | ({"system": system} if system else {})
        for k, (system, turns) in enumerate(made)
    ]
    path = records.with_name("prefixes.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    step = Step(small_model_dir, path, "sample", original_max_position_embeddings=SWITCH)
    expected = step.run(step.batches(1))
    assert_same(step.run(step.batches(len(made))), expected, "padded batch")
    for packing, groups in (("samples", 9), ("shared-image", 7)):
        (row,) = step.rows(packing, 100_000)
        assert len(row["layout"]) == groups
        assert row["counts"].questions == 9
        # What is planned with is what is computed.
        assert packing == "samples" or sum(1 for prefix, *_ in row["layout"] if prefix) == 2
        assert_same(step.run([row]), expected, packing)


def test_a_record_beyond_the_real_switch(small_model_dir: Path, records: Path) -> None:
    """Over 4096 tokens, beside short questions about the same page: each has the factors that it has alone."""
    short, other, long = (json.loads(line) for line in records.read_text().splitlines()[:3])
    long["conversations"][0]["user"] += " is it a circle?" * 800
    path = records.with_name("beyond.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in (short, long, other)))
    step = Step(small_model_dir, path, "sample")
    lengths = [len(step.dataset.samples((index,))[0].input_ids) for index in range(3)]
    assert lengths[0] < 400
    assert 4096 < lengths[1] < 6000
    expected = step.run(step.batches(1))
    assert_same(step.run(step.batches(3)), expected, "padded batch")
    for packing, groups in (("samples", 3), ("shared-image", 2)):
        (row,) = step.rows(packing, 8192)
        assert len(row["layout"]) == groups
        assert_same(step.run([row]), expected, packing)
