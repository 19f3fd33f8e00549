from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from phi3v.data import check
from phi3v.data.check import check_file, ensure_checked
from phi3v.data.faults import DataFaultsError
from phi3v.data.image_store import FolderStore
from phi3v.data.lengths import Context
from phi3v.errors import UserError

MakeRecord = Callable[..., dict[str, Any]]


def render(report: check.CheckReport) -> str:
    console = Console(file=io.StringIO(), width=60)
    report.render(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_every_kind_of_bad_input_is_found_in_one_pass(
    write: Any, record: MakeRecord, root: Path, drawing: Path
) -> None:
    big = root / "big.png"
    Image.open(drawing).resize((400, 400)).save(big)
    (root / "cut.png").write_bytes(drawing.read_bytes()[:-50])
    (root / "text.png").write_text("no image")
    (root / "empty.png").touch()
    (root / "link.png").symlink_to(drawing)
    path = write(
        record("good"),
        '{"id": "bad json"',
        "",
        record("missing", images=["train/0.png", "train/1.png"]),
        record("cut", images=["cut.png"]),
        record("text", images=["text.png"]),
        record("empty", images=["empty.png"]),
        record("leaves", images=["../../x.png"]),
        record("link", images=["link.png"]),
        record("absolute", images=["/x.png"]),
        record("answer", assistant=" "),
        {"id": "no turn", "conversations": []},
        record("types", user=3),
        record("good"),
        record("special", user="what is <|user|>?"),
        record("bomb", images=["big.png"]),
        record("last"),
    )
    with path.open("ab") as file:
        file.write(json.dumps(record("latin-1")).encode().replace(b"blue", b"bl\xfc") + b"\n")
    report = check_file(path, max_pixels=100_000)
    assert [(fault.line, fault.field, fault.what.split(":")[0].split(" (")[0]) for fault in report.faults] == [
        (2, "", "is not valid JSON"),
        (4, "conversations[0].images[1]", "does not exist"),
        (5, "conversations[0].images[0]", "is truncated"),
        (6, "conversations[0].images[0]", "is not an image that can be read"),
        (7, "conversations[0].images[0]", "is an empty file"),
        (8, "conversations[0].images[0]", "leaves the data root"),
        (9, "conversations[0].images[0]", "leaves the data root through a link"),
        (10, "conversations[0].images[0]", "is an absolute path"),
        (11, "conversations[0].assistant", "is empty"),
        (12, "conversations", "has no turn"),
        (13, "conversations[0].user", "must be a string, not a number"),
        (14, "id", "'good' is the id of line 1 too"),
        (15, "conversations[0].user", "holds text that the tokenizer reads as a special token"),
        (16, "conversations[0].images[0]", "has 400x400 = 160,000 pixels, above the limit of 100,000"),
        (18, "", "is not UTF-8"),
    ]
    assert all(fault.hint and fault.file == path for fault in report.faults)
    assert not report.ok
    assert not report.stopped_early
    assert report.records == 17
    text = render(report)
    for fault in report.faults:
        assert str(fault) in text  # nothing lost to markup or to the width of the terminal
    assert f"15 faults in {path}" in text


def test_a_good_file_is_counted(write: Any, record: MakeRecord, root: Path, drawing: Path) -> None:
    (root / "b.png").write_bytes(drawing.read_bytes())
    second = record("b", images=["b.png", "train/0.png"], user="", assistant="a longer answer")
    second["conversations"].append({"user": "why?", "assistant": "so"})
    path = write(record("a"), "", second)
    report = check_file(path)
    assert report.ok
    assert (report.records, report.turns, report.questions, report.images) == (2, 3, 2, 2)
    assert (report.assistant.longest, report.assistant.longest_line) == (len("a longer answer"), 3)
    assert report.user.mean == pytest.approx((len("what color is the shape?") + 4) / 3)
    assert "no fault" in render(report)
    data = json.loads(json.dumps(report.to_json_dict()))
    assert data["ok"] is True
    assert data["images"] == 2
    assert data["faults"] == []


def test_preferences_are_counted(write: Any, record: MakeRecord) -> None:
    pair, tie, bad = record("b", rejected="a longer answer"), record("c", rejected=["x", "y"]), record("d", label=False)
    tie["conversations"][0]["scores"] = [1, 1, 0]
    path = write(record("a"), pair, tie, bad)
    for look in (check_file, ensure_checked, ensure_checked):  # the second time remembered
        report = look(path)
        assert (report.pairs, report.ties, report.good, report.bad, report.rejected.count) == (2, 1, 0, 1, 3)
    text = render(report)
    assert "2 of 4 records have rejected answers" in text
    assert "6 characters on average, at most 15 (line 2), 1 with the score of the chosen answer" in text
    assert "1 of 4 records: 0 good, 1 bad" in text


def test_a_rejected_answer_may_be_too_long(write: Any, record: MakeRecord) -> None:
    path = write(record("a", images=[], rejected="word " * 400))
    (fault,) = check_file(path, context=Context(500)).faults
    assert (fault.field, fault.line) == ("conversations", 1)
    assert check_file(write(record("a", images=[], rejected="word")), context=Context(500)).ok


@pytest.mark.parametrize("workers", [1, 4])
def test_it_stops_after_max_errors_with_the_first_of_the_file(write: Any, record: MakeRecord, workers: int) -> None:
    # Image faults come from threads and duplicates from the end: the order is that of the lines all the same.
    lines = [record(str(k), images=[f"none/{k}.png"]) if k % 3 else record("same", assistant="x") for k in range(300)]
    path = write(*lines)
    report = check_file(path, max_errors=10, workers=workers)
    assert report.stopped_early
    everything = check_file(path, max_errors=None, workers=workers)
    assert not everything.stopped_early
    assert len(everything.faults) == 299
    assert report.faults == everything.faults[:10]
    assert [fault.line for fault in report.faults] == list(range(2, 12))
    assert report.records < 300 == everything.records
    assert "stopped there, there are more" in render(report)
    exact = check_file(path, max_errors=299, workers=workers)
    assert len(exact.faults) == 299
    assert not exact.stopped_early


def test_each_image_is_read_once(write: Any, record: MakeRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = check.check_image

    def counting(path: str, **options: Any) -> Any:
        read.append(path)
        return real(path, **options)

    monkeypatch.setattr(check, "check_image", counting)
    path = write(*[record(str(k), images=["train/0.png", "none.png"]) for k in range(50)])
    report = check_file(path)
    assert sorted(read) == ["none.png", "train/0.png"]
    assert [fault.line for fault in report.faults] == [1]
    assert report.images == 2


def test_levels(write: Any, record: MakeRecord, root: Path, drawing: Path) -> None:
    (root / "cut.png").write_bytes(drawing.read_bytes()[:-50])
    path = write(record("a", images=["cut.png"]), record("b", images=["none.png"]))
    found = {
        level: [fault.line for fault in check_file(path, image_level=level).faults]
        for level in ("decode", "header", "off")
    }
    assert found == {"decode": [1, 2], "header": [2], "off": []}


def test_images_may_lie_elsewhere(write: Any, record: MakeRecord, root: Path, tmp_path: Path) -> None:
    path = write(record("a"))
    root.rename(tmp_path / "images")
    assert not check_file(path).ok
    assert check_file(path, images=FolderStore(tmp_path / "images")).ok


def test_special_text_may_be_escaped(write: Any, record: MakeRecord) -> None:
    path = write(record("a", user="<|end|>"))
    assert not check_file(path).ok
    assert check_file(path, special_text="escape").ok


def test_input_that_is_no_data_file(write: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no record"):
        check_file(write(""))
    with pytest.raises(UserError, match="no such file"):
        check_file(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="max_errors: must be at least 1"):
        check_file(write(""), max_errors=0)


class TestEnsureChecked:
    def test_a_passed_check_is_remembered(
        self, write: Any, record: MakeRecord, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write(record("a"))
        report = ensure_checked(path)

        def fail(*_: object, **__: object) -> None:
            raise AssertionError("checked again")

        monkeypatch.setattr(check, "check_file", fail)
        again = ensure_checked(path)
        assert again == report
        for changed in ({"image_level": "header"}, {"max_pixels": 5_000}, {"special_text": "escape"}):
            with pytest.raises(AssertionError, match="checked again"):
                ensure_checked(path, **changed)
        with pytest.raises(AssertionError, match="checked again"):
            ensure_checked(path, images=FolderStore(path.parent))
        write(record("a"), record("b"))
        with pytest.raises(AssertionError, match="checked again"):
            ensure_checked(path)

    def test_faults_are_raised_and_not_remembered(self, write: Any, record: MakeRecord, root: Path) -> None:
        path = write(record("a"), record("b", images=["late.png"]))
        for _ in range(2):
            with pytest.raises(DataFaultsError, match=r"data.jsonl:2: conversations\[0\].images\[0\]: does not"):
                ensure_checked(path)
        (root / "late.png").write_bytes((root / "train" / "0.png").read_bytes())
        assert ensure_checked(path).ok

    def test_a_damaged_memory_is_no_memory(self, write: Any, record: MakeRecord, cache: Path) -> None:
        path = write(record("a"))
        ensure_checked(path)
        (memory,) = cache.glob("*/check-*.json")
        memory.write_text('{"ok": true}')
        assert ensure_checked(path).records == 1

    def test_more_faults_than_listed(self, write: Any, record: MakeRecord) -> None:
        path = write(*[record(str(k), assistant="") for k in range(9)])
        with pytest.raises(DataFaultsError, match=r"at least 4 faults \(the first 3 follow\)"):
            ensure_checked(path, max_errors=3)
