"""One grammar for every command line: each verb's options in every order, read without doing the work."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from phi3v.cli import build_parser, main, parse
from phi3v.config import RunConfig, load_config
from phi3v.errors import UserError
from phi3v.grammar import RECIPES, Parser

PARSER = build_parser()
KEYS = (
    ["--training.seed", "3"],
    ["--method.lora.parts", "decoder", "head"],
    ["--evaluation.metrics", "anls"],
    ["--data.eval", "none"],
    ["--training.overwrite"],
)
READ_KEYS = {
    "training.seed": "3",
    "method.lora.parts": ["decoder", "head"],
    "evaluation.metrics": ["anls"],
    "data.eval": "none",
    "training.overwrite": "true",
}
RECIPE = {"recipe": Path("my.yaml"), "overrides": READ_KEYS}
# A verb, what is positional, its options, and what must be read of any order of them.
VERBS: dict[str, tuple[list[str], tuple[list[str], ...], dict[str, Any]]] = {
    "model init": (
        [],
        (["--preset", "tiny"], ["--out", "m"], ["--seed", "-3"], ["--json"]),
        {"preset": "tiny", "out": Path("m"), "seed": -3, "json": True},
    ),
    "data convert": (
        ["csv"],
        (["--source", "t.csv"], ["--out", "d"], ["--image-column", "left", "right"], ["--eval-share", "0.1"]),
        {"source": "csv", "location": "t.csv", "image_columns": ["left", "right"], "eval_share": 0.1},
    ),
    "data check": (["d.jsonl"], (["--max-errors", "3"], ["--json"]), {"files": [Path("d.jsonl")], "max_errors": 3}),
    "data preview": (
        ["d.jsonl"],
        (["--out", "p.html"], ["--model.path", "m"], ["--model.num_crops", "4"], ["--open"]),
        {"file": Path("d.jsonl"), "open": True, "overrides": {"model.path": "m", "model.num_crops": "4"}},
    ),
    "data shard": (
        ["d.jsonl"],
        (["--out", "s"], ["--shard-size", "1GB"], ["--index-only"], ["--model.path", "m"]),
        {"source": ["d.jsonl"], "out": Path("s"), "shard_size": 10**9, "index_only": True},
    ),
    "data pairs": (
        [],
        (["--model", "run"], ["--data", "d.jsonl"], ["--out", "o"], ["--metric", "anls"], ["--min-margin", "0.5"]),
        {"model": "run", "data": Path("d.jsonl"), "out": Path("o"), "metric": "anls", "min_margin": 0.5, "samples": 8},
    ),
    "quickstart": (
        [],
        (["--out", "q"], ["--training.seed", "3"]),
        {"out": Path("q"), "overrides": {"training.seed": "3"}},
    ),
    "recipes list": ([], (["--json"],), {"json": True}),
    "recipes copy": (
        ["docvqa_lora"],
        (["--out", "m.yaml"], ["--overwrite"]),
        {"name": "docvqa_lora", "out": Path("m.yaml"), "overwrite": True},
    ),
    "train": (["my.yaml"], (*KEYS, ["--resume"], ["--json"]), RECIPE | {"resume": "auto", "json": True}),
    "eval": (
        ["run"],
        (["--data", "d.jsonl"], ["--metrics", "anls", "token_f1"], ["--answer-words", "yes", "no"], ["--json"]),
        {"model": "run", "metrics": ["anls", "token_f1"], "answer_words": ["yes", "no"], "json": True},
    ),
    "export": (["run"], (["--out", "m"], ["--adapter"]), {"source": "run", "out": Path("m"), "adapter": True}),
    "report": (["a", "b"], (["--out", "x.html"], ["--open"]), {"runs": [Path("a"), Path("b")], "open": True}),
    "chat": (
        ["run"],
        (["--prompt", "-what?"], ["--image", "1.png", "2.png"], ["--temperature", "0.5"]),
        {"model": "run", "prompt": "-what?", "media": [Path("1.png"), Path("2.png")], "temperature": 0.5},
    ),
    "plan": (
        ["my.yaml"],
        (*KEYS, ["--gpu", "a100-80gb", "h100"], ["--write", "out.yaml"], ["--json"]),
        RECIPE | {"gpu": ["a100-80gb", "h100"], "write": Path("out.yaml"), "json": True},
    ),
    "doctor": (["my.yaml"], (*KEYS, ["--json"]), RECIPE | {"json": True}),
    "azure skus": (["my.yaml"], (*KEYS, ["--nodes", "2"]), RECIPE | {"nodes": 2}),
    "azure quota": ([], (["--region", "x"], ["--for", "ml"], ["--yes"]), {"region": "x", "service": "ml", "yes": True}),
    "azure submit": (
        ["my.yaml"],
        (*KEYS, ["--sku", "S"], ["--data", "d"], ["--model", "m"], ["--dry-run"]),
        RECIPE | {"sku": "S", "data": "d", "model": "m", "dry_run": True},
    ),
    "completion": (["bash"], (), {"shell": "bash"}),
    "bench train": (
        [],
        (["--methods", "lora", "qlora"], ["--variants", "recipe"], ["--fp8"]),
        {"methods": ["lora", "qlora"], "variants": ["recipe"], "fp8": True},
    ),
    "bench preprocess": ([], (["--pages", "4"], ["--images", "d"]), {"pages": 4, "images": Path("d")}),
    "bench generate": ([], (["--questions", "4"], ["--preset", "tiny"]), {"questions": 4, "preset": "tiny"}),
}


@pytest.fixture(autouse=True)
def one_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Declared once: that takes longer than reading a line."""
    monkeypatch.setattr("phi3v.cli.build_parser", lambda: PARSER)


