"""Exports hold what was tuned, in the official layout; and what is wrong with a folder is said."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.cli import main
from phi3v.export import make, proof
from phi3v.model.checkpoint import checkpoint_shapes
from phi3v.serve.conversation import AnswerSettings, Chat, Turn
from phi3v.train.device import choose_device
from phi3v.train.finetuned import resolve_model


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHI3V_CACHE", str(tmp_path_factory.getbasetemp() / "phi3v-cache"))
        yield


def tune(model: Path, data: Path, out: Path, method: str, *more: object) -> Path:
    """A short run of which everything moves."""
    settings: dict[str, Any] = {
        "model.path": model,
        "data.train": data / "train.jsonl",
        "data.eval": data / "test.jsonl",
        "method.name": method,
        "method.lora.rank": 4,
        "training.output_dir": out,
        "training.max_steps": 2,
        "training.batch_size": 2,
        "training.micro_batch_size": 2,
        "training.learning_rate": 2e-2,
        "training.warmup_steps": 1,
        "evaluation.max_questions": 2,
        "evaluation.max_new_tokens": 2,
    }
    settings |= dict(zip(map(str, more[::2]), more[1::2], strict=True))
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    assert main(["train", *arguments]) == 0
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, small_model_dir: Path) -> Path:
    """A bf16 model as downloaded ones are: a dotted path, with auto_map and the official code's files."""
    folder = tmp_path_factory.mktemp("models") / "phi-3.5.tiny-v1.0"
    Phi3VForCausalLM.from_pretrained(small_model_dir, dtype=torch.bfloat16).save_pretrained(folder)
    Phi3VProcessor.from_pretrained(small_model_dir).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_phi3_v.py").write_text("# the official code\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, base: Path, easy_vqa: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    lora = ("method.lora.also_train", "[projector]")
    return {
        "full": tune(base, easy_vqa, folder / "full", "full"),
        "frozen-vision": tune(base, easy_vqa, folder / "frozen", "frozen-vision"),
        "lora": tune(base, easy_vqa, folder / "lora", "lora", *lora),
        "qlora": tune(base, easy_vqa, folder / "qlora", "qlora"),
    }


