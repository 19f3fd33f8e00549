"""`phi3v export --serve-check` before and around the server; the server itself is asked in tests/ecosystem/vllm."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from phi3v.cli import main
from phi3v.errors import UserError
from phi3v.export.serving import find_vllm, require_servable, running_server
from phi3v.model.presets import preset_config


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.delenv("PHI3V_VLLM", raising=False)


@pytest.mark.usefixtures("no_vllm")
def test_without_vllm_nothing_is_exported(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(tiny_model_dir), "--out", str(tmp_path / "out"), "--serve-check"]
    assert main(command) == 2
    assert "--serve-check: there is no vllm" in capsys.readouterr().err
    assert main([*command, "--vllm", "/nowhere/vllm"]) == 2
    assert "--vllm /nowhere/vllm" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--vllm", "vllm"], "is about --serve-check"),
        (["--serve-check", "--adapter"], "vLLM serves a merged model"),
        (["--serve-check", "--format", "w4a16"], "is about the official layout, not about w4a16"),
        (["--serve-check", "--vllm", "/bin/true"], "the vision tower and the vocabulary of the released ones only"),
    ],
)
def test_what_cannot_be_checked_is_refused(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["export", str(tiny_model_dir), "--out", str(tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such folder"), ("{", "config.json"), ("", "the vision tower and the vocabulary")],
)
def test_a_folder_is_verified_before_it_is_served(
    content: str | None, message: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no folder is not looked for on the hub either."""
    if content is not None:
        shutil.copytree(tiny_model_dir, tmp_path / "mine")
    if content:
        (tmp_path / "mine" / "config.json").write_text(content)
    assert main(["export", "--verify", str(tmp_path / "mine"), "--serve-check", "--vllm", "/bin/true"]) == 2
    printed = capsys.readouterr()
    assert message in printed.out + printed.err


def test_the_released_sizes_can_be_served() -> None:
    for preset in ("phi-3.5-vision", "phi-3-vision"):
        config = preset_config(preset)
        require_servable(config)
        config.quantization_config = {"quant_method": "compressed-tensors"}
        with pytest.raises(UserError, match="is for float models"):
            require_servable(config)


def test_vllm_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3V_VLLM", "/bin/true")
    assert find_vllm(None) == Path("/bin/true")
    assert find_vllm("/bin/false") == Path("/bin/false")


def test_an_environment_without_phi3v_cannot_serve(tmp_path: Path) -> None:
    for name, lines in (("vllm", ""), ("python", "echo \"{'other'}\"")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(UserError, match="phi3v is not installed beside it"):
        find_vllm(str(tmp_path / "vllm"))


def test_a_server_that_ends_shows_what_it_said_and_reports_to_nobody(tmp_path: Path) -> None:
    server = tmp_path / "vllm"
    server.write_text("#!/bin/sh\necho no memory left $VLLM_NO_USAGE_STATS\nexit 7\n")
    server.chmod(0o755)
    with (
        pytest.raises(UserError, match=r"ended with 7:\nno memory left 1$"),
        running_server(server, tmp_path, tmp_path / "log", 4096),
    ):
        pass
