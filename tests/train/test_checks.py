"""One list of what makes a run impossible: what `train` raises is what `doctor` fails and what `plan` refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from phi3v.config import RunConfig, load_config
from phi3v.doctor import diagnosis
from phi3v.errors import UserError
from phi3v.findings import Report
from phi3v.model.configuration import Phi3VConfig
from phi3v.plan.hardware import Machine, find_machine
from phi3v.plan.inputs import planned_runtime, recipe_changes, setup_from_config
from phi3v.plan.planner import Planner
from phi3v.train import prepare as setup
from phi3v.train.checks import Case, refusals
from phi3v.train.collectives import HostCollectives
from phi3v.train.methods.loading import make_skeleton
from phi3v.train.methods.strategies import apply_method, summarize, trained_parts

MACHINES = ("cpu", "t4", "h100", "2xv100-32gb", "2xa100-80gb", "4xmi300x")
LEAN = ("training.lean=true", "training.optimizer=adamw_8bit", "training.max_grad_norm=0", "training.precision=bf16")
AUROC = ("evaluation.metrics=[auroc]",)
CACHED = "training.feature_cache=memory"
SHORT = "training.batch_size=4"
ADAPTERS = ("method.name=lora", "method.lora.rank=2")

NOWHERE = "x" * len(MACHINES)
# Keys, and of each machine in order whether it can run: x where not.
GRID: list[tuple[tuple[str, ...], str]] = [
    ((), "......"),
    (ADAPTERS, "......"),
    (("method.name=qlora", *ADAPTERS[1:]), "...x.."),
    (LEAN, NOWHERE),  # 16 micro-batches
    ((*LEAN, SHORT, "training.micro_batch_size=4"), ".x.xxx"),
    ((*LEAN, SHORT, "training.micro_batch_size=4", "training.activation_checkpointing=none"), NOWHERE),
    ((*LEAN, SHORT, "training.micro_batch_size=4", "training.activation_checkpointing=offload"), ".x.xxx"),
    (("training.activation_checkpointing=offload",), "......"),
    (("training.activation_checkpointing=offload", "training.compile=true"), NOWHERE),
    ((*LEAN, "data.packing=samples"), NOWHERE),
    ((CACHED,), NOWHERE),
    (("method.name=frozen-vision", CACHED), "......"),
    ((*ADAPTERS, "method.lora.parts=[decoder]", CACHED), "......"),
    ((*ADAPTERS, "method.lora.targets=[qkv_proj]", "method.lora.also_train=[vision]", CACHED), NOWHERE),
    ((*ADAPTERS, "method.lora.targets=[qkv_porj]"), NOWHERE),
    (("distributed.engine=zero2",), "xxx..."),
    (("distributed.engine=zero3", "training.compile=true"), NOWHERE),
    (("distributed.engine=zero3", "training.kernels=liger"), NOWHERE),
    (("distributed.engine=fsdp2",), "xxxx.."),
    (("distributed.engine=fsdp2", "method.name=frozen-vision", CACHED), NOWHERE),
    (("distributed.offload_optimizer=true",), "xxx..."),
    (("training.batch_size=18",), ".....x"),
    (("training.fp8=true",), "xx.xxx"),
    (("training.kernels=liger",), "xx.x.."),
    (("model.attention=flash_attention_2",), "xx.x.."),
    (("model.attention=varlen",), NOWHERE),
    (("training.report_to=[wandb]",), "x....."),
    ((*AUROC, "evaluation.answer_words=[red, blue]"), "......"),
    ((*AUROC, "evaluation.answer_words=[yes, no]"), NOWHERE),
    (("data.packing=samples",), "......"),  # three records
    (("data.eval=null", "evaluation.eval_steps=5"), NOWHERE),
    (("data.train=TEXT",), NOWHERE),
    (("data.train=TEXT", "method.name=frozen-vision"), "......"),
]


class BegunError(Exception):
    """Everything was checked."""


@pytest.fixture
def files(tmp_path: Path, easy_vqa: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Three records with images, as many without, and two to measure on."""
    (tmp_path / "images").symlink_to(easy_vqa / "images")
    lines = (easy_vqa / "train.jsonl").read_text().splitlines()[:3]
    records = [json.loads(line) for line in lines]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    for record in records:
        for turn in record["conversations"]:
            turn.pop("images", None)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    asked = [records[0] | {"id": word, "conversations": [{"user": "?", "assistant": word}]} for word in ("red", "blue")]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))

    def begin(*args: Any) -> None:
        raise BegunError

    monkeypatch.setattr(setup, "load_for_training", begin)
    names = {"data.train": "train", "TEXT": "text", "data.eval": "eval"}
    return {key: tmp_path / f"{name}.jsonl" for key, name in names.items()}


