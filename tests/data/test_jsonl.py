from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phi3v.data import jsonl
from phi3v.data.jsonl import read_lines, write_jsonl
from phi3v.errors import UserError


def test_lines_keep_their_numbers_and_blank_ones_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n\n{"a": "\xe2\x80\xa8"}\r\n   \n{"b": 1}')
    assert list(read_lines(path)) == [(3, b'{"a": "\xe2\x80\xa8"}\r\n'), (5, b'{"b": 1}')]


def test_the_rest_of_an_endless_line_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 10)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 95 + b"\n" + b"y" * 9 + b"\n" + b"z" * 30)
    assert list(read_lines(path)) == [(1, b"x" * 11), (2, b"y" * 9 + b"\n"), (3, b"z" * 11)]


@pytest.mark.parametrize(("name", "what"), [("none.jsonl", "no such file"), (".", "is a folder")])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        list(read_lines(tmp_path / name))


def test_written_lines_are_utf8_objects(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.jsonl"
    assert write_jsonl(path, [{"id": "ü"}, {"id": "b"}]) == 2
    assert path.read_bytes() == '{"id": "ü"}\n{"id": "b"}\n'.encode()
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"id": "old"}])

    def interrupted() -> Iterator[dict[str, Any]]:
        yield {"id": "new"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, interrupted(), overwrite=True)
    assert path.read_text() == '{"id": "old"}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_other_content_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"id": "a"}])
    write_jsonl(path, [{"id": "a"}])
    with pytest.raises(UserError, match="exists with other content"):
        write_jsonl(path, [{"id": "b"}])
    assert path.read_text() == '{"id": "a"}\n'
    write_jsonl(path, [{"id": "b"}], overwrite=True)
    assert path.read_text() == '{"id": "b"}\n'
