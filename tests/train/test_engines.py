"""Every engine on two real processes comes to what one process comes to; and is the engine that was asked for."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import save_and_load, train_undivided
from ranks import run_ranks
from rich.console import Console
from run_helpers import read_metrics
from safetensors.torch import load_file

from phi3v.cli import main
from phi3v.config import RunConfig, load_config
from phi3v.export.make import export
from phi3v.model.checkpoint import checkpoint_shapes
from phi3v.train.checks import Case, refusals
from phi3v.train.device import RuntimeDevice
from phi3v.train.engines.base import WrongEngineError
from phi3v.train.engines.choice import EngineChoice, choose_engine
from phi3v.train.engines.data_parallel import DataParallel

OFFLOAD = {"distributed.offload_optimizer": "true"}
RECOMPUTE = {"training.activation_checkpointing": "full"}
OFFLOADED = {"training.activation_checkpointing": "offload"}
REPLICAS = {"distributed.replicas": 2}
PACKED = {"data.packing": "shared-image", "data.pack_tokens": 900}
# name: (method, engine, more settings)
MATRIX: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full-ddp": ("full", "ddp", {}),
    "full-zero1": ("full", "zero1", {}),
    "full-zero2": ("full", "zero2", {}),
    "full-zero3": ("full", "zero3", {}),
    "full-zero2-offload": ("full", "zero2", OFFLOAD),
    "full-zero3-offload": ("full", "zero3", OFFLOAD),
    "full-fsdp2": ("full", "fsdp2", {}),
    "full-hsdp": ("full", "fsdp2", REPLICAS),
    "full-hsdp-packed": ("full", "fsdp2", REPLICAS | PACKED),
    "lora-hsdp": ("lora", "fsdp2", REPLICAS),
    "qlora-hsdp": ("qlora", "fsdp2", REPLICAS),
    "full-zero2-recomputed": ("full", "zero2", RECOMPUTE),
    "full-zero3-recomputed": ("full", "zero3", RECOMPUTE),
    "full-fsdp2-recomputed": ("full", "fsdp2", RECOMPUTE),
    "full-ddp-offloaded": ("full", "ddp", OFFLOADED),
    "full-zero2-offloaded": ("full", "zero2", OFFLOADED),
    "full-zero3-offloaded": ("full", "zero3", OFFLOADED),
    "full-fsdp2-offloaded": ("full", "fsdp2", OFFLOADED),
    "full-hsdp-offloaded-packed": ("full", "fsdp2", OFFLOADED | REPLICAS | PACKED),
    "full-zero1-packed": ("full", "zero1", PACKED),
    "full-zero2-packed": ("full", "zero2", PACKED),
    "full-zero3-packed": ("full", "zero3", PACKED),
    "full-fsdp2-packed": ("full", "fsdp2", PACKED),
    "frozen-vision-zero2": ("frozen-vision", "zero2", {}),
    "frozen-vision-zero3": ("frozen-vision", "zero3", {}),
    "frozen-vision-fsdp2": ("frozen-vision", "fsdp2", {}),
    "lora-ddp": ("lora", "ddp", {}),
    "lora-zero2": ("lora", "zero2", {}),
    "lora-zero3": ("lora", "zero3", {}),
    "lora-fsdp2": ("lora", "fsdp2", {}),
    "qlora-ddp": ("qlora", "ddp", {}),
    "qlora-zero2": ("qlora", "zero2", {}),
    "qlora-fsdp2": ("qlora", "fsdp2", {}),
}
DEFAULT = ("full-zero2", "lora-zero2", "full-zero3-packed", "full-fsdp2-offloaded")

Alone = Any  # what one process came to, by its settings


def train(ranks: int, model: Path, data: Path, out: Path, *options: str, **others: object) -> str:
    settings = {
        "model.path": model,
        "data.train": data / "train.jsonl",
        "data.eval": data / "test.jsonl",
        "data.num_workers": 0,
        "method.lora.rank": 8,
        "training.output_dir": out,
        "training.max_steps": 4,
        "training.batch_size": 4,
        "training.learning_rate": 2e-3,
        "training.warmup_steps": 1,
        "training.logging_steps": 1,
        "evaluation.before": "false",
        "evaluation.max_questions": 3,
        "evaluation.max_new_tokens": 3,
    } | others
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return run_ranks(ranks, main, ["train", *arguments, *options], folder=out.with_name(f"{out.name}-printed"))


@pytest.fixture(scope="module")
def alone(small_model_dir: Path, easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The run folder of one process with these settings; each is run once."""
    done: dict[str, Path] = {}

    def run(**settings: object) -> Path:
        key = json.dumps(settings, sort_keys=True)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("alone") / "run"
            train(1, small_model_dir, easy_vqa, done[key], **settings)
        return done[key]

    return run


