"""`phi3v export --format`: what cannot be made is refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3v.cli import main
from phi3v.export import deploy, formats
from phi3v.model.presets import copy_pretrained


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "model"
    copy_pretrained("tiny", folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["export", *map(str, arguments)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--format", "fp8", "--bits", "4"], "--bits: is not known to the format fp8"),
        (["--format", "hf", "--bits", "4"], "--bits: is about other formats than hf"),
        (["--questions", "5"], "--questions: is about other formats than hf"),
        (["--format", "w4a16", "fp8", "w4a16"], "names a format twice"),
        (["--format", "w4a16", "--group-size", "48"], "48 does not divide 128"),
        (["--format", "w4a16", "--group-size", "-1"], "--group-size: must be positive"),
        (["--format", "w4a16", "--samples", "0"], "at least one prompt"),
        (["--format", "w4a16", "--adapter"], "an adapter has no other format"),
        (["--format", "hf", "w4a16", "--push", "me/mine", "--yes"], "is about one folder"),
        (["--format", "gguf"], "there is no 'gguf'"),
    ],
)
def test_wrong_use(
    arguments: list[str], what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert what in refused(capsys, model, "--out", tmp_path / "out", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    for name, format_ in formats.FORMATS.items():
        said = refused(capsys, model, "--out", tmp_path / "out", "--format", "hf", name)
        assert format_.modules[0].replace("_", "-") in said
        assert f'pip install "phi3v[{format_.extra}]"' in said
    assert not list(tmp_path.iterdir())


def test_every_extra_exists() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {format_.extra for format_ in formats.FORMATS.values()} <= set(project["optional-dependencies"])


def test_too_little_room_is_said_before_anything_is_made(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy, "free_space", lambda folder: 1_000_000)
    said = refused(capsys, model, "--out", tmp_path / "out", "--format", "w4a16")
    assert "there is no room" in said
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_its_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere/at/all"}')
    said = refused(capsys, adapter, "--out", tmp_path / "out", "--format", "w4a16")
    assert "/nowhere/at/all" in said
    assert "--model MODEL" in said
