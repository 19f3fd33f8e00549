from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sample_files import tree

from phi3v.data import image_folder
from phi3v.data.check import check_file
from phi3v.data.convert import BadUnitsError, ConversionResult, ConvertOptions
from phi3v.data.sources import SOURCES
from phi3v.data.table import open_table
from phi3v.errors import UserError


def convert_easy_vqa(out: Path, source: Path | None = None) -> ConversionResult:
    return SOURCES["easy-vqa"](ConvertOptions(out, None if source is None else str(source), workers=1))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("easy-vqa")
    result = convert_easy_vqa(out)
    assert result.files == {"train": out / "train.jsonl", "test": out / "test.jsonl"}
    assert (result.records, result.images) == ({"train": 4_000, "test": 9_673}, 5_000)
    return out


@pytest.fixture
def small_source(tmp_path: Path, easy_vqa_data: Path) -> Path:
    """The package's data, of 12 and 3 images."""
    folder = tmp_path / "source"
    for split, count in (("train", 12), ("test", 3)):
        (folder / split / "images").mkdir(parents=True)
        questions = json.loads((easy_vqa_data / split / "questions.json").read_text())
        kept = [question for question in questions if question[2] < count]
        (folder / split / "questions.json").write_text(json.dumps(kept))
        for image in range(count):
            shutil.copy(easy_vqa_data / split / "images" / f"{image}.png", folder / split / "images")
    return folder


def test_the_splits_are_the_packages_own(converted: Path) -> None:
    import easy_vqa

    for split, read, records in (
        ("train", easy_vqa.get_train_questions, 4_000),
        ("test", easy_vqa.get_test_questions, 9_673),
    ):
        table = open_table(converted / f"{split}.jsonl")
        assert len(table) == records
        questions = []
        for record in table:
            image = int(record.id.split("-")[1])
            assert record.source == "easy-vqa"
            assert [turn.images for turn in record.turns] == [(f"{split}/{image}.png",)] + [()] * (
                len(record.turns) - 1
            )
            questions += [(turn.user, turn.assistant, image) for turn in record.turns]
        expected = sorted(zip(*read(), strict=True), key=lambda question: question[2])  # stable: order in the file
        assert questions == expected
    assert sum(open_table(converted / f"{split}.jsonl").questions().shape[0] for split in ("train", "test")) == 48_248


def test_ids_are_those_of_image_and_question(converted: Path) -> None:
    table = open_table(converted / "test.jsonl")
    of_twelfth = [record.id for record in table if record.turns[0].images == ("test/12.png",)]
    assert of_twelfth == [f"test-000012-{k:02d}" for k in range(len(of_twelfth))]
    assert open_table(converted / "train.jsonl")[12].id == "train-000012"


def test_the_images_are_the_packages_own_and_all_pass_the_check(converted: Path, easy_vqa_data: Path) -> None:
    for split, images, turns in (("train", 4_000, 38_575), ("test", 1_000, 9_673)):
        for image in (0, 7, images - 1):
            copy = converted / "images" / split / f"{image}.png"
            assert copy.read_bytes() == (easy_vqa_data / split / "images" / f"{image}.png").read_bytes()
        report = check_file(converted / f"{split}.jsonl")
        assert report.ok
        assert (report.images, report.turns) == (images, turns)


def test_running_it_again_changes_nothing_and_copies_nothing(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_easy_vqa(tmp_path / "out", source=small_source)
    before = tree(tmp_path / "out")

    def fail(*_: object) -> None:
        raise AssertionError("copied again")

    monkeypatch.setattr(image_folder, "replacing", fail)
    assert convert_easy_vqa(tmp_path / "out", source=small_source).images_kept == 15
    assert tree(tmp_path / "out") == before


def test_an_interrupted_run_is_finished_by_the_next(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_easy_vqa(tmp_path / "whole", source=small_source)
    out = tmp_path / "out"
    made: list[Any] = []
    real = image_folder.decode_image

    def decode(data: bytes, *args: Any, **options: Any) -> Any:
        made.append(data)
        if len(made) == 6:
            raise KeyboardInterrupt
        return real(data, *args, **options)

    monkeypatch.setattr(image_folder, "decode_image", decode)
    with pytest.raises(KeyboardInterrupt):
        convert_easy_vqa(out, source=small_source)
    assert not list(out.glob("*.jsonl"))
    before = len(tree(out))
    assert 5 <= before < 15
    assert convert_easy_vqa(out, source=small_source).images_kept == before
    assert tree(out) == tree(tmp_path / "whole")


def test_other_data_is_not_overwritten(small_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_easy_vqa(out, source=small_source)
    (out / "test.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"test.jsonl: exists with other content"):
        convert_easy_vqa(out, source=small_source)
    (out / "images" / "train" / "3.png").write_bytes(b"other")
    with pytest.raises(UserError, match=r"3.png: exists with other content"):
        convert_easy_vqa(out, source=small_source)


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(UserError, match="not installed") as caught:
        convert_easy_vqa(tmp_path / "out")
    assert 'pip install "phi3v[easy-vqa]"' in str(caught.value)


def test_a_source_that_is_incomplete(small_source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file") as caught:
        convert_easy_vqa(tmp_path / "out", source=tmp_path)
    assert "train/questions.json" in str(caught.value)
    (small_source / "train" / "images" / "4.png").unlink()
    with pytest.raises(BadUnitsError, match=r"4.png: the image does not exist"):
        convert_easy_vqa(tmp_path / "out", source=small_source)
    (small_source / "test" / "questions.json").write_text("[[1, 2]]")
    with pytest.raises(UserError, match="cannot be read"):
        convert_easy_vqa(tmp_path / "out", source=small_source)


def test_looking_up_names_imports_no_converter() -> None:
    script = "import sys, phi3v.data.sources; sys.exit('phi3v.data.sources.easy_vqa' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
