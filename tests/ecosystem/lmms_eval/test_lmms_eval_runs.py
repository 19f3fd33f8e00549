"""lmms-eval, as it is, with our model and our tasks: every answer and every score as of ``phi3v eval``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from rich.console import Console

from phi3v import Phi3VForCausalLM
from phi3v.errors import UserError
from phi3v.evaluate.evaluation import EvaluationResult
from phi3v.evaluators import TASKS
from phi3v.model.presets import copy_pretrained
from phi3v.train.evaluate_finetuned import evaluate_tuned

Lines = list[dict[str, Any]]
MAX_NEW_TOKENS = {"docvqa": 128, "nlvr2": 8, "hateful_memes": 8, "ucf101": 16}
FILES = {
    "docvqa": "docvqa/val.jsonl",
    "nlvr2": "nlvr2/val.jsonl",
    "hateful_memes": "hateful_memes/val.jsonl",
    "ucf101": "ucf101/ucf101_val.jsonl",
}
METRICS = {
    "docvqa": ["anls"],
    "nlvr2": ["accuracy", "consistency"],
    "hateful_memes": ["accuracy", "auroc"],
    "ucf101": ["accuracy", "per_class_accuracy"],
}


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHI3V_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tiny model."""
    folder = tmp_path_factory.mktemp("base") / "model"
    copy_pretrained("tiny", folder)
    return folder


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with which it answers otherwise."""
    torch.manual_seed(0)
    model = Phi3VForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def ours(
    model: Path, data: Path, metrics: list[str], tokens: int, words: list[str] | None = None, **options: Any
) -> EvaluationResult:
    settings = {"metrics": metrics, "max_new_tokens": tokens, "batch_size": 3, "answer_words": words or []}
    return evaluate_tuned(str(model), data, Console(quiet=True), settings=settings, **options)


def answers(result: EvaluationResult) -> dict[str, str]:
    return {question.id: answer.text for question, answer in zip(result.questions, result.generated, strict=True)}


def evaluate(model: Path, tasks: list[str], include: Path = TASKS, **options: Any) -> dict[str, Any]:
    """Results of lmms-eval in this process."""
    manager = TaskManager(include_path=str(include), include_defaults=False, model_name="phi3v")
    results = simple_evaluate(
        "phi3v",
        model_args=f"pretrained={model}",
        tasks=tasks,
        batch_size=4,
        device="cpu",
        task_manager=manager,
        bootstrap_iters=0,
        **options,
    )
    assert results is not None
    return results


def run_command_line(folder: Path, data: Path, *arguments: str, ranks: int = 0) -> tuple[dict[str, Any], Lines]:
    """Results and samples of ``lmms-eval`` on a data file.

    Args:
        ranks: start so many by torchrun; 0: none.
    """
    (folder / "tasks").mkdir()
    (folder / "tasks" / "own.yaml").write_text(
        "task: own\n"
        "class: !function phi3v.evaluators.lmms_tasks.RecordsTask\n"
        f"dataset_path: {data}\n"
        "generation_kwargs: {max_new_tokens: 8, until: []}\n"
        "metric_list: [{metric: accuracy}]\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [sys.executable, *torchrun, "-m", "lmms_eval", "--model", "phi3v", *arguments, "--tasks", "own"]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(folder / "out"), "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    results, samples = (list((folder / "out").rglob(f"*_{kind}")) for kind in ("results.json", "samples_own.jsonl"))
    assert len(results) == len(samples) == 1, done.stdout + done.stderr
    lines = [json.loads(line) for line in samples[0].read_text().splitlines()]
    return json.loads(results[0].read_text())["results"]["own"], lines


def test_the_command_line_answers_and_scores_as_phi3v_eval(base: Path, easy_vqa: Path, tmp_path: Path) -> None:
    data = easy_vqa / "test.jsonl"
    expected = ours(base, data, ["accuracy"], 8)
    results, samples = run_command_line(tmp_path, data, "--model_args", f"pretrained={base}", "--batch_size", "8")
    assert {line["accuracy"]["id"]: line["filtered_resps"] for line in samples} == answers(expected)
    assert len(set(answers(expected).values())) > 3
    assert results["accuracy,none"] == pytest.approx(expected.primary.value, abs=1e-12)
    assert 0.1 < results["accuracy,none"] < 0.9
    assert results["accuracy_stderr_clt,none"] > 0


def test_two_ranks_with_an_adapter_and_fewer_crops(base: Path, adapter: Path, easy_vqa: Path, tmp_path: Path) -> None:
    data = tmp_path / "some.jsonl"
    data.write_text("".join((easy_vqa / "test.jsonl").read_text().splitlines(keepends=True)[:21]))
    (tmp_path / "images").symlink_to(easy_vqa / "images")
    expected = answers(ours(adapter, data, ["accuracy"], 8, num_crops=1))
    assert expected != answers(ours(base, data, ["accuracy"], 8, num_crops=1))
    arguments = ["--model_args", f"pretrained={adapter},num_crops=1,dtype=fp32", "--batch_size", "4"]
    results, samples = run_command_line(tmp_path, data, *arguments, ranks=2)
    assert {line["accuracy"]["id"]: line["filtered_resps"] for line in samples} == expected
    assert len(samples) == 21
    assert "accuracy,none" in results


def question(name: str, number: int, **turn: Any) -> dict[str, Any]:
    return {"id": name, "conversations": [{"assistant": f"label {number % 3}", **turn}]}


def docvqa(texts: list[str], images: list[str]) -> Lines:
    return [
        question(str(number), number, user=text, images=[images[number % 4]]) for number, text in enumerate(texts[:12])
    ]


def nlvr2(texts: list[str], images: list[str]) -> Lines:
    """Each statement about two pairs of images."""
    return [
        question(
            f"dev-{number // 2}-{number % 2}-0", number, user=texts[number // 2], images=images[number : number + 2]
        )
        for number in range(6)
    ]


def hateful_memes(texts: list[str], images: list[str]) -> Lines:
    return [
        question(str(number), number, user=text, images=[images[number % 4]], answers=[("Yes", "No")[number % 2]])
        for number, text in enumerate(texts[:10])
    ]


def ucf101(texts: list[str], images: list[str]) -> Lines:
    """Frames of a clip."""
    return [question(f"a/{number}", number, user=text, images=images[:4]) for number, text in enumerate(texts[:6])]


KINDS: dict[str, Callable[[list[str], list[str]], Lines]] = {
    "docvqa": docvqa,
    "nlvr2": nlvr2,
    "hateful_memes": hateful_memes,
    "ucf101": ucf101,
}


def references(name: str, number: int, answer: str) -> list[str] | None:
    """What is right, so that some answers are, some are nearly, and some are not."""
    if name == "hateful_memes":  # one of the answer words
        return None
    if name == "docvqa":
        return [["far from it"], ["other", answer + "x"], [answer]][number % 3]
    return [answer] if number % 3 else ["neither"]


@pytest.fixture(scope="session")
def task_data(base: Path, easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few records of each benchmark's kind."""
    root = tmp_path_factory.mktemp("data")
    records = [json.loads(line)["conversations"][0] for line in (easy_vqa / "test.jsonl").read_text().splitlines()]
    texts = list(dict.fromkeys(record["user"] for record in records))
    images = list(dict.fromkeys(record["images"][0] for record in records))
    for name, make in KINDS.items():
        file = root / FILES[name]
        file.parent.mkdir()
        (file.parent / "images").symlink_to(easy_vqa / "images")
        lines = make(texts, images)
        write(file, lines)
        given = list(answers(ours(base, file, ["accuracy"], MAX_NEW_TOKENS[name])).values())
        for number, (line, answer) in enumerate(zip(lines, given, strict=True)):
            if right := references(name, number, answer):
                line["conversations"][0]["answers"] = right
        write(file, lines)
    return root


