"""How the decoder of the tiny base is shown where to look."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_pointers
from phi3v import Phi3VForCausalLM, Phi3VProcessor
from tiny_pointers import CELLS, FIRST_TOKEN, ROW, TOKENS_A_PICTURE, VIEWS

SCENES = {make.__name__: make for make in tiny_pointers.KINDS}


@pytest.fixture(scope="module")
def processor(tiny_model_dir: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(tiny_model_dir)


def cells_of(positions: list[int], picture: int) -> set[tuple[int, int]]:
    """The cells at positions of the token stream; both views must name the same."""
    of_views = [
        {divmod(at - picture - view, ROW) for at in positions if 0 <= at - picture - view < CELLS * ROW}
        for view in VIEWS
    ]
    assert of_views[0] == of_views[1]
    assert len(of_views[0]) * 2 == len(positions)
    return of_views[0]


@pytest.mark.parametrize("level", range(3))
def test_what_is_said_next_is_where_its_head_looks(processor: Phi3VProcessor, level: int) -> None:
    for seed in range(12):
        scene = tiny_pointers.reading_scene(np.random.default_rng([seed, level]), level)
        made = tiny_pointers.conversation(processor, scene)
        picture = made.input_ids.index(-1)
        assert made.input_ids.count(-1) == TOKENS_A_PICTURE
        grey = np.asarray(scene.images[0].convert("L"), dtype=int).reshape(CELLS, 28, CELLS, 28)
        contrast = grey.max(axis=(1, 3)) - grey.min(axis=(1, 3))
        # Cells of all characters in order, as the turns have them, and as the token stream asks for them.
        wanted = [set(of_one) for turn in scene.turns for of_one in turn.reads if of_one]
        asked: list[set[tuple[int, int]]] = []
        for at, seen in made.reads:
            assert made.labels[at + 1] == made.input_ids[at + 1]  # the next token is learnt
            cells = cells_of(seen, picture)
            # There is ink; of a large letter's four cells one may be blank, as the upper right one of an L.
            assert np.mean([contrast[cell] > 60 for cell in cells]) >= 0.75
            asked.append(cells)
        assert set.union(*asked) == set.union(*wanted)
        for one in wanted:
            assert any(one <= cells for cells in asked)


@pytest.mark.parametrize("kind", ["single_scene", "pair_scene"])
def test_what_is_asked_about_is_found_or_missed(processor: Phi3VProcessor, kind: str) -> None:
    answers = set()
    for seed in range(30):
        scene = SCENES[kind](np.random.default_rng(seed), seed % 3)
        made = tiny_pointers.conversation(processor, scene)
        pictures = [made.input_ids.index(-1 - k) for k in range(len(scene.images))]
        assert not made.reads
        assert {place for _, seen in made.finds for place in seen[0]} <= {0, *range(pictures[0], pictures[0] + 313)}
        assert {place for _, seen in made.finds for place in seen[1]} <= {0, *range(pictures[-1], pictures[-1] + 313)}
        for turn in scene.turns:
            assert turn.finds is not None
            left, right = (cells != FIRST_TOKEN for cells in turn.finds)
            answers.add(turn.answer)
            if turn.question.startswith(("The left", "There is")) and "right" not in turn.question:
                assert turn.answer == str(left)
            elif turn.question.startswith(("Both", "Each")):
                assert turn.answer == str(left and right)
            elif turn.question.startswith("Only one"):
                assert turn.answer == str(left != right)
            elif turn.question.startswith("Is there") and kind == "single_scene":
                assert turn.answer == ("yes" if left else "no")
    assert {"True", "False", "yes", "no"} <= answers


def test_the_heads_that_are_told_are_the_models(tiny_model_dir: Path, processor: Phi3VProcessor) -> None:
    model = Phi3VForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="eager")
    layers = model.model.layers
    inputs_of = tiny_pointers.watch(model)
    for make in SCENES.values():
        scenes = [make(np.random.default_rng(seed), 1) for seed in range(2)]
        inputs, told = tiny_pointers.batch_of(processor, [tiny_pointers.conversation(processor, s) for s in scenes])
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions
            assert len(attentions) == len(layers)
            for (layer, heads), queries, wanted in told:
                expected = attentions[layer][queries[:, 0], :, queries[:, 1]][:, list(heads)]
                seen = tiny_pointers.attention_of(model, layer, heads, queries, inputs_of[layer])
                assert seen.shape == wanted.shape
                torch.testing.assert_close(seen, expected, atol=1e-6, rtol=0)  # sums of float32 in another order


def test_a_copying_decoder_writes_what_it_reads(tiny_model_dir: Path) -> None:
    model = Phi3VForCausalLM.from_pretrained(tiny_model_dir)
    tiny_pointers.start_copying(model)
    width = model.config.hidden_size
    for layer in model.model.layers:
        values = layer.self_attn.qkv_proj.weight[2 * width :]
        copied = layer.self_attn.o_proj.weight @ values
        torch.testing.assert_close(copied, tiny_pointers.COPYING * torch.eye(width), atol=1e-5, rtol=0)


def weights_of(model: Path) -> str:
    """A hash: pytest takes minutes to show how megabytes differ."""
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def test_it_goes_on_where_it_was_stopped(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_pointers, "SAVE_STEPS", 2)
    monkeypatch.setattr(tiny_pointers, "KINDS", {tiny_pointers.reading_scene: 0.5, tiny_pointers.single_scene: 0.5})

    def teach(out: Path) -> str:
        tiny_pointers.teach_pointers(tiny_model_dir, out, steps=4, batch_size=1, learning_rate=1e-3, seed=1)
        return weights_of(out)

    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    at_once = teach(tmp_path / "one")
    draw = tiny_pointers.draw

    def stop(seed: int, step: int, batch_size: int) -> list[tiny_pointers.Guided]:
        if step == 3:
            raise KeyboardInterrupt
        return draw(seed, step, batch_size)

    monkeypatch.setattr(tiny_pointers, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        teach(tmp_path / "two")
    assert (tmp_path / "two.state").exists()
    monkeypatch.setattr(tiny_pointers, "draw", draw)
    assert teach(tmp_path / "two") == at_once
    assert not (tmp_path / "two.state").exists()
    assert at_once != weights_of(tiny_model_dir)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