def answer_here(folder: Path, probes: list[proof.Probe], work: Path) -> proof.Answers:
    model, processor = proof.load_export(folder, torch.device("cpu"))
    return proof.answer_probes(model, processor, probes)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the export here: a fresh process costs seconds, and one test starts one."""
    monkeypatch.setattr(make, "answer_in_fresh_process", answer_here)


@pytest.fixture(scope="module")
def exported(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "full"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "answer_in_fresh_process", answer_here)
        assert main(["export", str(runs["full"]), "--out", str(folder), "--samples", "1"]) == 0
    return folder


def test_an_export_knows_what_to_compare_it_with(exported: Path, base: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["tuned_from"] == str(base)
    chat = Chat(resolve_model(str(exported)), choose_device("fp32"))
    assert chat.base == str(base)
    turns, settings = [Turn("what is this?")], AnswerSettings(max_new_tokens=4)
    *_, answer = chat.answer(turns, settings, "base")
    *_, same = Chat(resolve_model(str(base)), choose_device("fp32")).answer(turns, settings)
    assert answer == same


def test_damage_to_what_an_export_was_tuned_from_is_no_fault(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    for text in ("[]", "no json", '{"sha256": {}, "tuned_from": 3}'):
        (folder / "manifest.json").write_text(text)
        assert resolve_model(str(folder)).origin is None


def export(source: Path, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["export", str(source), "--out", str(out), "--samples", "2", "--json", *options]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("method", ["full", "frozen-vision", "lora", "qlora"])
def test_every_method_gives_the_official_layout(
    method: str,
    runs: dict[str, Path],
    base: Path,
    tmp_path: Path,
    in_this_process: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = export(runs[method], tmp_path / "out", capsys)
    assert result["dtype"] == "bfloat16"
    assert result["method"] == method
    assert checkpoint_shapes(tmp_path / "out") == checkpoint_shapes(base)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["auto_map"] == {"AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM"}
    assert (tmp_path / "out" / "modeling_phi3_v.py").is_file()
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    # The files hold the very weights: 1e-5 of the largest logit is the order of float32 sums.
    assert result["files"]["worst"] <= 1e-5 * max(1.0, result["files"]["largest"])
    assert result["files"]["equal_texts"] == result["files"]["num_texts"] == 2
    if method in ("lora", "qlora"):
        assert result["merge"]["worst"] <= 1e-5 * max(1.0, result["merge"]["largest"])
        # What was tuned differs by one rounding to bf16; of QLoRA by four bits as well.
        assert result["tuned"]["worst"] > 1e-5
    else:
        assert result["merge"] is None
        assert result["tuned"]["worst"] <= 1e-5 * max(1.0, result["tuned"]["largest"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve" in card
    assert "weights in 4 bits" in card or method != "qlora"
    assert main(["export", "--verify", str(tmp_path / "out")]) == 0


def test_an_export_in_float32_is_within_1e_5_in_a_fresh_process(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = export(runs["lora"], tmp_path / "out.v2", capsys, "--dtype", "float32", "--max-shard-size", "20KB")
    for name in ("merge", "files", "tuned"):
        assert result[name]["worst"] <= 1e-5 * max(1.0, result[name]["largest"]), name
    assert (tmp_path / "out.v2" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "out.v2").glob("model-*.safetensors"))) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.v2"]


def test_an_adapter_alone(
    runs: dict[str, Path], base: Path, tmp_path: Path, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "my.adapter v1"  # any name will do
    shutil.copytree(runs["lora"] / "final", moved)
    fields = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": "/gone"}))
    result = export(moved, tmp_path / "out", capsys, "--adapter", "--base", str(base))
    assert result["adapter"]
    assert result["files"]["worst"] <= 1e-5 * max(1.0, result["files"]["largest"])
    model = PeftModel.from_pretrained(Phi3VForCausalLM.from_pretrained(base), tmp_path / "out")
    assert "projector" not in model.peft_config["default"].target_modules
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert any("img_projection" in name and "lora" not in name for name in names)
    assert main(["export", "--verify", str(tmp_path / "out")]) == 0


def test_a_checkpoint_is_saved_in_the_base_s_dtype(
    runs: dict[str, Path], tmp_path: Path, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["full"], run)
    model = Phi3VForCausalLM.from_pretrained(run / "final", dtype=torch.float32)
    model.save_pretrained(run / "checkpoint-2" / "model")
    Phi3VProcessor.from_pretrained(run / "final").save_pretrained(run / "checkpoint-2" / "model")
    shutil.rmtree(run / "final")
    assert main(["export", str(run), "--out", str(tmp_path / "no")]) == 2
    said = capsys.readouterr().err
    assert "take" in said
    assert "checkpoint-2" in said
    result = export(run / "checkpoint-2", tmp_path / "out", capsys)
    assert result["dtype"] == "bfloat16"


def test_training_goes_on_from_an_export(
    runs: dict[str, Path], easy_vqa: Path, tmp_path: Path, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    export(runs["lora"], tmp_path / "first", capsys)
    tune(tmp_path / "first", easy_vqa, tmp_path / "full", "full")
    tune(tmp_path / "first", easy_vqa, tmp_path / "lora", "lora")
    result = export(tmp_path / "lora", tmp_path / "second", capsys)
    assert result["files"]["equal_texts"] == 2


def test_an_export_that_differs_leaves_nothing(
    runs: dict[str, Path], tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make._merge

    def half_merged(model: Any) -> Any:
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "qkv_proj" in name:
                parameter.data.mul_(0.5)  # lost on the way, after what was tuned has answered
        return whole(model)

    monkeypatch.setattr(make, "_merge", half_merged)
    with pytest.raises(make.ExportDiffersError, match="the merged weights do not answer"):
        main(["export", str(runs["lora"]), "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [(), ("--adapter",)], ids=["merged", "adapter"])
def test_images_are_read_from_an_export_as_they_were_in_training(
    options: tuple[str, ...], runs: dict[str, Path], tmp_path: Path, in_this_process: None
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(runs["lora"], run)
    config = (run / "config.yaml").read_text()
    for applied in (True, False):
        (run / "config.yaml").write_text(config.replace("exif_orientation: true", f"exif_orientation: {applied}"))
        assert main(["export", str(run), "--out", str(out), "--samples", "1", "--overwrite", *options]) == 0
        assert resolve_model(str(out)).run.data.exif_orientation == applied
        fields = json.loads((out / "preprocessor_config.json").read_text())
        assert fields.get("exif_orientation", "as official") == ("as official" if applied else False)
        assert Phi3VProcessor.from_pretrained(out).image_processor.exif_orientation == applied


@pytest.mark.parametrize("options", [(), ("--adapter",)], ids=["merged", "adapter"])
def test_a_disk_that_fills_up_is_said_and_nothing_is_left(
    options: tuple[str, ...],
    runs: dict[str, Path],
    tmp_path: Path,
    in_this_process: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the system refuses a file's next byte
    try:
        status = main(["export", str(runs["lora"]), "--out", str(tmp_path / "out"), *options])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"File too large.*: the export takes [\d.]+ MB, and [\d,.]+ MB are free", said)
    assert str(tmp_path) in said
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_is_found_before_anything_is_loaded(
    runs: dict[str, Path],
    base: Path,
    easy_vqa: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(make, "load_tuned", refuse)
    run = tmp_path / "run"
    shutil.copytree(runs["lora"], run)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nothing").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "empty")
    before = sorted(tmp_path.rglob("*"))
    for out, words in {
        run: "is or holds what the export is made from",
        tmp_path / "link": "is or holds",
        tmp_path: "is or holds",
        run / "final": "is or holds",
        run / "merged" / "deep": "lies inside",
        tmp_path / "link" / "merged": "lies inside",
        base: "is or holds",
        base / "tuned": "lies inside",
        easy_vqa: "is or holds",
        tmp_path / "file": "is a file",
        tmp_path / "file" / "out": "is a file",
        tmp_path / "nothing": "a link to nothing",
        tmp_path / "empty": "is a mount point",
        Path("/proc/none"): "cannot be written",
    }.items():
        assert main(["export", str(run), "--out", str(out), "--overwrite"]) == 2, out
        message = capsys.readouterr().err
        assert words in message, out
        assert f"--out {out}" in message
        assert "Traceback" not in message
    assert main(["export", str(run), "--out", str(tmp_path / "new"), "--max-shard-size", "5 apples"]) == 2
    assert "--max-shard-size 5 apples" in capsys.readouterr().err
    monkeypatch.setattr(make, "free_space", lambda folder: 1000)
    assert main(["export", str(run), "--out", str(tmp_path / "new")]) == 2
    assert " MB, and 0.0 MB are free" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["images", "one image", "file"])
def test_data_that_is_gone_is_drawn_instead(
    kind: str,
    base: Path,
    easy_vqa: Path,
    tmp_path: Path,
    in_this_process: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(easy_vqa, tmp_path / "data", symlinks=False)
    run = tune(base, tmp_path / "data", tmp_path / "run", "lora", "training.max_steps", 1, "evaluation.after", "false")
    if kind == "images":
        (tmp_path / "data" / "images").rename(tmp_path / "moved")
    elif kind == "one image":
        (tmp_path / "data" / "images" / "test" / "0.png").unlink()
    else:
        (tmp_path / "data" / "test.jsonl").unlink()
    result = export(run, tmp_path / "out", capsys, "--adapter")
    assert result["probes"].startswith("drawn images, as the run's own data cannot be used (")
    assert str(tmp_path / "data") in result["probes"]


def test_a_taken_folder_is_refused(
    runs: dict[str, Path], tmp_path: Path, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert main(["export", str(runs["full"]), "--out", str(tmp_path / "out")]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").is_file()
    export(runs["full"], tmp_path / "out", capsys, "--overwrite")
    assert not (tmp_path / "out" / "mine.txt").exists()


def without_special_tokens(folder: Path) -> None:
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    del fields["additional_special_tokens"]
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def test_special_tokens_are_named_where_the_source_does_not(base: Path, tmp_path: Path, in_this_process: None) -> None:
    """vLLM needs them; a file that has them stays as it is."""
    source = tmp_path / "source"
    shutil.copytree(base, source)
    own = (source / "tokenizer_config.json").read_text().replace('"<|user|>"\n', '"<|user|>", "<|end|>"\n')
    (source / "tokenizer_config.json").write_text(own)
    assert main(["export", str(source), "--out", str(tmp_path / "whole"), "--samples", "1"]) == 0
    assert (tmp_path / "whole" / "tokenizer_config.json").read_text() == own
    without_special_tokens(source)
    assert main(["export", str(source), "--out", str(tmp_path / "named"), "--samples", "1"]) == 0
    fields = json.loads((tmp_path / "named" / "tokenizer_config.json").read_text())
    assert set(fields["additional_special_tokens"]) == {"<|system|>", "<|user|>", "<|end|>"}


def broken(folder: Path, how: str) -> None:
    """Break a model folder in one way."""
    weights = load_file(folder / "model.safetensors")
    first = "model.norm.weight"
    if how == "missing":
        del weights[first]
    elif how == "unknown":
        weights["model.extra"] = torch.zeros(2)
    elif how == "shape":
        weights[first] = torch.zeros(3)
    elif how == "empty":
        weights[first] = torch.zeros(0)
    elif how == "infinite":
        weights[first][0] = torch.inf
    elif how == "second embeddings":
        weights["model.vision_embed_tokens.wte.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if how == "end":
        fields = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps(fields | {"eos_token_id": 2}))
    elif how == "processor":
        (folder / "preprocessor_config.json").unlink()
    elif how == "special tokens":
        without_special_tokens(folder)
    if how != "manifest":
        (folder / "manifest.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("missing", 2, "1 tensors are missing, first model.norm.weight"),
        ("unknown", 2, "1 tensors are unknown to the architecture, first model.extra"),
        ("shape", 2, "1 tensors are of another shape, first model.norm.weight"),
        ("empty", 2, "1 tensors are of another shape, first model.norm.weight"),
        ("infinite", 2, "model.norm.weight is not finite"),
        ("second embeddings", 0, "a second copy of the embeddings"),
        ("end", 2, "answers end at"),
        ("processor", 2, "processor: cannot be loaded"),
        ("special tokens", 0, "has no additional_special_tokens"),
        ("manifest", 2, "1 files are missing or not what was written, first model.safetensors"),
    ],
)
def test_verify_says_what_is_wrong(
    how: str, code: int, said: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    if how == "manifest":
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
    else:
        broken(folder, how)
    capsys.readouterr()
    assert main(["export", "--verify", str(folder)]) == code
    assert said in capsys.readouterr().out


def test_a_run_ends_answers_where_the_chat_format_does(runs: dict[str, Path], base: Path) -> None:
    """Whatever the source said: the base of these runs knew one of the two tokens."""
    of_base, of_run = (
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        for folder in (base, runs["full"] / "final")
    )
    tokenizer = Phi3VProcessor.from_pretrained(base).tokenizer
    ends = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    assert of_base != ends
    assert of_run[:2] == ends


def test_verify_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--verify", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["export"]) == 2
    assert "name what to export" in capsys.readouterr().err
