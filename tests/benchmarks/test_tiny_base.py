"""What the tiny base is taught on, and the script that teaches it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import command, run_ranks

import scenes
import tiny_base
import tiny_tower
from phi3v import Phi3VForCausalLM, Phi3VProcessor

KINDS = scenes.SINGLE | scenes.SEVERAL


@pytest.mark.parametrize("level", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_is_drawn_from_its_seed(kind: str, level: int) -> None:
    one, again, other = (KINDS[kind](np.random.default_rng(seed), level) for seed in (5, 5, 6))
    assert one.turns == again.turns
    assert [image.tobytes() for image in one.images] == [image.tobytes() for image in again.images]
    assert [image.tobytes() for image in one.images] != [image.tobytes() for image in other.images]
    assert len(one.images) == (1 if kind in scenes.SINGLE else len(one.images)) > 0
    assert all(question and answer for question, answer in one.turns)


def test_answers_say_what_was_drawn() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        things = scenes.some_things(rng, 4)
        for question, answer in scenes.shape_turns(rng, things):
            if question == "How many shapes are there?":
                assert answer == scenes.NUMBERS[len(things)]
            elif question.startswith("What is at the "):
                place = question.removeprefix("What is at the ").removesuffix("?")
                assert answer == next((thing.name for thing in things if thing.place == place), "nothing")
        what, holds = scenes.statement(rng, things)
        assert scenes.holds(what, things) == holds


def test_cells_are_labelled_where_things_are() -> None:
    labels = np.zeros((tiny_tower.CELLS, tiny_tower.CELLS))
    labels[tiny_tower.cells_in(56, 28, 112, 84)] = 1
    assert np.argwhere(labels).tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    page, what, colour = tiny_tower.labelled_page(np.random.default_rng(3))
    assert page.size == (scenes.SIDE, scenes.SIDE)
    assert what.max() < len(tiny_tower.WHAT)
    assert colour.max() < len(scenes.COLOURS)
    assert (what > 0).any()
    # Where there is ink there is a label, and where there is none there is none.
    page, what = Image.new("RGB", (scenes.SIDE, scenes.SIDE), "white"), np.zeros_like(what)
    size = tiny_tower.draw_text_band(np.random.default_rng(1), page, 4, (0, 0, 0), what)
    dark = 255 - np.asarray(page.convert("L")).reshape(12, 28, 12, 28).min(axis=(1, 3))
    assert np.array_equal(what[4 : 4 + size].any(axis=0), dark[4 : 4 + size].max(axis=0) > 100)


def test_heads_of_the_tower_begin_with_one_neighbour(tiny_model_dir: Path) -> None:
    model = Phi3VForCausalLM.from_pretrained(tiny_model_dir)
    tiny_tower.start_local(model)
    vision = model.model.vision_embed_tokens.img_processor.vision_model
    page, _, _ = tiny_tower.labelled_page(np.random.default_rng(3))
    crops, _ = Phi3VProcessor.from_pretrained(tiny_model_dir).image_processor.crops(page)
    with torch.no_grad():
        hidden = vision.encoder.layers[0].layer_norm1(vision.pre_layrnorm(vision.embeddings(crops[1:2])))
        attention = vision.encoder.layers[0].self_attn
        queries, keys = (
            layer(hidden).view(577, 4, 32).transpose(0, 1) for layer in (attention.q_proj, attention.k_proj)
        )
        weights = (queries @ keys.transpose(1, 2) / 32**0.5).softmax(-1)[:, 1:, 1:].view(4, 24, 24, 24, 24)
    for head, (rows, columns) in enumerate(tiny_tower.NEIGHBOURS):
        shares = [
            weights[head, row, column, row + rows, column + columns].item()
            for row in range(2, 22)
            for column in range(2, 22)
        ]
        assert np.median(shares) > 0.3  # of 576 patches


def test_the_script_makes_a_model_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiny_base, "STAGES", (tiny_base.Stage("one", 4, {"one": 1.0}, (1.0, 0.0, 0.0)),))
    monkeypatch.setattr(tiny_base, "TOWER", {"pages": 4, "batch_size": 2, "learning_rate": 1e-3})
    monkeypatch.setattr(tiny_base, "POINTERS", {"steps": 1, "batch_size": 1, "learning_rate": 1e-3})
    monkeypatch.setattr(tiny_base, "TEST_SCENES", 1)
    monkeypatch.setattr(tiny_tower, "MEAN_PAGES", 4)

    def phi3v(*arguments: str, processes: int = 1) -> None:
        run_ranks(processes, command, *arguments, folder=tmp_path / "ranks")

    monkeypatch.setattr(tiny_base, "phi3v", phi3v)  # without the seconds that a new interpreter takes to import
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["tiny_base.py", "--work", str(tmp_path / "work"), "--out", str(out)])
    tiny_base.main()
    result = json.loads(out.read_text())
    assert result["scores"].keys() == {f"{kind}-{level}" for kind in tiny_base.DESCRIPTIONS for level in range(3)}
    assert result["train_seconds"] > 0
    base = tmp_path / "work" / "base"
    assert Phi3VForCausalLM.from_pretrained(base).num_parameters() < 5_000_000
    assert Phi3VProcessor.from_pretrained(base).image_processor.num_crops == 1
    assert "| shapes |" in (base / "README.md").read_text()
    # The second time nothing is taught again.
    weights = (base / "model.safetensors").read_bytes()
    for part in ("teach_tower", "teach_pointers"):
        monkeypatch.setattr(tiny_base, part, lambda *args, **kwargs: pytest.fail("taught again"))
    monkeypatch.setattr(tiny_base, "measure", lambda model, folder: result["scores"])
    monkeypatch.setattr(tiny_base, "phi3v", lambda *arguments: pytest.fail(f"ran {arguments}"))
    tiny_base.main()
    assert (base / "model.safetensors").read_bytes() == weights
