"""Packing in the plan: the rows are those that training lays, and the recommendation names them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from phi3v.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, load_config
from phi3v.data.batches import BatchPlan, RowPlan
from phi3v.data.lengths import measure_table
from phi3v.data.rows import RowDataset
from phi3v.data.table import open_table
from phi3v.errors import UserError
from phi3v.model.shape import Costs
from phi3v.plan.hardware import find_machine
from phi3v.plan.inputs import TrainSetup, setup_from_config
from phi3v.plan.options import planned_recipe
from phi3v.plan.planner import Planner
from phi3v.plan.rows import pack_workload
from phi3v.plan.workload import read_workload
from phi3v.processing.processor import Phi3VProcessor


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions about each of two pictures, three records without one, two with a picture in the second turn."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "images").mkdir()
    for name, size in (("wide", (640, 480)), ("small", (64, 64))):
        Image.new("RGB", size, (90, 60, 30)).save(folder / "images" / f"{name}.png")
    ask = {"user": "what is it?", "assistant": "a picture"}
    records = [
        [{"images": [f"{name}.png"], "user": f"{k} what is it?", "assistant": "a picture"}]
        for name in ("wide", "small")
        for k in range(10)
    ]
    records += [[ask]] * 3 + [[ask, {"images": ["small.png"]} | ask]] * 2
    lines = [json.dumps({"id": str(k), "conversations": turns}) for k, turns in enumerate(records)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


def config_of(data: Path, model: Path, **settings: object) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(model), num_crops=4),
        data=DataConfig(train=str(data), **settings),  # type: ignore[arg-type]
        training=TrainingConfig(batch_size=8),
    )


@pytest.mark.parametrize("packing", ["samples", "shared-image"])
def test_rows_are_those_of_training(data: Path, tiny_model_dir: Path, packing: str) -> None:
    """Against the rows themselves: within the few tokens after a picture that questions have in common."""
    config = config_of(data, tiny_model_dir, packing=packing, pack_tokens=1500)
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir, num_crops=4)
    workload = read_workload(config.data, processor, progress=False)
    setup = TrainSetup(packing=config.data.packing, pack_tokens=1500, num_crops=4)
    rows = pack_workload(workload, setup, config, Costs())
    table = open_table(data)
    plan = BatchPlan(
        measure_table(table, processor).at(4),
        config.data.packing,
        batch_size=8,
        pack_tokens=1500,
        shared_image_max=config.data.shared_image_max,
    )
    dataset = RowDataset(table, processor, packed=True)
    made = [dataset[RowPlan(row, False)] for step in islice(plan.steps(0), 200) for row in step[0]]
    assert rows.steps == plan.num_steps
    assert rows.row_count == len(made) / plan.num_steps
    assert rows.largest.tokens == pytest.approx(max(row["input_ids"].numel() for row in made), rel=0.05)
    assert rows.largest.answer_tokens == max(int((row["labels"] != -100).sum()) for row in made)
    total = sum(row["input_ids"].numel() for row in made)
    assert rows.work.tokens * len(workload) == pytest.approx(total, rel=0.05)
    pairs = sum(sum(rest) * (prefix + sum(rest)) for row in made for prefix, *rest in row["layout"] if prefix)
    assert (rows.largest.branch_pairs > 0) == (pairs > 0)


def test_records_with_other_images_share_none(data: Path, tiny_model_dir: Path) -> None:
    """Lengths that come with an index of shards may say that they do."""
    table = open_table(data)
    dataset = RowDataset(table, Phi3VProcessor.from_pretrained(tiny_model_dir, num_crops=4), packed=True)
    other = next(index for index, record in enumerate(table) if record.images != table[0].images)
    with pytest.raises(UserError, match=rf"{re.escape(table.where(table[other]))}: has other images"):
        dataset[RowPlan(((0, other),), True)]


def test_sharing_saves_tokens_and_crops(data: Path, tiny_model_dir: Path) -> None:
    config = config_of(data, tiny_model_dir)
    config.training.batch_size = 25  # all records, so that those of a page meet whatever the order
    planner = Planner(config, progress=False)
    setup = TrainSetup(num_crops=4, pack_tokens=2048)
    alone, shared = (planner.rows(replace(setup, packing=packing)).work for packing in ("samples", "shared-image"))
    assert shared.tokens < 0.5 * alone.tokens
    assert shared.crops < 0.5 * alone.crops
    assert shared.answer_tokens == alone.answer_tokens
    assert shared.tokens_squared < alone.tokens_squared
    machine = find_machine("a100-80gb", None)
    speeds = [planner.speed(replace(setup, packing=p), machine).samples_per_second for p in ("samples", "shared-image")]
    assert speeds[1] > 2 * speeds[0]


def test_the_recommendation_packs_and_says_so(data: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    planner = Planner(config_of(data, tiny_model_dir), progress=False)
    plan = planner.plan(find_machine("2xa100-80gb", None))
    assert plan.recommended is not None
    setup, rows = plan.recommended.setup, plan.recommended.rows
    assert setup.packing == "shared-image"
    assert rows is not None
    assert rows.most_rows == 1
    (tmp_path / "planned.yaml").write_text(planned_recipe(plan))
    written = load_config(tmp_path / "planned.yaml")
    assert (written.data.packing, written.data.pack_tokens) == ("shared-image", setup.pack_tokens)
    assert written.training.micro_batch_size == 1
    assert written.training.batch_size == 8
    assert plan.to_json_dict()["recommended"]["pack_tokens"] == setup.pack_tokens


def test_a_packed_recipe_is_planned_as_it_is(data: Path, tiny_model_dir: Path) -> None:
    config = config_of(data, tiny_model_dir, packing="samples", pack_tokens=4096)
    config.training.batch_tokens = 2000
    plan = Planner(config, progress=False).plan(find_machine("t4", None))
    assert plan.own.setup.packing == "samples"
    assert plan.own.rows is not None
    assert plan.steps == plan.own.rows.steps > 1


def test_lean_runs_are_not_packed(data: Path, tiny_model_dir: Path) -> None:
    config = config_of(data, tiny_model_dir)
    training = config.training
    training.lean, training.optimizer, training.max_grad_norm = True, "adamw_bf16", 0.0
    training.micro_batch_size = training.batch_size
    plan = Planner(config, progress=False).plan(find_machine("a100-80gb", None))
    assert plan.recommended is not None
    assert plan.recommended.setup.packing == "none"


def test_engines_as_training_chooses_and_refuses_them() -> None:
    config, machine = RunConfig(), find_machine("8xa100-80gb", None)
    config.training.batch_size = 64
    assert setup_from_config(config, machine, 16).engine == "zero2"
    config.distributed.engine, config.distributed.offload_optimizer = "zero3", True
    setup = setup_from_config(config, machine, 16)
    assert (setup.engine, setup.offload_optimizer) == ("zero3", True)
    assert setup_from_config(config, find_machine("a100-80gb", None), 16).engine == "ddp"
    planner = Planner(config, progress=False)
    base = TrainSetup(engine="zero2", gpus=8, attention="flash_attention_2")
    there, away = (planner.memory(replace(base, offload_optimizer=off), machine) for off in (False, True))
    assert "optimizer" not in away.parts
    assert there.peak - away.peak > 4e9
    refused = planner.option(replace(base, optimizer="adamw_8bit"), machine)
    assert "the moments of adamw_8bit could not be told apart" in refused.reason
    old = find_machine("8xv100-32gb", None)
    assert "fp16's loss scale" in planner.option(replace(base, engine="fsdp2", precision="fp16"), old).reason
    tight = planner.option(replace(base, gpus=2, engine="zero2"), find_machine("2xl40s", None))
    assert tight.changes == ("offload_optimizer",)
