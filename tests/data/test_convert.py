from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sample_files import image_bytes, records, tree

from phi3v.data import convert, image_folder
from phi3v.data.convert import BadUnit, BadUnitsError, Conversion, ConversionResult, ConvertOptions, Unit
from phi3v.errors import UserError

Work = Callable[[Conversion, int], list[Any]]


def record(number: int, images: list[str], user: str = "what?") -> dict[str, Any]:
    return {"id": str(number), "conversations": [{"images": images, "user": user, "assistant": "that"}]}


def add_one(conversion: Conversion, number: int) -> list[Any]:
    return [record(number, [conversion.images.add(f"{number}", image_bytes(number))])]


def run(options: ConvertOptions, count: int = 20, work: Work = add_one) -> ConversionResult:
    with Conversion("toy", options) as conversion:
        units = (Unit(f"row {k}", lambda k=k: work(conversion, k)) for k in range(count))  # type: ignore[misc]
        conversion.write_split("train", units, total=count)
        return conversion.result()


def some_bad(conversion: Conversion, number: int) -> list[Any]:
    if number in (3, 11):
        raise UserError("is torn", hint="mend it")
    return add_one(conversion, number)


def test_records_are_in_order_whatever_the_workers_do(tmp_path: Path) -> None:
    """Each unit waits until the one after it is done, as far as the two workers can overtake."""
    done = [threading.Event() for _ in range(9)]
    done[8].set()

    def late(conversion: Conversion, number: int) -> list[Any]:
        if number % 2 == 0:
            assert done[number + 1 if number < 8 else 8].wait(10)
        done[number].set()
        return add_one(conversion, number)

    result = run(ConvertOptions(tmp_path / "two", workers=2), count=9, work=late)
    run(ConvertOptions(tmp_path / "one", workers=1), count=9)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert [line["id"] for line in records(result.files["train"])] == [str(k) for k in range(9)]
    assert (result.records, result.images, result.images_kept) == ({"train": 9}, 9, 0)


def test_units_are_taken_as_they_are_needed(tmp_path: Path) -> None:
    ahead = 0
    highest = 0

    def count_down(conversion: Conversion, number: int) -> list[Any]:
        nonlocal ahead
        ahead -= 1
        return add_one(conversion, number)

    with Conversion("toy", ConvertOptions(tmp_path, workers=2)) as conversion:

        def units() -> Iterator[Unit]:
            nonlocal ahead, highest
            for k in range(200):
                ahead += 1
                highest = max(highest, ahead)
                yield Unit(f"row {k}", lambda k=k: count_down(conversion, k))  # type: ignore[misc]

        conversion.write_split("train", units(), total=200)
    assert highest <= 9 + 2


def test_bad_units_stop_it_after_everything_good_is_done(tmp_path: Path) -> None:
    with pytest.raises(BadUnitsError) as caught:
        run(ConvertOptions(tmp_path, workers=2), work=some_bad)
    message = str(caught.value)
    assert message.startswith("toy: 2 of 20 units cannot be converted\n  row 3: is torn (mend it)\n  row 11: is torn")
    assert "--on-bad skip" in message
    assert len(list((tmp_path / "images").iterdir())) == 18
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_what_is_good_is_kept_for_the_run_after_the_correction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(ConvertOptions(tmp_path / "whole"))
    with pytest.raises(BadUnitsError):
        run(ConvertOptions(tmp_path / "out"), work=some_bad)
    decoded = []
    real = image_folder.decode_image
    monkeypatch.setattr(image_folder, "decode_image", lambda *a, **k: decoded.append(1) or real(*a, **k))
    result = run(ConvertOptions(tmp_path / "out"))
    assert (len(decoded), result.images, result.images_kept) == (2, 20, 18)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_bad_units_are_left_out_counted_and_listed(tmp_path: Path) -> None:
    result = run(ConvertOptions(tmp_path, on_bad="skip"), work=some_bad)
    assert [line["id"] for line in records(result.files["train"])] == [str(k) for k in range(20) if k not in (3, 11)]
    answer = json.loads(json.dumps(result.to_json_dict()))
    assert answer["skipped"] == 2
    assert answer["skipped_units"][0] == {"place": "row 3", "what": "is torn", "hint": "mend it"}
    console = Console(record=True, width=200)
    result.render(console)
    shown = console.export_text()
    assert "train: 18 records" in shown
    assert "skipped: 2\n  row 3: is torn (mend it)\n  row 11: is torn (mend it)" in shown


