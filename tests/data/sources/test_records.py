from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from sample_files import image_bytes, records

from phi3v.data.convert import BadUnit, BadUnitsError, Conversion, ConvertOptions
from phi3v.data.image_folder import ImageFolder
from phi3v.data.sources.media import Medium
from phi3v.data.sources.records import RawRecord, RawTurn, RecordWriter


def write(
    out: Path, raws: list[RawRecord | BadUnit], special_text: Literal["refuse", "escape"] = "refuse", **options: Any
) -> list[dict[str, Any]]:
    with Conversion("toy", ConvertOptions(out, progress=False), special_text) as conversion:
        writer = RecordWriter(conversion, "toy", **options)
        conversion.write_split("train", [writer.unit("row 1", lambda: raws)], total=1)
        return records(conversion.result().files["train"])


def test_records_that_share_an_image_add_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added = []
    add = ImageFolder.add
    monkeypatch.setattr(ImageFolder, "add", lambda *args, **named: added.append(1) or add(*args, **named))
    image = Medium("image", data=image_bytes(0), stem="train/0")
    raws: list[RawRecord | BadUnit] = [RawRecord(f"{k}", (RawTurn("Q", "A", (image,)),)) for k in range(3)]
    found = write(tmp_path, raws)
    assert [record["conversations"][0]["images"] for record in found] == [["train/0.png"]] * 3
    assert added == [1]


def test_a_record_has_the_keys_that_say_something(tmp_path: Path) -> None:
    turns = (RawTurn("Q", "A"), RawTurn("R", "B", weight=0), RawTurn("S", "C", answers=("C", "D")))
    (found,) = write(tmp_path, [RawRecord("a", turns, system="Be brief.")])
    assert found == {
        "id": "a",
        "source": "toy",
        "system": "Be brief.",
        "conversations": [
            {"user": "Q", "assistant": "A"},
            {"user": "R", "assistant": "B", "weight": 0},
            {"user": "S", "assistant": "C", "answers": ["C", "D"]},
        ],
    }


def test_special_text_is_refused_or_escaped(tmp_path: Path) -> None:
    image = Medium("image", data=image_bytes(0))
    raw = RawRecord("a", (RawTurn("<|end|> and ", "A", (image,), places=(12,)),))
    with pytest.raises(BadUnitsError, match=r"row 1: conversations\[0\]\.user: holds text"):
        write(tmp_path / "refused", [raw])
    (found,) = write(tmp_path / "escaped", [raw], "escape", escape=True)
    (turn,) = found["conversations"]
    assert (turn["user"], turn["image_offsets"]) == ("< |end|> and ", [13])
