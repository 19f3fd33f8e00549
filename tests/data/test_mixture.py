"""Several data files as one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from phi3v.config import DataSource
from phi3v.data import mixture
from phi3v.data.image_store import FolderStore
from phi3v.data.lengths import Context, measure_table, require_context
from phi3v.data.mixture import MixtureTable, measure, mix_tables, open_sources, take_lengths
from phi3v.data.overlap import find_overlaps
from phi3v.data.table import open_table
from phi3v.errors import UserError
from phi3v.processing.processor import Phi3VProcessor


def record(name: str, image: str, *texts: str) -> dict[str, Any]:
    turns = [{"user": text, "assistant": "yes"} for text in texts]
    return {"id": name, "conversations": [{**turns[0], "images": [image]}, *turns[1:]]}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Three files in two folders: ``p.png`` is another page in each, ``q.png`` has the bytes of ``a.png``."""
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))
    lines = {
        "one/first": [record("a", "a.png", "A?"), record("p", "p.png", "P?", "and?")],
        "one/second": [record("a", "a.png", "again A?"), record("b", "b.png", "B?")],
        "two/third": [record("q", "q.png", "Q?"), record("p", "p.png", "P?"), record("q2", "q.png", "A?")],
    }
    for folder, images in {"one": ("a", "b", "p"), "two": ("p",)}.items():
        (tmp_path / folder / "images").mkdir(parents=True)
        for place, name in enumerate(images):
            width = 40 + 10 * place + 100 * (folder == "two")
            Image.new("RGB", (width, 30), (width, 0, 0)).save(tmp_path / folder / "images" / f"{name}.png")
    (tmp_path / "two/images/q.png").write_bytes((tmp_path / "one/images/a.png").read_bytes())
    for name, records in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return {Path(name).name: tmp_path / f"{name}.jsonl" for name in lines}


def mixed(files: dict[str, Path], **settings: Any) -> MixtureTable:
    return mix_tables([open_table(file) for file in files.values()], list(files), **settings)


def names(table: MixtureTable) -> list[str]:
    return [name for each in table for name in each.images]


def test_the_records_stand_one_source_after_the_other(files: dict[str, Path]) -> None:
    table = mixed(files)
    assert [each.id for each in table] == ["a", "p", "a", "b", "q", "p", "q2"]
    assert [table[index] for index in range(-7, 0)] == list(table) == table.records(0, 99)
    assert table.records(1, 5) == list(table)[1:5]
    assert [table.where(each) for each in table] == [
        f"{file}:{line}" for file, count in zip(files.values(), (2, 2, 3), strict=True) for line in range(1, count + 1)
    ]
    assert table.sources_of(np.arange(7)) == [0, 0, 1, 1, 2, 2, 2]
    assert table.as_written(4).images == ("q.png",)
    assert [each.images for each in table.all_as_written()][4:] == [("q.png",), ("p.png",), ("q.png",)]
    with pytest.raises(IndexError):
        table[7]
    questions = [[0, 0], [1, 0], [1, 1], *([index, 0] for index in range(2, 7))]
    assert table.questions().tolist() == questions
    assert table.turn_counts().tolist() == [1, 2, 1, 1, 1, 1, 1]


def test_an_image_is_one_image_whichever_file_names_it(files: dict[str, Path]) -> None:
    """The first two files have one folder; what the bytes say is looked at only if it is asked for."""
    assert names(mixed(files)) == ["0/a.png", "0/p.png", "0/a.png", "0/b.png", "2/q.png", "2/p.png", "2/q.png"]
    table = mixed(files, compare_images=True)
    assert names(table) == ["0/a.png", "0/p.png", "0/a.png", "0/b.png", "0/a.png", "2/p.png", "0/a.png"]
    distinct, used = table.distinct_images()
    assert [distinct[place] for place in used] == names(table)
    assert [table.image_sizes(each)[0][0] for each in table] == [40, 60, 40, 50, 40, 140, 40]
    assert [image.width for each in table for image in table.load_images(each)] == [40, 60, 40, 50, 40, 140, 40]


