"""Every command of README and docs does what it says: run here in a folder as a reader would have it.

Commands that need what a test has not, or minutes of its time, are marked in their comment or start something else
(`torchrun`, `srun`, a page); of those the arguments are parsed.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_files import clip, image_bytes

from phi3v import cli
from phi3v.cli import parse
from phi3v.config import load_config
from phi3v.export import make, proof

ROOT = Path(__file__).parents[1]
HUB_MODEL = "microsoft/Phi-3.5-vision-instruct"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDER = re.compile(r"\b(?:SOURCE|MODEL_OR_RUN|RECIPE\.yaml|recipe\.yaml)\b|\[--")
ELSEWHERE = re.compile(r"needs a GPU|needs the hub|needs vLLM|needs the extra|\(Azure\)")
COUNTER = itertools.count()


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every ``phi3v`` command in a block of shell."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                if re.search(r"(?:^|\s)phi3v\s", line) and not line.lstrip().startswith(("#", "lmms-eval ")):
                    found.append((page.name, line.strip()))
    return found


def arguments_of(line: str) -> list[str]:
    """What comes after ``phi3v``."""
    words = shlex.split(line.replace("$", ""), comments=True)
    if "phi3v" in words:
        return words[words.index("phi3v") + 1 :]
    inner = next(word for word in words if "phi3v " in word)  # srun bash -c '…'
    return shlex.split(inner)[shlex.split(inner).index("phi3v") + 1 :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_model_dir: Path, easy_vqa: Path) -> Path:
    """What the pages speak of: pictures, clips, tables, data, recipes, two runs."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("photos/cat/1.png", "photos/dog/2.png", "pictures/7.png", "7.png", "8.png", "page.png", "page2.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(len(name)))
    for name in ("clips/run/1.avi", "clips/walk/2.avi", "clip.mp4"):
        clip(folder / name)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
    (folder / "llava.json").write_text(json.dumps([{"id": "7", "image": "7.png", "conversations": turns}]))
    chat = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A dog."}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": chat, "images": ["7.png"]}) + "\n")
    rows = [[name, "What is it?", "a dog"] for name in ("7.png", "8.png")]  # one of them to hold out
    write_table(folder / "labels.csv", ",", ["image", "question", "answer"], *rows)
    pairs = ["left", "right", "same", "fold", "key"]
    write_table(folder / "pairs.tsv", "\t", pairs, ["7.png", "8.png", "no", "train", "k1"])
    (folder / "data").mkdir()
    shutil.copytree(easy_vqa / "images", folder / "data" / "images")
    for name, source in (("train", "train"), ("val", "test"), ("test", "test")):
        count = 16 if name == "train" else 4  # a record for each of the GPUs that are planned for
        lines = (easy_vqa / f"{source}.jsonl").read_text().splitlines()[:count]
        assert len(lines) == count
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    shutil.copytree(folder / "data", folder / "data" / "docvqa")
    (folder / "my.yaml").write_text(f"model:\n  path: {small_model_dir}\ndata:\n  train: data/train.jsonl\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PHI3V_CACHE", str(folder / "cache"))
        for run in ("mine", "other"):
            command = ["train", "--method.name", "lora", "--checkpoint.save_steps", "1"]
            settings = quick(small_model_dir) | {"training.output_dir": f"output/{run}"}
            assert cli.main(given(command, settings)) == 0
    (folder / "output/mine/checkpoint-1").rename(folder / "output/mine/checkpoint-200")
    return folder