def write(file: Path, lines: Lines) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_shipped_tasks_score_as_our_own_metrics(
    base: Path, task_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI3V_DATA", str(task_data))
    results = evaluate(base, [f"phi3v_{name}" for name in KINDS])
    for name, metrics in METRICS.items():
        words = ["Yes", "No"] if "auroc" in metrics else None
        expected = ours(base, task_data / FILES[name], metrics, MAX_NEW_TOKENS[name], words)
        samples = {line[metrics[0]]["id"]: line[metrics[0]] for line in results["samples"][f"phi3v_{name}"]}
        assert {key: item["prediction"] for key, item in samples.items()} == answers(expected)
        for score in expected.scores:
            assert score.value is not None
            # Their order, and with it that of a sum, may be another.
            got = results["results"][f"phi3v_{name}"][f"{score.name},none"]
            assert got == pytest.approx(score.value, abs=1e-12), (name, score.name)
            assert 0 < got < 1 or (name, score.name) == ("hateful_memes", "accuracy"), (name, score.name)
        if words:
            for asked, answer in zip(expected.questions, expected.generated, strict=True):
                # Other batches round float32 otherwise.
                assert samples[asked.id]["probabilities"] == pytest.approx(answer.probabilities, abs=1e-5)


PARQUET_FUNCTIONS = """
def visual(doc):
    return [doc["image"].convert("RGB")]

def hits(doc, results):
    return {"hits": float(results[0] == doc["answer"])}
"""
PARQUET_TASK = """
task: parquet
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function own.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false, top_p: 1.0, num_beams: 1}}
process_results: !function own.hits
metric_list: [{{metric: hits, aggregation: mean, higher_is_better: true}}]
"""


def test_a_task_of_the_harness_on_a_parquet_file(base: Path, easy_vqa: Path, tmp_path: Path) -> None:
    data = tmp_path / "some.jsonl"
    data.write_text("".join((easy_vqa / "test.jsonl").read_text().splitlines(keepends=True)[:12]))
    (tmp_path / "images").symlink_to(easy_vqa / "images")
    turns = [json.loads(line)["conversations"][0] for line in data.read_text().splitlines()]
    rows = {
        "image": [str(easy_vqa / "images" / turn["images"][0]) for turn in turns],
        "question": [turn["user"] for turn in turns],
        "answer": [turn["assistant"] for turn in turns],
    }
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "some.parquet")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "own.py").write_text(PARQUET_FUNCTIONS)
    (folder / "own.yaml").write_text(PARQUET_TASK.format(file=tmp_path / "some.parquet"))
    results = evaluate(base, ["parquet"], include=folder)
    expected = ours(base, data, ["accuracy"], 8)
    assert [line["filtered_resps"][0] for line in results["samples"]["parquet"]] == list(answers(expected).values())
    assert results["results"]["parquet"]["hits,none"] == pytest.approx(expected.primary.value, abs=1e-12)


def test_what_is_not_supported_is_refused(base: Path, task_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3V_DATA", str(task_data))
    with pytest.raises(UserError, match=r"temperature is 0\.7"):
        evaluate(base, ["phi3v_nlvr2"], gen_kwargs="temperature=0.7")
    make = get_model("phi3v").create_from_arg_string
    for options, what in (
        ("pretrained=x/y,num_crop=4", "model_args num_crop: is no option"),
        ("pretrained=none-such", "model.path none-such"),
        (f"pretrained={base},batch_size=auto", "batch_size: must be a whole number"),
        (f"pretrained={base},dtype=int8", "dtype: int8 is not known"),
        (f"pretrained={base},device=tpu", "device: tpu is not there"),
    ):
        with pytest.raises(UserError, match=what):
            make(options)
    monkeypatch.setenv("PHI3V_DATA", "/nowhere")
    with pytest.raises(UserError, match=r"/nowhere/docvqa/val\.jsonl: no such data file"):
        evaluate(base, ["phi3v_docvqa"])
