"""The stand-ins of the four tasks: the datasets' schemas, the same bytes every time, answers that need the pictures."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from drawing import BASE_PHOTOS, TASK_PHOTOS
from phi3v.data.convert import ConvertOptions
from phi3v.data.sources import SOURCES
from phi3v.data.video import sample_frames
from task_table import chance
from tasks import TASKS, docvqa, hateful_memes, nlvr2, parts, ucf101
from tasks.parts import Sizes

SMALL = {
    "docvqa": Sizes(6, 0, 4),
    "hateful_memes": Sizes(16, 8, 12),
    "nlvr2": Sizes(4, 2, 3),
    "ucf101": Sizes(12, 6, 6),
}
Made = dict[str, Path]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Every stand-in, as its dataset is distributed."""
    root = tmp_path_factory.mktemp("originals")
    return {name: make(name, root / name) for name in TASKS}


@pytest.fixture(scope="module")
def converted(originals: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Every stand-in in the JSONL format."""
    root = tmp_path_factory.mktemp("converted")
    for name, task in TASKS.items():
        convert(task.source, originals[name] / task.original, root / name)
    return {name: root / name for name in TASKS}


def make(name: str, folder: Path) -> Path:
    folder.mkdir()
    TASKS[name].make(folder, SMALL[name], 0)
    return folder


def convert(source: str, original: Path, out: Path) -> None:
    SOURCES[source](ConvertOptions(out, source=str(original), num_frames=4, workers=2, progress=False))


def records(data: Path, name: str) -> list[dict[str, Any]]:
    """The only turn of every record."""
    lines = (data / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["conversations"][0] for line in lines]


def json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", list(TASKS))
def test_the_same_bytes_every_time(name: str, originals: Made, tmp_path: Path) -> None:
    again = make(name, tmp_path / name)
    files = [path.relative_to(again) for path in sorted(again.rglob("*")) if path.is_file()]
    assert files
    for file in files:
        assert (again / file).read_bytes() == (originals[name] / file).read_bytes(), file


@pytest.mark.parametrize("name", list(TASKS))
def test_no_picture_is_in_train_and_test(name: str, converted: Made) -> None:
    task, data = TASKS[name], converted[name]
    seen = [
        {Image.open(data / "images" / path).tobytes() for turn in records(data, file) for path in turn["images"]}
        for file in (task.train, task.test)
    ]
    assert len(seen[0]) > 1
    assert not seen[0] & seen[1]


@pytest.mark.parametrize(
    ("name", "expected"), [("hateful_memes", 1 / 2), ("nlvr2", 1 / 2), ("ucf101", 1 / len(ucf101.CLASSES))]
)
def test_pictures_are_needed(name: str, expected: float, converted: Made) -> None:
    for file in (TASKS[name].train, TASKS[name].test):
        assert chance(converted[name] / file, "accuracy") == pytest.approx(expected)


def test_a_constant_answer_gets_little_of_docvqa(tmp_path: Path) -> None:
    pages = itertools.islice(docvqa._pages(0, "test", set()), 300)
    lines = [
        {"conversations": [{"user": question, "assistant": answers[0], "answers": answers}]}
        for _, questions in pages
        for question, answers in questions
    ]
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert chance(tmp_path / "val.jsonl", "anls") < 0.4


def test_chance_counts_the_best_answer_to_every_question(tmp_path: Path) -> None:
    lines = [("a?", ["x"]), ("a?", ["x", "y"]), ("a?", ["y"]), ("b?", ["z"])]
    file = tmp_path / "test.jsonl"
    turns = ({"user": text, "assistant": answers[0], "answers": answers} for text, answers in lines)
    file.write_text("\n".join(json.dumps({"conversations": [turn]}) for turn in turns), encoding="utf-8")
    assert chance(file, "accuracy") == pytest.approx(3 / 4)


class TestDocVQA:
    def test_schema(self, originals: Made) -> None:
        content = json.loads((originals["docvqa"] / "val_v1.0.json").read_text(encoding="utf-8"))
        assert (content["dataset_name"], content["dataset_split"]) == ("docvqa", "val")
        assert len(content["data"]) == 4 * docvqa.QUESTIONS_A_PAGE
        for entry in content["data"]:
            assert entry["answers"]
            assert (originals["docvqa"] / entry["image"]).is_file()
        assert len({entry["questionId"] for entry in content["data"]}) == len(content["data"])

    def test_parquet_gives_the_same_records(self, originals: Made, converted: Made, tmp_path: Path) -> None:
        docvqa.make_tables(originals["docvqa"], tmp_path / "tables")
        convert("docvqa", tmp_path / "tables", tmp_path / "out")
        for original, table in (("train.jsonl", "train.jsonl"), ("val.jsonl", "test.jsonl")):
            expected, given = records(converted["docvqa"], original), records(tmp_path / "out", table)
            assert [{**turn, "images": 1} for turn in given] == [{**turn, "images": 1} for turn in expected]

    def test_no_page_twice(self) -> None:
        seen: set[tuple[str, ...]] = set()
        for split in ("train", "test"):
            list(itertools.islice(docvqa._pages(0, split, seen), 200))  # type: ignore[arg-type]
        assert len(seen) == 400


class TestNLVR2:
    def test_schema(self, originals: Made) -> None:
        examples = json_lines(originals["nlvr2"] / "data" / "train.json")
        assert len(examples) == 4 * nlvr2.PAIRS_A_SET["train"]
        for example in examples:
            split, group, pair, sentence = example["identifier"].split("-")
            folder = originals["nlvr2"] / "images" / split / str(example["directory"])
            assert (folder / f"{split}-{group}-{pair}-img1.png").is_file()
            assert sentence == "0"

    def test_a_sentence_is_one_set_s_and_true_of_half_of_its_pairs(self, originals: Made) -> None:
        sentences = []
        for split, file in nlvr2.NAMES.items():
            sets: dict[str, list[dict[str, Any]]] = {}
            for example in json_lines(originals["nlvr2"] / "data" / f"{file}.json"):
                sets.setdefault(example["identifier"].split("-")[1], []).append(example)
            for examples in sets.values():
                sentences.append(examples[0]["sentence"])
                assert {example["sentence"] for example in examples} == {sentences[-1]}
                counts = Counter(example["label"] for example in examples)
                assert set(counts.values()) == {nlvr2.PAIRS_A_SET[split] // 2}
        assert len(set(sentences)) == len(sentences) == 4 + 2 + 3

    def test_wordings_suffice_and_too_many_sets_are_refused(self, tmp_path: Path) -> None:
        words = [sentence for claim in nlvr2.CLAIMS for sentence in nlvr2.wordings(claim)]
        assert "At least one photo shows a pointed figure." in words
        assert len(set(words)) == len(words) == 4 * 80
        with pytest.raises(ValueError, match="more sets than there are wordings"):
            nlvr2.make(tmp_path, Sizes(321, 0, 0), 0)

    def test_statements_hold_of_what_is_drawn(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shapes, draw = [], nlvr2.draw_shape
        monkeypatch.setattr(
            nlvr2, "draw_shape", lambda page, shape, *rest: shapes.append(shape) or draw(page, shape, *rest)
        )
        nlvr2.make(tmp_path, Sizes(8, 0, 0), 0)
        examples = json_lines(tmp_path / "data" / "train.json")
        pointed = [shape in parts.BY_POINT[True] for shape in shapes]
        assert len(pointed) == 2 * len(examples)
        for example, left, right in zip(examples, pointed[::2], pointed[1::2], strict=True):
            where = example["sentence"]
            expected = {"left": left, "right": right, "Each": left and right, "At least": left or right}
            assert example["label"] == str(next(holds for words, holds in expected.items() if words in where))


class TestHatefulMemes:
    def test_schema(self, originals: Made) -> None:
        for name, count in (("train", 16), ("dev_seen", 8), ("test_seen", 12)):
            memes = json_lines(originals["hateful_memes"] / f"{name}.jsonl")
            assert len(memes) == count
            for meme in memes:
                assert meme.keys() == {"id", "img", "label", "text"}
                assert (originals["hateful_memes"] / meme["img"]).is_file()

    def test_neither_caption_nor_picture_decides(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shapes, draw = [], hateful_memes.draw_shape
        monkeypatch.setattr(
            hateful_memes, "draw_shape", lambda page, shape, *rest: shapes.append(shape) or draw(page, shape, *rest)
        )
        hateful_memes.make(tmp_path, Sizes(120, 0, 0), 0)
        memes = json_lines(tmp_path / "train.jsonl")
        assert sum(meme["label"] for meme in memes) == 60
        shouts = [meme["text"].isupper() for meme in memes]
        pointed = [shape in parts.BY_POINT[True] for shape in shapes]
        for signs in (shouts, pointed):
            assert all(sign for meme, sign in zip(memes, signs, strict=True) if meme["label"])
            assert 10 < sum(sign for meme, sign in zip(memes, signs, strict=True) if not meme["label"]) < 30


class TestUCF101:
    def test_classes_and_lengths(self, originals: Made) -> None:
        for split, count in (("train", 2), ("val", 1), ("test", 1)):
            folder = originals["ucf101"] / "clips" / split
            clips = {path.name: sorted(path.glob("*.avi")) for path in folder.iterdir()}
            assert {name: len(files) for name, files in clips.items()} == dict.fromkeys(ucf101.CLASSES, count)
            for files in clips.values():
                assert len(sample_frames(files[0], ucf101.LENGTH)) == ucf101.LENGTH

    def test_classes_look_like_their_names(self, originals: Made) -> None:
        def frames(label: str) -> list[np.ndarray]:
            clip = sorted((originals["ucf101"] / "clips" / "train" / label).glob("*.avi"))[0]
            return [np.asarray(frame, dtype=float) for frame in sample_frames(clip, ucf101.LENGTH)]

        def shown(frame: np.ndarray) -> tuple[float, float]:
            """Of the width: where the middle of what is not black is, and how wide it is."""
            lit = np.flatnonzero(frame.mean(axis=(0, 2)) > 8)
            return (lit[0] + lit[-1]) / 2 / ucf101.SIDE, len(lit) / ucf101.SIDE

        assert max(np.abs(a - b).mean() for a, b in itertools.pairwise(frames("Still"))) < 3  # what the codec adds
        assert frames("FadeOut")[-1].mean() < 12 < frames("FadeOut")[0].mean()
        for first, last in (("MoveLeft", "MoveRight"), ("Grow", "Shrink")):
            one, other = ([shown(frame) for frame in frames(label)] for label in (first, last))
            place = 0 if first == "MoveLeft" else 1
            sign = -1 if first == "MoveLeft" else 1
            assert sign * (one[-1][place] - one[0][place]) > 0.3
            assert sign * (other[0][place] - other[-1][place]) > 0.3


def test_splits_share_no_part_of_a_photograph_or_film() -> None:
    for spans in (parts._PHOTO, ucf101._SPANS):
        for (_, end), (start, _) in itertools.pairwise(spans[split] for split in parts.SPLITS):
            assert end <= start
    assert not set(TASK_PHOTOS) & set(BASE_PHOTOS)