def write_table(path: Path, delimiter: str, *rows: list[str]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def given(arguments: list[str], settings: dict[str, Any]) -> list[str]:
    """The arguments with options of other values."""
    arguments = arguments.copy()
    for option, value in settings.items():
        if f"--{option}" in arguments:
            arguments[arguments.index(f"--{option}") + 1] = str(value)
        else:
            arguments += [f"--{option}", str(value)]
    return arguments


def quick(model: Path) -> dict[str, Any]:
    """Keys that make any recipe a run of a moment."""
    return {
        "model.path": model,
        "model.num_crops": 1,
        "model.attention": "auto",
        "data.train": "data/train.jsonl",
        "data.eval": "data/test.jsonl",
        "method.lora.rank": 4,
        "training.max_steps": 1,
        "training.batch_size": 2,
        "training.micro_batch_size": 1,
        "training.precision": "fp32",
        "evaluation.max_questions": 2,
        "evaluation.max_new_tokens": 2,
    }


def answer_here(folder: Path, probes: list[proof.Probe], work: Path) -> proof.Answers:
    """Where tests/test_export.py starts a process that costs seconds."""
    return proof.answer_probes(*proof.load_export(folder, torch.device("cpu")), probes)


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value[:60])
def test_a_command_works(
    page: str,
    line: str,
    folder: Path,
    small_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PHI3V_CACHE", str(folder / "cache"))
    monkeypatch.setattr("webbrowser.open", lambda url: True)
    monkeypatch.setattr(make, "answer_in_fresh_process", answer_here)
    if PLACEHOLDER.search(line):
        return  # a form, not a command
    arguments = [str(small_model_dir) if word == HUB_MODEL else word for word in arguments_of(line)]
    verb = arguments[0]
    is_page = verb == "chat" and "--prompt" not in arguments
    has_no_pair = arguments[:2] == ["data", "pairs"]  # a random model
    if not line.startswith("phi3v") or ELSEWHERE.search(line) or is_page or verb == "quickstart" or has_no_pair:
        parsed = parse(arguments)
        if getattr(parsed, "recipe", None) is not None and verb == "train":
            load_config(parsed.recipe, parsed.overrides)
        return
    if verb in ("train", "doctor"):
        arguments = given(arguments, quick(small_model_dir))
    if verb == "plan":
        arguments = given(arguments, {"model.path": small_model_dir, "data.train": "data/train.jsonl"})
    if arguments[:2] == ["data", "convert"]:
        arguments[arguments.index("--out") + 1] = f"converted/{next(COUNTER)}"  # a reader has one set of data
    if verb == "train":
        arguments = given(arguments, {"training.output_dir": f"output/run-{next(COUNTER)}"})
    if verb == "eval":
        arguments = given(arguments, {"max-questions": 2, "max-new-tokens": 2})
    if verb == "export" and "--out" in arguments:
        arguments = [*given(arguments, {"samples": 1}), "--overwrite"]
    assert cli.main(arguments) == 0


def test_there_are_commands() -> None:
    pages = {page for page, _ in commands()}
    assert {"README.md", "data.md", "export.md", "planning.md", "report.md", "resume.md"} <= pages


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if not path.startswith("http"):
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]+\.(?:py|yaml|json))`", text):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "src" / "phi3v")), name


def test_where_it_works_is_said_with_a_version_and_a_test() -> None:
    page = (ROOT / "docs" / "where_it_works.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert rows
    for _, version, test in rows:
        assert re.search(r"\d\.\d", version), version
        paths = re.findall(r"tests/[\w/.]+", test)
        assert "make test-ecosystem" in test or paths, test
        assert all((ROOT / path).exists() for path in paths), test


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_readme_is_short_and_its_figures_are_committed() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("\n") <= 170
    quick = result("quickstart")

    def percent(run: str, when: str, key: str) -> str:
        return f"{100 * quick[run]['evaluation'][when]['accuracy'][key] + 1e-9:.1f}"  # a half goes up

    expected = [f"{percent('quickstart', 'before', 'value')} %"]
    for run, bold in (("quickstart", "**"), ("from_scratch", "")):
        value, low, high = (percent(run, "after", key) for key in ("value", "low", "high"))
        expected.append(f"{value} %{bold} ({low} to {high})")
    seconds = {run: quick[run]["training"]["train_seconds"] for run in ("quickstart", "from_scratch")}
    expected.append(f"| {seconds['from_scratch'] / seconds['quickstart']:.2f} |")
    for data in ("easy-vqa", "receipts"):
        for over in ("recipe", "padded"):
            ratio = result("packing")[data][f"shared_image_over_{over}"]
            low, high = result("packing")[data][f"shared_image_over_{over}_range"]
            expected.append(f"{ratio:.1f}x ({low:.1f} to {high:.1f})")
    planned = {(row["machine"], row["method"]): row for row in result("plan_accuracy")["machines"]}
    for machine, method in (
        ("1x NVIDIA GeForce RTX 4090", "qlora"),
        ("1x NVIDIA GeForce RTX 4090", "lora"),
        ("1x NVIDIA H100 80 GB", "full"),
        ("8x NVIDIA A100 80 GB", "full"),
    ):
        row = planned[machine, method]
        needed, _, _, room, *_ = row["reason"].split()  # 12.4 GiB of 23.6 GiB …
        expected.append(f"| {needed} GiB of {room} | {row['samples_per_second']:.2f} |")
    for figure in expected:
        assert figure in readme, figure
