"""A file of somebody else's format is one fault, with the command that converts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi3v.cli import main
from phi3v.data.faults import DataFaultsError
from phi3v.data.table import open_table

LLAVA = {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
CHAT = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "images": []}
OURS = {"id": "1", "conversations": [{"user": "Q", "assistant": "A"}]}
FILES: dict[str, tuple[str, str, str]] = {
    "lines": (json.dumps(LLAVA) + "\n" + json.dumps(LLAVA), "looks like LLaVA's format", "convert llava --source"),
    "array": (json.dumps([LLAVA] * 3), "looks like LLaVA's format", "convert llava --source"),
    "spread array": (json.dumps([LLAVA] * 3, indent=1), "looks like LLaVA's format", "convert llava --source"),
    "around": (json.dumps({"data": [LLAVA, LLAVA]}), "looks like LLaVA's format", "convert llava --source"),
    "chat": (json.dumps(CHAT), "looks like a chat format", "convert messages --source"),
    "roles": (json.dumps({"conversations": CHAT["messages"]}), "looks like LLaVA's format", "convert llava"),
    "ours as an array": (json.dumps([OURS, OURS]), "has its records in one array", "jq -c '.[]'"),
    "ours spread": (json.dumps(OURS, indent=1), "spread over lines", "jq -c '.'"),
}


def check(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    code = main(["data", "check", str(path), "--json"])
    return code, json.loads(capsys.readouterr().out)["faults"]


@pytest.mark.parametrize("name", FILES)
def test_one_fault_says_what_it_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, what, hint = FILES[name]
    path = tmp_path / "my data.json"
    path.write_text(text)
    code, (fault,) = check(path, capsys)
    assert code == 2
    assert what in fault["what"]
    assert hint in fault["hint"]
    with pytest.raises(DataFaultsError, match="1 fault") as caught:  # what training opens
        open_table(path)
    assert str(caught.value.faults[0]).count("my data.json") == 2


def test_a_table_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    code, (fault,) = check(path, capsys)
    assert (code, fault["what"]) == (2, "is a table")
    assert f"phi3v data convert csv --source {path}" in fault["hint"]


def test_a_line_among_ours_is_one_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, (OURS, LLAVA, OURS | {"id": "2"}))))
    code, (fault,) = check(path, capsys)
    assert (code, fault["line"], fault["what"]) == (2, 2, "looks like LLaVA's format")
