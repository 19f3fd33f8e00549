"""Records in our format, and the same in TRL's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL reports the use of its trainers

import pytest
from datasets import Dataset
from PIL import Image, ImageDraw
from trl_records import COLOURS, RECORDS, SIZES

from phi3v import Phi3VProcessor
from phi3v.data.table import RecordTable, open_table


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records in our format."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    for colour, size in zip(COLOURS, SIZES, strict=True):
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).ellipse((20, 20, size[0] - 20, size[1] - 20), fill=colour)
        image.save(folder / "images" / f"{colour}.png")
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return file


@pytest.fixture(scope="session")
def table(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RecordTable:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHI3V_CACHE", str(tmp_path_factory.mktemp("cache")))
        return open_table(data_file, progress=False)


@pytest.fixture(scope="session")
def as_messages(data_file: Path) -> Dataset:
    """The records as TRL's conversations, with a column of images."""
    rows = []
    for record in RECORDS:
        messages, images = [], []
        if "system" in record:
            messages.append({"role": "system", "content": [{"type": "text", "text": record["system"]}]})
        for each in record["conversations"]:
            images += [Image.open(data_file.parent / "images" / name) for name in each["images"]]
            blocks = [{"type": "image"}] * len(each["images"]) + [{"type": "text", "text": each["user"]}]
            messages.append({"role": "user", "content": blocks})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": each["assistant"]}]})
        rows.append({"messages": messages, "images": images})
    return Dataset.from_list(rows)


@pytest.fixture(scope="session")
def model_dir(small_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that cuts images into few crops. Read only."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(small_model_dir, folder)
    Phi3VProcessor.from_pretrained(folder, num_crops=2).save_pretrained(folder)
    return folder
