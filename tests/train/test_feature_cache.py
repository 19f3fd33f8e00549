"""Features of a frozen vision part, computed once: the same training, without the tower."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from rich.console import Console
from run_helpers import Train, load, read_metrics

from phi3v.config import LoraConfig, MethodConfig
from phi3v.data.collate import Collator
from phi3v.data.rows import RowDataset
from phi3v.data.table import open_table
from phi3v.errors import UserError
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.compute import feature_cache
from phi3v.train.compute.feature_cache import cached_stage, fill_features, vision_part
from phi3v.train.device import choose_device

FROZEN = MethodConfig("frozen-vision")
PROJECTOR = MethodConfig("lora", lora=LoraConfig(rank=4, parts=["decoder", "projector"]))


@pytest.mark.parametrize("kind", ["memory", "disk"])
@pytest.mark.parametrize(("method", "stage"), [(FROZEN, "projected"), (PROJECTOR, "tower")])
def test_loss_and_gradients_are_those_of_pixels(
    small_model_dir: Path,
    easy_vqa: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
    method: MethodConfig,
    stage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """1e-6 of the largest entry: the tower runs over other batches, so its sums may be blocked otherwise."""
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))
    model = load(small_model_dir, method)
    if stage == "tower":
        for parameter in (p for n, p in model.named_parameters() if ".lora_B." in n):
            torch.nn.init.normal_(parameter, std=0.02)
    assert cached_stage(vision_part(model)) == stage
    processor = Phi3VProcessor.from_pretrained(small_model_dir)
    file = easy_vqa / "train-3.jsonl"
    file.write_text("".join((easy_vqa / "train.jsonl").read_text().splitlines(keepends=True)[:3]))
    table = open_table(file)
    ran: list[int] = []
    tower = vision_part(model).img_processor
    tower.register_forward_pre_hook(lambda _, args: ran.append(args[0].shape[0]))

    def fill() -> Any:
        return fill_features(kind, model, table, processor.image_processor, choose_device("fp32"), Console())

    store = fill()
    assert "3 images, 3 of them new" in capsys.readouterr().out
    assert len(ran) == 1 + 3  # one to learn the dtype, then each picture
    ran.clear()

    def run(features: Any) -> tuple[float, dict[str, torch.Tensor]]:
        dataset = RowDataset(table, processor, features=features)
        batch = Collator(processor.tokenizer.pad_token_id)([dataset.samples((index,))[0] for index in range(3)])
        assert ("pages" in batch) == (features is None)
        del batch["counts"]
        model.zero_grad()
        loss = model(**batch, logits_to_keep=None, use_cache=False).loss
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = run(store)
    assert not ran
    expected, expected_gradients = run(None)
    assert ran
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=2e-6 * float(gradient.abs().max()) + 1e-9, rtol=0)

    if kind == "disk":
        ran.clear()
        assert store.folder is not None
        files = sorted(store.folder.rglob("*.safetensors"))
        assert len(files) == 3
        files[0].unlink()  # safe to delete
        fill()
        assert len(ran) == 1 + 1
        assert sorted(store.folder.rglob("*.safetensors")) == files
        with torch.no_grad():  # other weights, other features
            next(tower.parameters()).add_(1.0)
        assert fill().folder != store.folder


def test_a_run_with_kept_features_learns_as_one_without(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with reading in another process; 1e-5 as for sums in another order, over two steps."""
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))
    losses = []
    for name, workers in (("off", 0), ("disk", 1)):
        settings = ("method.name", "frozen-vision", "training.feature_cache", name, "data.num_workers", workers)
        settings += ("training.batch_size", 4, "training.micro_batch_size", 4)
        code, folder = train(*settings, "training.max_steps", 2, "data.eval", "null", out=name)
        assert code == 0
        losses.append([line["loss"] for line in read_metrics(folder)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert "feature cache: 24 images, 24 of them new; these take" in " ".join(capsys.readouterr().out.split())


def test_packed_rows_with_kept_features_learn_as_those_without(train: Train) -> None:
    """The loss of two steps; 1e-5 as above."""
    losses = []
    for name in ("off", "memory"):
        settings = ("method.name", "frozen-vision", "training.feature_cache", name, "data.packing", "shared-image")
        settings += ("training.batch_size", 4, "training.micro_batch_size", 1)
        code, folder = train(*settings, "training.max_steps", 2, "data.eval", "null", out=name)
        assert code == 0
        losses.append([line["loss"] for line in read_metrics(folder)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_tower_that_trains_is_refused(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = train("training.feature_cache", "disk")
    assert code == 2
    assert "training.feature_cache: the vision tower is trained" in capsys.readouterr().err
    assert not folder.exists()


def test_no_room_is_an_error(
    small_model_dir: Path, easy_vqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(feature_cache, "free_space", lambda folder: 1000)
    processor = Phi3VProcessor.from_pretrained(small_model_dir).image_processor
    table = open_table(easy_vqa / "train.jsonl")
    with pytest.raises(UserError, match=r"the features take .* GB and there is room for 0\.00 GB"):
        fill_features("disk", load(small_model_dir, FROZEN), table, processor, choose_device("fp32"), Console())


def _fill(model: Path, data: Path, caches: list[Path], ran: Path) -> None:
    rank = int(os.environ["RANK"])
    if len(caches) > 1:  # each rank is a node of its own
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ["PHI3V_CACHE"] = str(caches[rank % len(caches)])
    runtime = choose_device("fp32")
    if rank == 1:  # looks at the disk when the other has begun to fill it
        time.sleep(2)
    processor = Phi3VProcessor.from_pretrained(model).image_processor
    table = open_table(data)
    store = fill_features("disk", load(model, FROZEN), table, processor, runtime, Console(quiet=True))
    names = {name for record in table for turn in record.turns for name in turn.images}
    assert store is not None
    (ran / str(rank)).write_text(json.dumps([name in store for name in sorted(names)]))


@pytest.mark.parametrize("nodes", [1, 2])
def test_ranks_leave_no_image_to_nobody(small_model_dir: Path, easy_vqa: Path, tmp_path: Path, nodes: int) -> None:
    caches = [tmp_path / f"cache-{node}" for node in range(nodes)]
    arguments = (small_model_dir, easy_vqa / "train.jsonl", caches, tmp_path)
    run_ranks(2, _fill, *arguments, folder=tmp_path / "printed")
    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == [True] * 24
    for cache in caches:
        assert len(list(cache.rglob("*.safetensors"))) == 24
