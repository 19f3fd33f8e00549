"""One optimizer step gives the same gradients however its samples are split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from one_step import assert_same, one_step
from ranks import run_ranks
from safetensors.torch import load_file


def gradients(
    out: Path, model: Path, data: Path, *, micro: int, weighting: str, ranks: int = 1, packing: str = "none"
) -> dict[str, Any]:
    """Take one step in processes of its own and return its gradients."""
    folder = out.with_name(f"{out.name}-printed")
    run_ranks(ranks, one_step, model, data, out, micro, weighting, packing, folder=folder)
    return load_file(out)


@pytest.fixture(scope="module")
def uneven(easy_vqa: Path) -> Path:
    """Four records whose answers have very different lengths, one of them without a picture."""
    lines = [json.loads(line) for line in (easy_vqa / "train.jsonl").read_text().splitlines()[:4]]
    for index, record in enumerate(lines):
        record["conversations"] = record["conversations"][: 1 + 2 * index]
    lines[0]["conversations"][0]["assistant"] = "a blue rectangle on a white ground, and nothing else at all"
    lines[2]["conversations"][0]["images"] = []
    path = easy_vqa / "uneven.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("weighting", ["sample", "token"])
def test_every_split_gives_the_same_gradients(
    tmp_path: Path, small_model_dir: Path, uneven: Path, weighting: str
) -> None:
    """1x4, 2x2 and 4x1 (micro-batch x accumulation) on one rank, and 1x2 on each of two."""
    reference = gradients(tmp_path / "4x1", small_model_dir, uneven, micro=4, weighting=weighting)
    assert float(reference["total"]) > 0.1
    for micro, ranks in ((1, 1), (2, 1), (1, 2)):
        out = tmp_path / f"{micro}-{ranks}"
        other = gradients(out, small_model_dir, uneven, micro=micro, weighting=weighting, ranks=ranks)
        assert_same(other, reference, f"micro-batch {micro} on {ranks} ranks")


def test_packed_rows_on_two_ranks_give_the_same_gradients(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path
) -> None:
    """Four records, three of them about one page, on ranks that have different numbers of rows."""
    lines = [json.loads(line) for line in (easy_vqa / "test.jsonl").read_text().splitlines()[:60]]
    pages = list(dict.fromkeys(line["conversations"][0]["images"][0] for line in lines))
    chosen = [line for line in lines if line["conversations"][0]["images"][0] == pages[0]][:3]
    chosen.append(next(line for line in lines if line["conversations"][0]["images"][0] == pages[1]))
    chosen[1]["conversations"][0]["assistant"] = "a blue rectangle on a white ground, and nothing else at all"
    data = tmp_path / "four.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in chosen))
    (tmp_path / "images").symlink_to(easy_vqa / "images")
    reference = gradients(tmp_path / "apart", small_model_dir, data, micro=4, weighting="sample")
    packed = gradients(
        tmp_path / "packed", small_model_dir, data, micro=1, weighting="sample", ranks=2, packing="shared-image"
    )
    assert_same(packed, reference, "shared pages on two ranks")


def test_the_weightings_differ_and_mean_what_they_say(tmp_path: Path, small_model_dir: Path, uneven: Path) -> None:
    """``sample`` is the mean of each record's own mean loss, ``token`` the mean over all answer tokens."""
    from phi3v.data.collate import Collator
    from phi3v.data.rows import RowDataset
    from phi3v.data.table import open_table
    from phi3v.model.modeling import Phi3VForCausalLM
    from phi3v.processing.processor import Phi3VProcessor

    processor = Phi3VProcessor.from_pretrained(small_model_dir)
    dataset = RowDataset(open_table(uneven), processor)
    model = Phi3VForCausalLM.from_pretrained(small_model_dir).eval()
    collate = Collator(processor.tokenizer.pad_token_id)
    means, tokens = [], []
    for index in range(4):
        inputs = collate([dataset.samples((index,))[0]])
        del inputs["counts"], inputs["loss_weights"]
        with torch.no_grad():
            means.append(model(**inputs).loss.item())
        tokens.append(int((inputs["labels"] != -100).sum()))
    by_sample = sum(means) / 4
    by_token = sum(mean * count for mean, count in zip(means, tokens, strict=True)) / sum(tokens)
    assert abs(by_sample - by_token) > 1e-4  # far above the tolerance below
    for weighting, expected in (("sample", by_sample), ("token", by_token)):
        got = gradients(tmp_path / weighting, small_model_dir, uneven, micro=2, weighting=weighting)
        assert float(got["loss"]) == pytest.approx(expected, abs=1e-5)  # float32 means of values near 6