def test_what_was_compared_is_kept(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    mixed(files, compare_images=True)
    read = []
    sha256 = FolderStore.sha256
    monkeypatch.setattr(FolderStore, "sha256", lambda self, name: read.append(name) or sha256(self, name))
    assert "2/q.png" not in names(mixed(files, compare_images=True))
    assert read == []
    Image.new("RGB", (40, 30), (1, 2, 3)).save(files["third"].parent / "images" / "q.png")
    assert "2/q.png" in names(mixed(files, compare_images=True))


@pytest.mark.parametrize("compare", [False, True])
def test_lengths_are_those_of_the_sources(files: dict[str, Path], tiny_model_dir: Path, compare: bool) -> None:
    """Against the table measured as if it were one file: the same numbers, and the same records share a page."""
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir, num_crops=4)
    table = mixed(files, compare_images=compare)
    joined, whole = measure(table, processor).at(4), measure_table(table, processor).at(4)
    for name in ("tokens", "image_tokens", "targets", "crops", "prefix"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    same = joined.page[:, None] == joined.page
    np.testing.assert_array_equal(same, whole.page[:, None] == whole.page)
    assert np.flatnonzero(same[0]).tolist() == ([0, 2, 4, 6] if compare else [0, 2])
    prompts = [
        lengths.prompts_at(table.questions(), 4, 4096)
        for lengths in (measure(table, processor), measure_table(table, processor))
    ]
    for one, other in zip(prompts[0][:2], prompts[1][:2], strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(prompts[0][2][:, None] == prompts[0][2], prompts[1][2][:, None] == prompts[1][2])


def test_lengths_of_some_records(files: dict[str, Path], tiny_model_dir: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir, num_crops=4)
    lengths = measure(mixed(files), processor)
    chosen = np.array([6, 1, 1, 0])
    taken, whole = take_lengths(lengths, chosen).at(4), lengths.at(4)
    for name in ("tokens", "image_tokens", "targets", "crops", "prefix"):
        np.testing.assert_array_equal(getattr(taken, name), getattr(whole, name)[chosen])
    assert len(set(taken.page.tolist())) == 4, "what comes again is another page, as in the plan of training"


def test_errors_name_file_and_line_of_the_source(files: dict[str, Path]) -> None:
    table = mixed(files)
    (files["third"].parent / "images" / "p.png").write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        table.load_images(table[5])
    assert caught.value.where == f"{files['third']}:2: conversations[0].images[0]"
    assert caught.value.what.endswith("'p.png'"), "not as the mixture calls it"
    lengths = measure(mixed({name: files[name] for name in ("first", "second")}), None).at(4)
    with pytest.raises(UserError) as caught:
        require_context(mixed(files), Context(tokens=int(lengths.longest.min())), lengths)
    assert str(files["first"]) in str(caught.value.where)


def test_overlap_is_told_source_by_source(files: dict[str, Path]) -> None:
    found = find_overlaps(mixed(files), open_table(files["third"]))
    told = [finding.what.split(":")[0] for finding in found]
    assert told == [f"data.eval shares records with data.train {name}" for name in files]


def test_a_file_stays_a_file(files: dict[str, Path]) -> None:
    table = open_sources(str(files["first"]))
    assert not table.sources
    assert table.sources_of(np.arange(2)) == []
    assert open_sources([DataSource(str(files["first"]))]).names == ("first",)


def test_a_mixture_may_be_sent_to_a_process(files: dict[str, Path]) -> None:
    import pickle

    table = mixed(files, compare_images=True)
    again = pickle.loads(pickle.dumps(table))
    assert list(again) == list(table)
    assert again.images == table.images
    assert mixture.MixtureStore.find(again.images, "2/p.png")[1] == "p.png"