def leaves(parser: Parser, name: str = "") -> dict[str, Parser]:
    below = [(f"{name} {verb}".strip(), inner) for verb, inner in parser.verbs.items()]
    return {k: p for verb, inner in below for k, p in leaves(inner, verb).items()} or {name: parser}


def test_every_verb_is_read_here() -> None:
    assert set(leaves(PARSER)) == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_options_come_in_any_order_and_form(verb: str) -> None:
    places, options, expected = VERBS[verb]
    turns = [options[k:] + options[:k] for k in range(max(1, len(options)))]  # each option first, and each last
    for order in [*turns, tuple(reversed(options))]:
        for place in range(len(order) + 1):
            lines = [[*order[:place], places, *order[place:]]]
            # Every value after an equals sign, lists as YAML.
            yaml = [
                [f"{name}={values[0] if len(values) == 1 else f'[{chr(44).join(values)}]'}"] if values else [name]
                for name, *values in order
            ]
            lines.append([*yaml[:place], places, *yaml[place:]])
            for words in lines:
                arguments = parse([*verb.split(), *itertools.chain(*words)])
                for name, value in expected.items():
                    assert getattr(arguments, name) == value, (words, name)


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_names_the_nearest(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = leaves(PARSER)[verb]
    for option in parser._option_string_actions:
        if len(option) < 5:
            continue
        assert main([*verb.split(), option[:-2] + option[-1], "x"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: unknown option --"), error
        assert "did you mean --" in error


@pytest.mark.parametrize("verb", [verb for verb in VERBS if VERBS[verb][1]])
def test_what_is_no_list_is_given_once(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    places, options, _ = VERBS[verb]
    words = [*verb.split(), *places, *itertools.chain(*options)]
    for name, *values in options:
        if len(values) != 1 or name in ("--evaluation.metrics", "--variants"):
            continue
        assert main([*words, name, "other"]) == 2
        error = capsys.readouterr().err
        assert f"error: {name}: is given twice: {values[0]} and other" in error
        parse([*words, name, *values])  # the same again says nothing else
    assert main([*words, "--json", "--json=1"]) == 2 or verb == "completion"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train a.yaml b.yaml", "unexpected 'b.yaml'"),
        ("plan a.yaml --gpu x b.yaml", "unexpected 'b.yaml'"),
        ("bench train what", "unexpected 'what'"),
        ("train --data", "did you mean --data.train?"),
        ("train --learning_rate 1", "did you mean --training.learning_rate?"),
        ("train --training.learning-rate 1", "did you mean --training.learning_rate?"),
        ("eval run --evaluation.metrics anls", "did you mean --metrics?"),
        ("eval run --num_crops 3", "did you mean --num-crops?"),
        ("data preview d.jsonl --model m", "did you mean --model.path?"),
        ("data preview d.jsonl --num-crops 4", "did you mean --model.num_crops?"),
        ("data preview d.jsonl --out x --model.num_crops four", "must be a whole number"),
        ("plan --gpu", "--gpu: needs a value"),
        ("plan --gpu my.yaml", "--gpu: needs a value"),
        ("train --training.seed --json", "--training.seed: needs a value\n  → one that begins with dashes"),
        ("train --training.output_dir=", "--training.output_dir: needs a value"),
        ("train --resume=", "--resume: needs a value"),
        ("eval --metrics anls --data d.jsonl", "MODEL_OR_RUN"),
        ("plan --gpus many", "--gpus: invalid int value: 'many'"),
        ("plan --gp a100", "did you mean --gpu?"),
        ("bench train --methods lora lroa", "--methods: there is no 'lroa'\n  → did you mean lora?"),
        ("train --training.epochs -1e-3", "training.epochs: must be above 0, got -0.001"),
        ("train --training.seed 1_0x", "--training.seed: must be a whole number, got '1_0x'"),
        ("train --training.learning_rate nan", "must be a finite number"),
        ("train --training.overwrite maybe", "--training.overwrite: must be true or false, got 'maybe'"),
        ("train --method.name lroa", "--method.name: must be one of full, frozen-vision, lora, qlora, got 'lroa'"),
        ("train --method.lora.parts decodr", "did you mean decoder?"),
        ("train --evaluation.metrics anlz", "did you mean anls?"),
        ("train --evaluation.metrics [anls", "there is no metric '[anls'"),
        ("train --evaluation.metrics [a,{]", "cannot be read as a list"),
        ("train --evaluation.metrics []", "no metric is named"),
        ("train", "there is nothing to train"),
        ("azure submit --sku S --method.name lora", "--name: a run without a recipe has no name"),
    ],
)
def test_what_is_wrong_is_one_message(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("train --resume ckpt my.yaml", "resume", "ckpt"),
        ("train --resume my.yaml", "resume", "auto"),
        ("train my.yaml --resume auto", "resume", "auto"),
        ("train --method.lora.parts decoder my.yaml", "recipe", Path("my.yaml")),
        ("train --training.overwrite my.yml", "recipe", Path("my.yml")),
        ("plan --gpu a100 my.yaml", "recipe", Path("my.yaml")),
        ("plan --gpu=a100 --gpu h100", "gpu", ["a100", "h100"]),
        ("plan --gpu a100 h100 docvqa_lora", "recipe", RECIPES["docvqa_lora"]),
        ("train --resume docvqa_lora", "resume", "auto"),
        ("plan --method.name lora", "recipe", None),
        ("recipes", "command", "phi3v recipes list"),
        ("recipes --json", "json", True),
        ("eval --data d.jsonl --metrics anls run", "model", "run"),
        ("chat --image 1.png 2.png run", "model", "run"),
        ("chat run --image 1.png --video 2.mp4 --image 3.png", "media", [Path(f) for f in ("1.png", "2.mp4", "3.png")]),
        ("report a --out x.html b", "runs", [Path("a"), Path("b")]),
        ("data convert --out d --image-column left right csv", "image_columns", ["left", "right"]),
        ("report -- --odd", "runs", [Path("--odd")]),
        ("chat run --prompt=--help", "prompt", "--help"),
    ],
)
def test_where_a_list_ends(line: str, name: str, value: object) -> None:
    assert getattr(parse(line.split()), name) == value


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--evaluation.metrics", "anls"], "evaluation.metrics", ["anls"]),
        (["--evaluation.metrics", "anls", "token_f1"], "evaluation.metrics", ["anls", "token_f1"]),
        (["--evaluation.metrics=anls", "--evaluation.metrics=token_f1"], "evaluation.metrics", ["anls", "token_f1"]),
        (["--evaluation.metrics", "[anls, token_f1]"], "evaluation.metrics", ["anls", "token_f1"]),
        (["--evaluation.answer_words", "1", "0"], "evaluation.answer_words", ["1", "0"]),
        (["--evaluation.answer_words", "[yes, no]"], "evaluation.answer_words", ["yes", "no"]),
        (["--evaluation.answer_words", "null", "none"], "evaluation.answer_words", ["null", "none"]),
        (["--training.report_to", "wandb"], "training.report_to", ["wandb"]),
        (["--training.report_to", "[]"], "training.report_to", []),
        (["--training.report_to", "none"], "training.report_to", []),
        (["--method.lora.targets", "null"], "method.lora.targets", None),
        (["--data.eval", "null"], "data.eval", None),
        (["--data.packing", "none"], "data.packing", "none"),
        (["--data.train", "007"], "data.train", "007"),
        (["--training.output_dir", "null"], "training.output_dir", "null"),
        (["--training.seed", "010"], "training.seed", 10),
        (["--training.overwrite"], "training.overwrite", True),
        (["--training.overwrite", "True"], "training.overwrite", True),
        (["--evaluation.before=false"], "evaluation.before", False),
        (["--training.epochs", "3"], "training.epochs", 3.0),
        (["--training.learning_rate", "1e-4"], "training.learning_rate", 1e-4),
    ],
)
def test_values_of_keys(words: list[str], key: str, value: object, tmp_path: Path) -> None:
    """On the command line, and in the file that the run keeps of it."""
    config = load_config(None, words)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    for read in (config, load_config(tmp_path / "config.yaml")):
        assert value_of(read, key) == value
        assert type(value_of(read, key)) is type(value)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("evaluation: {metrics: anls}", "evaluation.metrics", ["anls"]),
        ("training: {report_to: wandb}", "training.report_to", ["wandb"]),
        ("training: {report_to: none}", "training.report_to", []),
        ("method: {lora: {parts: decoder}}", "method.lora.parts", ["decoder"]),
        ("data: {eval: none}", "data.eval", None),
        ("training:\n  # seed: 3\n", "training.seed", 0),
        ("training.seed: 3", "training.seed", 3),
        ("training: {seed: 010}", "training.seed", 10),
        ("training: {output_dir: 2024-01-01}", "training.output_dir", "2024-01-01"),
        ("base: &b {seed: 1}", "", None),
        ("training: &t {seed: 3, epochs: 2}\ndata: {}", "training.seed", 3),
    ],
)
def test_values_of_recipes(text: str, key: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    if not key:
        with pytest.raises(UserError, match="unknown key base"):
            load_config(tmp_path / "recipe.yaml")
        return
    assert value_of(load_config(tmp_path / "recipe.yaml"), key) == value


@pytest.mark.parametrize(
    "word", ["1e-3", "010", "yes", "null", "2024-01-01", "1:30", "[a]", "0x10", "true", "a: b", "~"]
)
def test_text_that_looks_like_something_else_stays_text_in_the_kept_file(word: str, tmp_path: Path) -> None:
    config = RunConfig()
    config.training.output_dir = word
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


def value_of(config: object, key: str) -> object:
    for name in key.split("."):
        config = getattr(config, name)
    return config