@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, 4) for name in DEFAULT] + [pytest.param(name, 20, marks=pytest.mark.slow) for name in MATRIX],
)
def test_an_engine_agrees_with_one_process(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, alone: Alone, name: str, steps: int
) -> None:
    method, engine, more = MATRIX[name]
    settings: dict[str, object] = {"method.name": method, "training.max_steps": steps}
    # What an engine has settings for makes no difference to one process; packed rows do, in the order of the data.
    reference = alone(**settings, **{key: value for key, value in more.items() if key in PACKED})
    shown = train(2, small_model_dir, easy_vqa, tmp_path / "run", **settings, **{"distributed.engine": engine}, **more)
    assert f"engine: {engine} (as configured" in shown
    one, two = read_metrics(reference), read_metrics(tmp_path / "run")
    assert len(one) == len(two) == steps
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True))
    assert worst < 1e-5
    for a, b in zip(one, two, strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert (b["samples"], b["questions"], b["tokens"]) == (a["samples"], a["questions"], a["tokens"])
    trained_alone, trained = (weights(folder / "final") for folder in (reference, tmp_path / "run"))
    assert trained.keys() == trained_alone.keys()
    difference = max(float((trained[key] - trained_alone[key]).abs().max()) for key in trained)
    if report := os.environ.get("PHI3V_ENGINE_REPORT"):
        with open(report, "a") as file:
            print(json.dumps({"name": name, "steps": steps, "loss": worst, "weights": difference}), file=file)
    # Adam divides by the gradient's size, so a tensor whose gradient is rounding alone moves by rounding alone.
    assert difference < 1e-4
    if steps == 20:
        require_exact_export(tmp_path / "run", tmp_path / "export", small_model_dir, method)


def require_exact_export(run: Path, out: Path, base: Path, method: str) -> None:
    """Whatever the engine, an export has the official keys and answers as the run does, within 1e-5 in float32."""
    result = export(str(run), out, Console(quiet=True), dtype="float32", samples=2)
    assert checkpoint_shapes(out) == checkpoint_shapes(base)
    assert result.files.same
    assert result.merge is None or result.merge.same
    assert result.tuned.same or method == "qlora"  # tuned over 4-bit weights, merged into whole ones


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_replicas_of_shards_agree_with_one_process(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, alone: Alone, packed: bool
) -> None:
    """Four ranks are two by two; float32 sums in another order, as of every engine."""
    more = PACKED if packed else {}
    reference = alone(**more)
    settings = {"distributed.engine": "fsdp2", **REPLICAS, **more}
    shown = train(4, small_model_dir, easy_vqa, tmp_path / "run", **settings)
    assert "2 replicas, each sharded over 2 ranks" in shown
    one, four = read_metrics(reference), read_metrics(tmp_path / "run")
    assert [line["loss"] for line in four] == pytest.approx([line["loss"] for line in one], abs=1e-5)
    assert [line["grad_norm"] for line in four] == pytest.approx([line["grad_norm"] for line in one], rel=1e-4)
    trained_alone, trained = (weights(folder / "final") for folder in (reference, tmp_path / "run"))
    assert max(float((trained[key] - trained_alone[key]).abs().max()) for key in trained_alone) < 1e-4
    # Evaluated by copies of the whole model, of which every rank has one.
    scores = [json.loads((folder / "eval_after.json").read_text()) for folder in (reference, tmp_path / "run")]
    assert scores[0]["scores"] == scores[1]["scores"]


@pytest.mark.parametrize(
    ("engine", "more"),
    [
        ("ddp", {}),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3", "fsdp2")),
        pytest.param("fsdp2", REPLICAS, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_summed_in_bf16(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, alone: Alone, engine: str, more: dict[str, Any]
) -> None:
    """bf16 has 8 bits: every rank's part of a gradient and their sum are off by at most 1/512 of themselves."""
    reference = alone()
    settings = {"distributed.engine": engine, "distributed.reduce_dtype": "bf16", **more}
    train(2, small_model_dir, easy_vqa, tmp_path / "run", **settings)
    one, two = (read_metrics(folder)[0]["grad_norm"] for folder in (reference, tmp_path / "run"))
    assert 2e-6 < abs(two / one - 1) < 1 / 256  # above what float32 sums differ by
    losses = ([line["loss"] for line in read_metrics(folder)] for folder in (reference, tmp_path / "run"))
    assert next(losses) == pytest.approx(next(losses), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_bf16_stays_near_float32(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, alone: Alone, engine: str
) -> None:
    """bf16 has 8 bits: a relative 0.4 % an operation, which four steps and a loss of 6.6 carry to some hundredths."""
    reference = alone(**{"training.max_steps": 4})
    more = {"distributed.engine": engine, "training.precision": "bf16"}
    train(2, small_model_dir, easy_vqa, tmp_path / "run", **more)
    pairs = zip(read_metrics(reference), read_metrics(tmp_path / "run"), strict=True)
    assert max(abs(a["loss"] - b["loss"]) for a, b in pairs) < 0.05
    assert {tensor.dtype for tensor in weights(tmp_path / "run" / "final").values()} == {torch.float32}


@pytest.mark.parametrize("engine", [pytest.param("zero3", marks=pytest.mark.slow), "fsdp2"])
def test_a_divided_model_is_measured_and_the_best_kept(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, engine: str
) -> None:
    """Uneven shares of questions in the middle of training; a rank without a picture meets one that has some."""
    lines = (easy_vqa / "train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[:8]]
    for record in records[::2]:
        for turn in record["conversations"]:
            turn.pop("images", None)
    mixed = tmp_path / "data"
    mixed.mkdir()
    (mixed / "images").symlink_to(easy_vqa / "images")
    (mixed / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (mixed / "test.jsonl").write_text((easy_vqa / "test.jsonl").read_text())
    train(
        *(2, small_model_dir, mixed, tmp_path / "run"),
        **{
            "method.name": "frozen-vision",
            "distributed.engine": engine,
            "training.batch_size": 2,
            "evaluation.eval_steps": 1,
            "evaluation.keep_best": "true",
            "evaluation.metrics": "[anls]",
            "training.max_steps": 2,
        },
    )
    best, final = (weights(tmp_path / "run" / name) for name in ("best", "final"))
    assert best.keys() == final.keys() == weights(small_model_dir).keys()
    assert all(torch.equal(best[name], final[name]) for name in best)


@pytest.mark.parametrize(
    ("engine", "replicas"),
    [
        ("zero2", 1),
        pytest.param("zero3", 1, marks=pytest.mark.slow),
        ("fsdp2", 1),
        pytest.param("fsdp2", 2, marks=pytest.mark.slow),
    ],
)
def test_weights_and_optimizer_go_out_and_come_back(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, engine: str, replicas: int
) -> None:
    places = (small_model_dir, easy_vqa, tmp_path / "run")
    run_ranks(2 * replicas, save_and_load, engine, replicas, *places, folder=tmp_path / "printed")


@pytest.mark.parametrize(
    "engine", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3")), "fsdp2"]
)
def test_a_divided_run_goes_on_on_more_ranks(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, engine: str
) -> None:
    """Float32 sums in another order: losses within 1e-5 of one process that was never interrupted."""
    settings: dict[str, object] = {"training.batch_size": 6, "training.schedule": "constant_with_warmup"}
    settings |= {"checkpoint.save_steps": 2}
    train(1, small_model_dir, easy_vqa, tmp_path / "one", **settings)
    settings["distributed.engine"] = engine
    out = tmp_path / "run"
    train(2, small_model_dir, easy_vqa, out, **settings, **{"training.max_steps": 2})
    shown = train(3, small_model_dir, easy_vqa, out, "--resume", **settings)
    assert "saved on 2 ranks, going on on 3" in shown
    one, more = read_metrics(tmp_path / "one"), read_metrics(out)
    assert [line["step"] for line in more] == [1, 2, 3, 4]
    assert [line["loss"] for line in more] == pytest.approx([line["loss"] for line in one], abs=1e-5)


def test_another_engine_than_asked_for_is_noticed(tmp_path: Path, small_model_dir: Path, easy_vqa: Path) -> None:
    run_ranks(2, train_undivided, small_model_dir, easy_vqa, tmp_path / "run", folder=tmp_path / "printed")
    one = RuntimeDevice(torch.device("cpu"), "fp32", "", 0, 1)
    with pytest.raises(WrongEngineError, match="the engine is ddp, but what trains is Linear"):
        DataParallel(torch.nn.Linear(1, 1), EngineChoice("ddp", ""), RunConfig(), one).prepare(1)


def config(*overrides: object) -> RunConfig:
    pairs = zip(overrides[::2], overrides[1::2], strict=True)
    return load_config(None, [part for name, value in pairs for part in (f"--{name}", str(value))])


def refused(ranks: int, *overrides: object) -> str:
    return "\n".join(map(str, refusals(Case(config(*overrides), runtime(ranks)))))


def runtime(ranks: int, precision: str = "fp32") -> RuntimeDevice:
    return RuntimeDevice(torch.device("cpu"), precision, "", 0, ranks)


@pytest.mark.parametrize(
    ("ranks", "method", "expected"),
    [(1, "full", "none"), (2, "full", "zero2"), (2, "frozen-vision", "zero2"), (2, "lora", "ddp"), (2, "qlora", "ddp")],
)
def test_the_default_is_the_public_recipes(ranks: int, method: str, expected: str) -> None:
    assert choose_engine(config("method.name", method), runtime(ranks)).name == expected


def test_the_default_goes_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    choice = choose_engine(config(), runtime(2))
    assert choice.name == "ddp"
    assert "DeepSpeed is not installed" in choice.reason
    assert re.search(r"(?s)zero2 needs DeepSpeed.*phi3v\[deepspeed\]", refused(2, "distributed.engine", "zero2"))


def test_the_default_respects_the_optimizer() -> None:
    choice = choose_engine(config("training.optimizer", "adamw_8bit"), runtime(2))
    assert (choice.name, "does not go with adamw_8bit" in choice.reason) == ("ddp", True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("distributed.engine", "zero3", "method.name", "qlora"), "4-bit weights.*use fsdp2"),
        (("distributed.engine", "zero2", "training.optimizer", "adamw_8bit"), "moments of adamw_8bit.*use adamw"),
        (("distributed.engine", "zero2", "training.optimizer", "adamw_bf16"), "moments of adamw_bf16.*use adamw"),
        (("distributed.engine", "fsdp2", "training.optimizer", "adamw_bf16"), "updates whole ones.*use adamw"),
        (("distributed.engine", "zero3", "training.compile", "true"), "torch.compile.*zero2"),
        (("distributed.engine", "zero3", "training.kernels", "liger"), "Liger's loss.*zero2"),
        (("distributed.engine", "fsdp2", "training.feature_cache", "memory"), "cached features.*zero2"),
        (("distributed.engine", "ddp", "distributed.offload_optimizer", "true"), "not ddp.*zero2"),
        (("distributed.engine", "zero3", "distributed.replicas", "2"), "the engine is zero3.*fsdp2"),
        (("distributed.engine", "fsdp2", "distributed.replicas", "3"), "2 ranks cannot be split into 3"),
        (
            (*("distributed.engine", "ddp", "distributed.reduce_dtype", "fp32"), "training.optimizer", "adamw_bf16"),
            "bf16.*leave it at auto",
        ),
        (("checkpoint.format", "sharded", "method.name", "lora"), "adapters, and moments .* whole.*auto"),
        (("checkpoint.format", "sharded", "training.optimizer", "adamw_8bit"), "adapters, and moments .* whole.*auto"),
    ],
)
def test_what_cannot_work_is_refused_with_what_does(overrides: tuple[object, ...], message: str) -> None:
    assert re.search(f"(?s){message}", refused(2, *overrides))


@pytest.mark.parametrize(
    ("replicas", "node_ranks", "expected"),
    [
        (1, 8, ""),
        (2, 8, "; 2 replicas, each sharded over 4 ranks"),
        (2, 4, "; 2 replicas, each sharded over 4 ranks"),
        (8, 4, "; 8 replicas, each sharded over 1 rank"),
        (
            *(1, 4),
            "; every layer is gathered over the network between machines, which distributed.replicas 2 would keep "
            "within one if a copy fits",
        ),
    ],
)
def test_layers_that_are_gathered_over_the_network_are_told(replicas: int, node_ranks: int, expected: str) -> None:
    eight = RuntimeDevice(torch.device("cpu"), "fp32", "", 0, 8, node_ranks)
    choice = choose_engine(config("distributed.engine", "fsdp2", "distributed.replicas", replicas), eight)
    assert choice.reason == f"as configured{expected}"
    assert choice.state_bytes(16, 8) == 16 * replicas // 8


def test_one_process_has_nothing_to_divide() -> None:
    found = refused(1, "distributed.engine", "zero2")
    assert re.search(r"(?s)zero2 divides a model.*there is one.*torchrun", found)
    assert re.search(r"(?s)not none.*zero2", refused(1, "distributed.offload_optimizer", "true"))
