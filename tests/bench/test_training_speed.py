"""`phi3v bench`: what it counts, that its baseline trains the same, and that it says what it could not measure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from attention_backends import SMALL_LAYOUTS, compare_attention
from phi3v.bench import rows as bench_rows
from phi3v.bench import training
from phi3v.bench.counting import StepWork, pairs_of
from phi3v.bench.generation import bench_generate
from phi3v.bench.pages import QUESTIONS_PER_PAGE, SIZES, write_pages
from phi3v.bench.recipe import CropDataset, RecipeLoop, run_padded_crops
from phi3v.bench.rows import row_config
from phi3v.bench.settings import BenchSettings, Row
from phi3v.bench.training import bench_train
from phi3v.cli import main
from phi3v.data.batches import RowPlan
from phi3v.errors import UserError
from phi3v.model.attention import visible
from phi3v.processing.hd_transform import page_geometry
from phi3v.train.collectives import HostCollectives
from phi3v.train.device import choose_device
from phi3v.train.prepare import prepare

SMALL = BenchSettings(batch_size=4, steps=1, num_crops=2, pack_tokens=1200, rank=2, optimizer="adamw", precision="fp32")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pages(tmp_path_factory.mktemp("bench") / "pages", 3, sizes=((40, 60),))


def bench(model: Path, data: Path, out: Path | None, *variants: Any, settings: BenchSettings = SMALL) -> dict[str, Any]:
    console = Console(quiet=True)
    return bench_train(["full"], variants, settings, console, model=model, data=data, cache=data.parent, out=out)


def test_the_drawn_pages_are_as_long_as_docvqa() -> None:
    """34 tokens of text are what a record of the drawn pages has with the small tokenizer."""
    mean = np.mean([page_geometry(*size, 16).num_img_tokens for size in SIZES]) + 34
    assert mean == pytest.approx(2443, rel=0.01)
    assert QUESTIONS_PER_PAGE == 3.9


def test_pairs_are_those_that_the_mask_shows() -> None:
    """A causal triangle of T tokens has T diagonal pairs, each counted once and not twice."""
    layout = ((7, 2, 3), (0, 5), (4, 1))
    tokens = sum(map(sum, layout))
    assert pairs_of(layout) == 2 * int(visible(layout).sum()) - tokens


def test_every_variant_is_measured_once(
    small_model_dir: Path, pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "train.json"
    result = bench(small_model_dir, pages, out, "recipe", "shared-image", "lean")
    recipe, shared, lean = result["rows"]
    assert (recipe["attention"], recipe["checkpointing"]) == ("eager", "full")
    assert shared["attention"] == "packed_segments"
    assert shared["tokens_per_sample"] < 0.5 * recipe["tokens_per_sample"]
    assert shared["tflop_per_sample"] < 0.5 * recipe["tflop_per_sample"]
    slowest, fastest = recipe["samples_per_second_range"]
    assert 0 < slowest <= recipe["samples_per_second"] * 1.01
    assert fastest >= slowest
    assert recipe["mfu"] is None
    assert recipe["planned_peak_gb"] is None
    assert shared["planned_peak_gb"] > 0
    assert recipe["peak_gb"] > 0
    assert "bf16" in lean["error"]
    assert result["data"]["samples"] == 12
    assert result["timed_by"] == ("wall time" if torch.cuda.is_available() else "CPU time of one thread")
    assert result["ratios"].keys() == {"full shared-image over recipe"}
    assert json.loads(out.read_text())["rows"] == result["rows"]

    # A second call keeps what there is, also of an older version, and tries again what failed.
    out.write_text(out.read_text().replace('"variant"', '"way"'))
    tried: list[str] = []
    monkeypatch.setattr(training, "measure_row", lambda row, *rest: tried.append(row.variant) or {"error": "no"})
    again = bench(small_model_dir, pages, out, "recipe", "lean")
    assert tried == ["lean"]
    assert again["rows"][:2] == [recipe, shared]
    with pytest.raises(UserError, match="another settings"):
        bench(small_model_dir, pages, out, "recipe", settings=BenchSettings())


def test_a_row_without_memory_says_so(small_model_dir: Path, pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_rows, "_measure", fail)
    (row,) = bench(small_model_dir, pages, None, "samples")["rows"]
    assert row["error"] == "out of memory"


def test_the_recipes_training_gives_the_same_gradients(small_model_dir: Path, pages: Path, tmp_path: Path) -> None:
    """float32, 1e-4 of the largest entry: eager attention and 3 crops at once sum in another order, and the recipe's
    global view is shrunk on the host."""
    gradients, losses = [], []
    for variant in ("recipe", "padded"):
        config = row_config(Row("full", variant), SMALL, small_model_dir, pages, tmp_path / variant)  # type: ignore[arg-type]
        setup = prepare(config, Console(quiet=True), choose_device("fp32"), HostCollectives(1))
        setup.model.train()
        if variant == "recipe":
            run_padded_crops(setup.model, SMALL.num_crops)
            batch = CropDataset(setup.train_table, setup.processor)[RowPlan(((0,),), ends_step=True)]
            engine = SimpleNamespace(forward=lambda inputs, last, model=setup.model: model(**inputs))
            loop: Any = SimpleNamespace(engine=engine)
            loss = RecipeLoop.compute_loss(loop, batch, 1.0, last=True)
        else:
            batch = setup.dataset()[RowPlan(((0,),), ends_step=True)]
            assert StepWork.of(batch).pages == 1
            inputs = {name: value for name, value in batch.items() if name != "counts"}
            loss = setup.model(**inputs, logits_to_keep=None, use_cache=False, loss_normalizer=1.0).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in setup.model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    theirs, ours = gradients
    assert theirs.keys() == ours.keys()
    for name, gradient in ours.items():
        atol = 1e-4 * float(gradient.abs().max()) + 1e-9
        torch.testing.assert_close(theirs[name], gradient, atol=atol, rtol=0, msg=name)


def test_attention_is_compared_where_it_runs() -> None:
    rows = compare_attention(SMALL_LAYOUTS, heads=2, width=8, repeats=1)
    agreeing = [row for row in rows if "error" not in row]
    assert len(agreeing) == 4
    assert all(row["agrees"] for row in agreeing)
    assert all("need a GPU" in row["error"] for row in rows if "error" in row)


def test_generating_is_compared(
    small_model_dir: Path, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "generate.json"
    options = ["--questions", "2", "--max-new-tokens", "2", "--num-crops", "1", "--out", str(out), "--json"]
    assert main(["bench", "generate", "--model", str(small_model_dir), "--data", str(pages), *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text())
    assert (result["questions"], result["pages"], result["same_answers"]) == (2, 1, 2)


@pytest.mark.parametrize("variant", ["padded", "samples", "shared-image", "recipe"])
def test_records_without_images_are_measured(small_model_dir: Path, pages: Path, tmp_path: Path, variant: str) -> None:
    """Steps of text only, then of text and images."""
    turn = {"user": "what?", "assistant": "that"}
    image = json.loads(pages.read_text(encoding="utf-8").splitlines()[0])["conversations"][0]["images"][0]
    lines = [{"id": str(k), "conversations": [turn | ({"images": [image]} if k == 0 else {})]} for k in range(12)]
    file = pages.parent / f"mixed-{variant}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (row,) = bench(small_model_dir, file, None, variant)["rows"]
    assert "error" not in row
    assert row["samples_per_second"] > 0


def test_no_row_at_all_is_no_success(small_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A vision part that trains has nothing to learn from text."""
    line = {"id": "a", "conversations": [{"user": "what?", "assistant": "that"}]}
    (tmp_path / "text.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    files = ("--model", str(small_model_dir), "--data", str(tmp_path / "text.jsonl"))
    assert main(["bench", "train", *files, "--methods", "full", "--variants", "padded"]) == 2
    assert "no record has an image" in " ".join(capsys.readouterr().out.split())


def test_generating_is_measured_on_records_without_images(small_model_dir: Path, tmp_path: Path) -> None:
    line = {"id": "a", "conversations": [{"user": "what?", "assistant": "that"}]}
    (tmp_path / "text.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    figures = bench_generate(small_model_dir, tmp_path / "text.jsonl", questions=1, max_new_tokens=2)
    assert figures["same_answers"] == figures["questions"] == 1