def test_a_part_of_a_unit_may_be_bad(tmp_path: Path) -> None:
    def half_bad(conversion: Conversion, number: int) -> list[Any]:
        return [*add_one(conversion, number), BadUnit(f"row {number}, second", "is torn")]

    result = run(ConvertOptions(tmp_path, on_bad="skip"), count=2, work=half_bad)
    assert result.records == {"train": 2}
    assert [bad.place for bad in result.skipped] == ["row 0, second", "row 1, second"]


def test_a_record_that_training_would_refuse_is_bad(tmp_path: Path) -> None:
    def empty(_: Conversion, number: int) -> list[Any]:
        return [record(number, [], user="" if number == 1 else "what?")]

    with pytest.raises(BadUnitsError, match=r"row 1: conversations\[0\].user: is empty"):
        run(ConvertOptions(tmp_path), count=3, work=empty)


def test_many_bad_units_are_not_all_listed_and_end_it_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_HOPELESS", 50)

    def torn(_: Conversion, number: int) -> list[Any]:
        raise UserError("is torn")

    with pytest.raises(BadUnitsError) as caught:
        run(ConvertOptions(tmp_path, workers=1), count=500, work=torn)
    assert caught.value.stopped_early
    assert (len(caught.value.bad), caught.value.units) == (50, 50)
    assert "50 of the first 50 units cannot be converted" in str(caught.value)
    assert str(caught.value).count("is torn") == 20


def test_nothing_but_bad_units_is_no_dataset(tmp_path: Path) -> None:
    def torn(_: Conversion, number: int) -> list[Any]:
        raise UserError("is torn")

    with pytest.raises(UserError, match="gives no record at all: row 0: is torn"):
        run(ConvertOptions(tmp_path, on_bad="skip"), work=torn)
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_full_disk_is_one_error_not_many_bad_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device") as caught:
        run(ConvertOptions(tmp_path, on_bad="skip"))
    assert not isinstance(caught.value, BadUnitsError)
    assert not list(tmp_path.glob("*.jsonl"))


def test_an_error_of_ours_is_not_taken_for_bad_data(tmp_path: Path) -> None:
    def broken(_: Conversion, number: int) -> list[Any]:
        raise KeyError(number)

    with pytest.raises(KeyError):
        run(ConvertOptions(tmp_path, on_bad="skip"), work=broken)


def test_other_data_is_not_overwritten(tmp_path: Path) -> None:
    run(ConvertOptions(tmp_path))
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"train\.jsonl: exists with other content"):
        run(ConvertOptions(tmp_path), count=19)
    assert tree(tmp_path) == before


def test_only_one_conversion_writes_into_a_folder(tmp_path: Path) -> None:
    with Conversion("toy", ConvertOptions(tmp_path)), pytest.raises(UserError, match="another conversion is writing"):
        run(ConvertOptions(tmp_path))
    run(ConvertOptions(tmp_path))


def test_what_a_killed_run_left_half_written_goes_away(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for leftover in (tmp_path / ".train.jsonl.7-7.tmp", tmp_path / "images" / ".0.png.7-7.tmp"):
        leftover.write_bytes(b"half")
    run(ConvertOptions(tmp_path))
    assert not list(tmp_path.rglob("*.tmp"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "train.jsonl"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        run(ConvertOptions(tmp_path / "file" / "out"))


@pytest.mark.parametrize(("options", "flag"), [({"workers": 0}, "--workers"), ({"num_frames": 0}, "--frames")])
def test_counts_below_one_are_refused(tmp_path: Path, options: dict[str, int], flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag}: must be at least 1, not 0"):
        ConvertOptions(tmp_path, **options)  # type: ignore[arg-type]
