from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from phi3v.data.sources import json_records
from phi3v.data.sources.json_records import read_json_records
from phi3v.errors import UserError

RECORDS: list[dict[str, Any]] = [
    {"id": 1, "text": 'brackets ]}[{ and "quotes" \\ in a string'},
    {},
    {"nested": [[1, 2.5e3, {"a": [None, True]}]], "ü": "日本語 \u2028 🙂"},
    {"long": "x" * 500},
]


def read(file: Path) -> list[Any]:
    return [value for _, value in read_json_records(file)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("start", ["", "\ufeff", " \r\n\t"])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 64, 2**20])
def test_arrays_are_read_as_json_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, ascii_only: bool, start: str, indent: int | None
) -> None:
    monkeypatch.setattr(json_records, "_CHUNK", max(chunk, len(start) + 1))
    file = tmp_path / "a.json"
    file.write_text(start + json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    assert read(file) == RECORDS


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines(tmp_path: Path, end: str, mark: bytes) -> None:
    file = tmp_path / "a.jsonl"
    text = (end + end).join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
    file.write_bytes(mark + text.encode())
    assert list(read_json_records(file)) == [(f"{file}:{1 + 2 * k}", record) for k, record in enumerate(RECORDS)]


def test_places_in_an_array_are_line_and_index(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[\n\n{"a":\n 1}, {"b": 2}\n,\n{}]')
    assert [place for place, _ in read_json_records(file)] == [f"{file}:3: [0]", f"{file}:4: [1]", f"{file}:6: [2]"]


def test_an_empty_array_has_no_record(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("[ ]\n")
    assert read(file) == []


def test_what_is_no_object_and_a_broken_line_do_not_end_the_reading(tmp_path: Path) -> None:
    array, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    array.write_text('[{"a": 1}, 12, {"b": 2}]')
    lines.write_bytes(b'{"a": 1}\n{"a": \n7\n{"a": "\xff"}\n{"b": 2}\n')
    for file, places in ((array, [":1: [1]"]), (lines, [":2", ":3", ":4"])):
        found = read(file)
        assert found[0] == {"a": 1}
        assert found[-1] == {"b": 2}
        assert [error.where for error in found[1:-1]] == [f"{file}{place}" for place in places]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('[{"a": 1},\n{"b": }]', 2, "Expecting value"),
        ('[{"a": 1}\n{"b": 2}]', 2, "Expecting ',' delimiter"),
        ('[{"a": 1},\n\n{"b": 2', 3, "Expecting ',' delimiter"),
        ('[{"a": 1},\n', 2, "Expecting value"),
        ('[{"a": 1}', 1, "the array has no end"),
        ('[{"a": 1},\n{"b": "x', 2, "Unterminated string"),
        ('[{"a": 1}]\n[{"a": 2}]', 2, "something follows the array"),
        ('[{"a": 1},]', 1, "Expecting value"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2**20])
def test_a_broken_array_is_an_error_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: int, what: str, chunk: int
) -> None:
    monkeypatch.setattr(json_records, "_CHUNK", chunk)
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(UserError, match=what) as caught:
        read(file)
    assert caught.value.where == f"{file}:{line}"


def test_an_array_in_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b'[{"a": "M\xfcller"}]')
    with pytest.raises(UserError, match="is not UTF-8: byte 0xfc"):
        read(file)


def test_one_record_may_not_be_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(json_records, "_CHUNK", 10)
    file = tmp_path / "a.json"
    for value in ([{"a": "x" * 5000}], {"data": [{"a": "x" * 5000}]}):
        file.write_text(json.dumps(value, indent=1))
        with pytest.raises(UserError, match="is not valid JSON: one value is longer than"):
            read(file)


def test_only_what_is_around_a_record_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "_CHUNK", 1000)
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"a": "x" * 500}] * 1000))
    longest = 0
    decode = json.JSONDecoder.raw_decode

    def watch(decoder: json.JSONDecoder, text: str, begin: int = 0) -> Any:
        nonlocal longest
        longest = max(longest, len(text))
        return decode(decoder, text, begin)

    monkeypatch.setattr(json_records._Decoder, "raw_decode", watch)
    assert len(read(file)) == 1000
    assert longest < 5000


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
@pytest.mark.parametrize("between", ["\n", "\n\n \t", ""])
@pytest.mark.parametrize("end", ["", "\n", "\n" * 50])
def test_objects_that_are_spread_over_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, between: str, end: str
) -> None:
    monkeypatch.setattr(json_records, "_CHUNK", chunk)
    file = tmp_path / "a.json"
    texts = [json.dumps(value, indent=2, ensure_ascii=False) for value in [*RECORDS[:1], *RECORDS[2:]]]
    file.write_text("\ufeff" + between.join(texts) + end, encoding="utf-8")
    found = list(read_json_records(file))
    assert [value for _, value in found] == [*RECORDS[:1], *RECORDS[2:]]
    if between == "\n":
        assert [place for place, _ in found] == [f"{file}:{line}" for line in (1, 5, 20)]


CONTAINERS: dict[str, tuple[Any, list[Any]]] = {
    "data": ({"data": RECORDS}, RECORDS),
    "beside other keys": ({"version": "1.0", "info": {"by": "me"}, "annotations": RECORDS[:1]}, RECORDS[:1]),
    "by id": (
        {"a": {"conversations": []}, "b": {"id": "c", "x": 1}},
        [{"id": "a", "conversations": []}, {"id": "c", "x": 1}],
    ),
    "a record": ({"conversations": [{"from": "human"}]}, [{"conversations": [{"from": "human"}]}]),
    "a record of messages": (
        {"messages": [{"role": "user"}], "n": [{}]},
        [{"messages": [{"role": "user"}], "n": [{}]}],
    ),
    "nothing": ({"data": []}, []),
}


@pytest.mark.parametrize("case", CONTAINERS)
@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_around_the_records(tmp_path: Path, case: str, indent: int | None) -> None:
    value, expected = CONTAINERS[case]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(value, indent=indent))
    assert read(file) == expected


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (json.dumps({"train": [{}], "val": [{}]}), "is one object with several lists: 'train', 'val'"),
        (json.dumps({"data": RECORDS}, indent=1)[:300], "is not valid JSON"),
        ('{\n "a": 1\n}\n{\n "a": \n}\n{\n "a": 2\n}', "is not valid JSON: Expecting value"),
        (
            "# a\n# b\n# c\n# d\n",
            "is not valid JSON: Expecting value: line 1 column 1 (char 0); nor are the lines before",
        ),
        ("\ufeff{}".encode("utf-16-le"), "is not UTF-8 but UTF-16"),
        ('{"a": "ü"}'.encode("utf-16-be"), "is not UTF-8 but UTF-16BE, if it is text at all"),
    ],
)
def test_a_file_of_another_form_is_one_error(tmp_path: Path, text: str | bytes, what: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=re.escape(what)):
        read(file)


@pytest.mark.parametrize("form", ['{"a": {"b": 1, "b": 2}}\n{}', '[{"a": {"b": 1, "b": 2}}, {}]'])
def test_a_key_that_is_there_twice_is_a_bad_record(tmp_path: Path, form: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(form)
    error, good = read(file)
    assert "the key 'b' is there twice" in error.what
    assert good == {}
