"""The configuration tree: defaults, overrides, refusals, and every recipe of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from phi3v.config import RunConfig, known_keys, load_config
from phi3v.errors import UserError
from phi3v.grammar import RECIPES
from phi3v.train.schedule import warmup_steps


def test_defaults_are_the_public_recipes() -> None:
    config = RunConfig()
    training, lora = config.training, config.method.lora
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.95, 1e-7)
    assert (training.schedule, warmup_steps(training, 500), training.max_grad_norm) == ("linear", 50, 1.0)
    assert (training.learning_rate, training.weight_decay, training.batch_size) == (4e-5, 0.01, 16)
    assert (lora.rank, lora.alpha, lora.dropout) == (64, 128, 0.0)
    assert config.training.loss_weighting == "sample"
    assert config.evaluation.max_new_tokens is None
    assert config.model.path == "microsoft/Phi-3.5-vision-instruct"


def test_the_resolved_tree_reads_back_as_itself(tmp_path: Path) -> None:
    overrides = ["--method.name", "lora", "--method.lora.parts", "[decoder, head]", "--training.learning_rate", "1e-4"]
    config = load_config(None, overrides)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


def test_the_command_line_overrides_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("training:\n  learning_rate: 1e-3\n  batch_size: 32\n")
    config = load_config(recipe, ["--training.batch_size", "8"])
    assert config.training.learning_rate == 1e-3  # YAML itself would read 1e-3 as text
    assert config.training.batch_size == 8


def test_words_that_older_yaml_takes_for_booleans(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("evaluation: {answer_words: [yes, no], before: false}\ntraining: {overwrite: true}\n")
    config = load_config(recipe)
    assert config.evaluation.answer_words == ["yes", "no"]
    assert not config.evaluation.before
    assert config.training.overwrite
    config = load_config(None, ["--evaluation.answer_words", "[on, off]", "--evaluation.after", "false"])
    assert config.evaluation.answer_words == ["on", "off"]
    assert not config.evaluation.after
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainig: {}", "did you mean training?"),
        ("training: {batchsize: 3}", "did you mean training.batch_size?"),
        ("learning_rate: 3", "did you mean training.learning_rate?"),
        ("training: 3", "training is a group of keys"),
        ("- a", "a recipe is a mapping"),
        ("training: [", "cannot be read as YAML"),
        ("training: {batch_size: many}", "training.batch_size"),
        ("training: {batch_size: 0}", "must be at least 1"),
        ("training: {epochs: -1}", "must be above 0"),
        ("method: {name: lroa}", "method.name"),
        ("method: {lora: {rank: 0}}", "must be at least 1"),
        ("evaluation: {metric: anls}", "did you mean evaluation.metrics?"),
        ("evaluation: {metrics: [anlz]}", "did you mean anls?"),
        ("evaluation: {metrics: {anls: 1}}", "evaluation.metrics: must be text"),
        ("evaluation:\n  before: true\n  metrics: [anls, 3]", "recipe.yaml:3: evaluation.metrics: must be text, got 3"),
        ("evaluation: {answer_words: [true, false]}", "put it in quotes"),
        ("training: {output_dir: 3}", "put it in quotes"),
        ("training: {output_dir: ''}", "training.output_dir: is empty"),
        ("training: {batch_size: 8.0}", "must be a whole number"),
        ("training: {batch_size: true}", "must be a whole number"),
        ("training: {learning_rate: .nan}", "must be a finite number"),
        ("training: {learning_rate: null}", "training.learning_rate: must be a finite number"),
        ("training: {overwrite: yes}", "must be true or false"),
        ("training:\n  seed: 1\n  seed: 2", "recipe.yaml:3: cannot be read as YAML: seed is given twice"),
        ("training: {seed: 1}\ndata: {}\ntraining: {epochs: 2}", "recipe.yaml:3: cannot be read as YAML: training is"),
        ("training: {seed: 1}\ntraining.seed: 2", "training.seed: is given twice"),
        ("training: {seed: !!int x}", "cannot be read as YAML"),
        ("training: {seed: !x 3}", "recipe.yaml:1: cannot be read as YAML"),
        ("data: " + 400 * "[", "cannot be read as YAML"),
        ("training: {overwrite: maybe}", "training.overwrite"),
        ("method: {lora: {dropout: 1.0}}", "must be at most 0.99"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(recipe)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "steps"), [(16, 1, 1, 16), (16, 4, 2, 2), (64, 1, 8, 8), (16, 16, 1, 1)]
)
def test_accumulation_steps(batch: int, micro: int, ranks: int, steps: int) -> None:
    config = RunConfig()
    config.training.batch_size, config.training.micro_batch_size = batch, micro
    assert config.accumulation_steps(ranks) == steps


def test_a_batch_that_does_not_divide_is_refused() -> None:
    config = RunConfig()
    config.training.batch_size, config.training.micro_batch_size = 16, 3
    with pytest.raises(UserError, match="use a multiple of 6"):
        config.accumulation_steps(2)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_name_only_known_keys(recipe: Path) -> None:
    config = load_config(recipe)
    named = yaml.safe_load(recipe.read_text())
    assert set(named) <= set(known_keys())
    assert config.data.train