def refused_by_train(config: RunConfig, machine: Machine) -> str | None:
    try:
        setup.prepare(config, Console(quiet=True), planned_runtime(config, machine), HostCollectives(1))
    except UserError as error:
        return f"{error.where}: {error.what}"
    except BegunError:
        return None
    raise AssertionError


def failed_by_doctor(config: RunConfig, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(
        diagnosis, "choose_device", lambda precision: planned_runtime(config, machine), HostCollectives(1)
    )
    report = Report()
    case, _, processor = diagnosis.check_setup(config, report)
    diagnosis.check_data(config, report, case, processor)
    return [finding.what for finding in report.findings if finding.verdict == "fail"]


def refused_by_plan(planner: Planner, machine: Machine) -> str | None:
    """Why the recipe as it is cannot run; what is recommended in its place can."""
    try:
        plan = planner.plan(machine)
    except UserError as error:
        return f"{error.where}: {error.what}"
    if plan.recommended is not None:
        recipe = planner.config.with_keys(recipe_changes(plan.recommended.setup))
        facts = Case(recipe, planned_runtime(recipe, machine), planner.skeleton, planner.data)
        assert not refusals(facts)
    return plan.own.reason if plan.own.refusal else None


@pytest.mark.parametrize(("keys", "expected"), GRID, ids=[" ".join(keys)[-50:] for keys, _ in GRID])
def test_train_doctor_and_plan_agree(
    keys: tuple[str, ...],
    expected: str,
    files: dict[str, Path],
    small_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"model.path": small_model_dir, "training.output_dir": tmp_path / "run", "data.num_workers": 0}
    settings |= {key: files[key] for key in ("data.train", "data.eval")}
    settings |= dict(key.replace("TEXT", str(files["TEXT"])).split("=", 1) for key in keys)
    config = load_config(None, [f"--{key}={value}" for key, value in settings.items()])
    planner = Planner(config, progress=False)
    found = ""
    for name in MACHINES if expected != NOWHERE else MACHINES[::4]:
        machine = find_machine(name, None)
        refusal = refused_by_train(config, machine)
        found += "." if refusal is None else "x"
        failed = failed_by_doctor(config, machine, monkeypatch)
        assert (refusal in failed) if refusal else not failed, (name, refusal, failed)
        assert refused_by_plan(planner, machine) == refusal, name
    assert found == expected[: len(found)]


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("--method.name=frozen-vision",),
        ("--method.name=frozen-vision", "--method.train_embeddings=true"),
        ("--method.name=lora",),
        ("--method.name=lora", "--method.lora.parts=[head, projector]"),
        ("--method.name=lora", "--method.lora.targets=[fc1]", "--method.lora.also_train=[projector]"),
    ],
)
def test_what_trains_is_known_before_it_does(keys: tuple[str, ...], small_model_dir: Path) -> None:
    method = load_config(None, keys).method
    model = make_skeleton(Phi3VConfig.from_pretrained(small_model_dir))
    expected = trained_parts(model, method)
    assert {part.part for part in summarize(apply_method(model, method)) if part.trainable} == expected


def test_a_start_that_one_method_cannot_have_stops_no_plan(small_model_dir: Path) -> None:
    """PiSSA does not go with four bits, which is one method's fault, not the plan's."""
    keys = [f"--model.path={small_model_dir}", "--method.name=lora", "--method.lora.init=pissa"]
    plan = Planner(load_config(None, keys), progress=False).plan(find_machine("t4", None))
    assert plan.recommended is not None
    (qlora,) = (option for option in plan.options if option.setup.method.name == "qlora")
    assert "cannot be kept in 4 bits" in qlora.reason


def test_another_engine_than_the_recipes_is_said() -> None:
    config = load_config(None, ["--distributed.engine=zero3", "--training.compile=true", "--training.batch_size=8"])
    plan = Planner(config, progress=False).plan(find_machine("8xa100-80gb", None))
    assert plan.recommended is not None
    assert plan.recommended.setup.engine != "zero3"
    assert "zero3 gathers weights in hooks that torch.compile would break up" in plan.reason
    assert all(option.refusal for option in plan.options if option.setup.engine == "zero3")


def test_lean_mode_is_planned_as_it_trains() -> None:
    """4 bytes a parameter with adamw_8bit, 6 with adamw_bf16: weights and moments, no gradients."""
    for optimizer, size in (("adamw_8bit", 4), ("adamw_bf16", 6)):
        keys = ["lean=true", f"optimizer={optimizer}", "max_grad_norm=0", "batch_size=1"]
        planner = Planner(load_config(None, [f"--training.{key}" for key in keys]), progress=False)
        machine = find_machine("a100-80gb", None)
        planned = setup_from_config(planner.config, machine, 16)
        assert planned.checkpointing == "full"
        parts, trained = planner.memory(planned, machine).parts, planner.counts(planned).trainable
        assert (parts["weights"] + parts["optimizer"]) / trained == pytest.approx(size, rel=0.03)
        assert parts["gradients"] < 0.25 * trained  # the largest one
