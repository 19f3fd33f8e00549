"""What all forms of people's own data share: their options."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3v.cli import main
from phi3v.data.sources import OWN_DATA, SOURCE_OPTIONS, SOURCES
from phi3v.data.sources.records import OwnDataOptions
from phi3v.errors import UserError

VALUES = {"num_frames": "4", "special_text": "escape", "eval_share": "0.1"}


@pytest.mark.parametrize("field", SOURCE_OPTIONS)
def test_an_option_is_refused_by_the_sources_that_do_not_take_it(
    field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option, takers = SOURCE_OPTIONS[field]
    assert set(takers) < set(SOURCES)
    for source in set(SOURCES) - set(takers):
        command = ["data", "convert", source, "--out", str(tmp_path / "out"), option, VALUES.get(field, "x")]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"error: {option}: {source} does not take this option" in error
        assert f"the sources that do: {', '.join(takers)}" in error
    assert not (tmp_path / "out").exists()


def test_every_option_of_single_sources_is_a_field() -> None:
    assert set(SOURCE_OPTIONS) <= set(OwnDataOptions.__dataclass_fields__)


@pytest.mark.parametrize("source", OWN_DATA)
def test_own_data_has_no_usual_place(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, what in (
        ([], "--source: is missing"),
        (["--source", str(tmp_path / "none")], "no such file or folder"),
    ):
        assert main(["data", "convert", source, "--out", str(tmp_path / "out"), *options]) == 2
        assert what in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("eval_share", 1.0, "--eval-share: must be at least 0 and below 1, not 1"),
        ("eval_share", -0.1, "--eval-share: must be at least 0"),
        ("question", " ", "--question: is empty"),
        ("image_root", Path("none"), "--image-root: no such folder: none"),
        ("num_frames", 0, "--frames: must be at least 1"),
    ],
)
def test_values_that_make_no_sense(tmp_path: Path, field: str, value: object, what: str) -> None:
    with pytest.raises(UserError, match=what):
        OwnDataOptions(tmp_path, **{field: value})
