"""What is read of a dataset: exact tokens and crops, without decoding a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from phi3v.config import DataConfig
from phi3v.data.rows import RowDataset
from phi3v.data.table import open_table
from phi3v.errors import UserError
from phi3v.plan.workload import CANDIDATE_CROPS, Workload, assumed_workload, read_workload
from phi3v.processing.hd_transform import page_geometry
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.compute.activations import MicroBatch

SIZES = {"page.png": (1275, 1650), "small.png": (64, 64), "wide.png": (2000, 250), "photo.png": (640, 480)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("workload")
    (root / "images").mkdir()
    for name, size in SIZES.items():
        Image.new("L", size, 200).save(root / "images" / name)
    return root


def write(folder: Path, records: list[list[tuple[list[str], str, str]]], name: str = "data.jsonl") -> Path:
    lines = [
        {
            "id": str(k),
            "conversations": [{"images": i, "user": u, "assistant": a} for i, u, a in turns],
        }
        for k, turns in enumerate(records)
    ]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


def read(path: Path, processor: Phi3VProcessor | None) -> Workload:
    return read_workload(DataConfig(train=str(path)), processor, progress=False)


def test_tokens_and_crops_are_those_of_the_samples(folder: Path, tiny_model_dir: Path) -> None:
    """Against the samples that training makes, at several `num_crops`."""
    path = write(
        folder,
        [
            [(["page.png"], "what is the total?", "12")],
            [(["small.png", "wide.png"], "same?", "no"), ([], "why?", "the width")],
            [([], "no picture at all", "none")],
            [(["photo.png"], "what?", "a photograph of nothing"), (["small.png"], "and this?", "nothing")],
        ],
    )
    turns = [
        {"user": "A , B : same?", "assistant": "no", "images": ["page.png", "small.png"], "image_offsets": [2, 6]},
        {"user": "why?", "assistant": "a guess", "weight": 0},
    ]
    with path.open("a") as file:
        file.write(json.dumps({"id": "told", "system": "Be brief.", "conversations": turns}) + "\n")
    workload = read(path, Phi3VProcessor.from_pretrained(tiny_model_dir))
    for num_crops in (1, 4, 16):
        processor = Phi3VProcessor.from_pretrained(tiny_model_dir, num_crops=num_crops)
        dataset = RowDataset(open_table(path), processor)
        samples = [dataset.samples((index,))[0] for index in range(len(dataset))]
        choice = workload.at(num_crops)
        assert choice.tokens.tolist() == [len(sample.input_ids) for sample in samples]
        # A page of one crop is its own global view and is computed once.
        grids = [[(page.size[0] // 336, page.size[1] // 336) for page in sample.pages] for sample in samples]
        assert choice.lengths.crops.tolist() == [
            sum(1 + rows * columns if rows * columns > 1 else 1 for rows, columns in grid) for grid in grids
        ]
        assert choice.lengths.targets.tolist() == [sum(label != -100 for label in s.labels) for s in samples]
        assert sum(choice.histogram().values()) == len(samples)
    largest = MicroBatch.largest_of(workload.at(16).lengths, 2)
    assert largest.rows == 2
    assert largest.tokens == 2 * int(workload.at(16).tokens.max())


def test_without_a_tokenizer_texts_are_estimated(folder: Path) -> None:
    path = write(folder, [[(["small.png"], "a question of some forty characters here", "yes")]], "estimate.jsonl")
    workload = read(path, None)
    assert 10 < int(workload.lengths.text[0]) < 40
    assert "4 characters a token" in workload.basis
    line = json.loads(path.read_text())
    line["system"] = "Answer the question as briefly as you can."
    path.write_text(json.dumps(line))
    told = read(path, None)
    assert 10 <= int(told.lengths.text[0] - workload.lengths.text[0]) <= 11
    assert int(told.lengths.prefixes[0] - workload.lengths.prefixes[0]) == 10


def test_num_crops_that_keeps_the_detail_and_no_more(folder: Path) -> None:
    small = read(write(folder, [[(["small.png"], "a", "b")]] * 20, "small.jsonl"), None)
    assert small.recommended_crops(16)[0] == 1
    pages = read(write(folder, [[(["page.png"], "a", "b")]] * 20, "pages.jsonl"), None)
    crops, reason = pages.recommended_crops(16)
    assert crops == 16
    assert "more detail than 16" in reason
    many = read(write(folder, [[(["page.png"] * 8, "a", "b")]] * 5, "many.jsonl"), None)
    crops, reason = many.recommended_crops(16)
    assert many.at(crops).share_long == 0
    assert crops in CANDIDATE_CROPS
    assert "4096" in reason
    assert assumed_workload().recommended_crops(16)[0] == 16


def test_blank_and_padding_crops_are_counted(folder: Path) -> None:
    wide = read(write(folder, [[(["wide.png"], "a", "b")]], "wide.jsonl"), None)
    choice = wide.at(16)
    assert choice.lengths.crops.tolist() == [1 + 16 - int(choice.padding_crops)]
    page = read(write(folder, [[(["page.png"], "a", "b")]], "page.jsonl"), None)
    width, height = page_geometry(1275, 1650, 16).resized
    assert page.at(16).blank == pytest.approx(1 - width * height / (16 * 336 * 336))
    assert choice.summary()["share_over_4096"] == 0


def test_records_that_share_a_picture(folder: Path) -> None:
    path = write(folder, [[(["page.png"], f"question {k}", "b")] for k in range(4)], "shared.jsonl")
    assert read(path, None).shared_image_factor == 4
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["system"] = f"Answer in {number % 2 + 1} words."
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read(path, None).shared_image_factor == 2


def test_a_missing_picture_is_named_with_its_line(folder: Path) -> None:
    path = write(folder, [[(["small.png"], "a", "b")], [(["gone.png"], "a", "b")]], "gone.jsonl")
    with pytest.raises(UserError) as caught:
        read(path, None)
    assert f"{path}:2" in str(caught.value)


def test_forty_thousand_records_of_few_pictures(folder: Path, tiny_model_dir: Path) -> None:
    """DocVQA's size; every record counts."""
    names = list(SIZES)
    records = [[([names[k % 4]], f"what is the number of item {k}?", str(k))] for k in range(40_000)]
    path = write(folder, records, "forty.jsonl")
    workload = read(path, Phi3VProcessor.from_pretrained(tiny_model_dir))
    assert len(workload) == 40_000
    assert workload.lengths.images.max() == 1
    assert sum(workload.at(16).histogram().values()) == 40_000
