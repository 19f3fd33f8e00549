"""Pretrain a tiny base model: the tiny preset, taught on images drawn from a seed.

    python benchmarks/tiny_base.py [--work build/tiny_base]

LoRA, QLoRA and a frozen tower mean nothing on random weights, so the small runs of every task (`task_table.py`) start
from this model. First the tower learns what single tokens show (`tiny_tower.py`), then the decoder where to look
(`tiny_pointers.py`). After that it learns to answer in the stages of `STAGES`; each draws its images (`scenes.py`)
and is one run of ``phi3v train`` on two processes. Interrupted and started again, it goes on from its newest
checkpoint; the same versions on the same processor give the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench_result import write_result
from phi3v.data.jsonl import replacing, write_jsonl
from scenes import SEVERAL, SINGLE, Scene
from tiny_pointers import teach_pointers
from tiny_tower import teach_tower

ROOT = Path(__file__).parents[1]
SEED = 35
BATCH_SIZE = 8
# Fixed: the order of sums, and so the last bits of the weights, depend on them.
PROCESSES = 2  # of a stage, of one thread each
LEVELS = ("easy", "medium", "hard")
TEST_SCENES = 25  # of each kind and level
DESCRIPTIONS = {
    "one": "one coloured shape: which, its colour, the ground",
    "text": "read words and numbers in many fonts, by place and in order",
    "fields": "find and read labelled fields",
    "digits": "read handwritten digits",
    "shapes": "coloured shapes: which, where, how many",
    "caption": "an image with a caption that matches it or not",
    "pair": "compare two images",
    "frames": "order and motion in three or four frames",
}


@dataclass(frozen=True)
class Stage:
    """Images of some kinds and how long to learn from them."""

    name: str
    samples: int
    kinds: dict[str, float]  # kind of scene -> share
    levels: tuple[float, float, float]  # shares of easy, medium and hard scenes
    learning_rate: float = 1e-3
    schedule: str = "constant_with_warmup"


STAGES = (
    Stage(
        "answer",
        7200,
        {
            "one": 0.3,
            "text": 0.1,
            "fields": 0.3,
            "digits": 0.1,
            "shapes": 0.2,
            "caption": 0.15,
            "pair": 0.15,
            "frames": 0.15,
        },
        (0.6, 0.3, 0.1),
        schedule="linear",
    ),
)
TOWER: dict[str, Any] = {"pages": 24000, "batch_size": 4, "learning_rate": 2e-3}
POINTERS: dict[str, Any] = {"steps": 1800, "batch_size": 8, "learning_rate": 1e-3}


def draw(kind: str, level: int, rng: np.random.Generator) -> list[Scene]:
    """The scenes of one sample: one of several images, or two of one image each."""
    if kind in SINGLE:
        return [SINGLE[kind](rng, level)]
    return [SEVERAL[kind](rng, level)]


def samples(stage: Stage, index: int, images: Path) -> Iterator[dict[str, Any]]:
    """The records of a stage; each is drawn from a seed of its own."""
    kinds, shares = list(stage.kinds), np.array(list(stage.kinds.values()))
    for number in range(stage.samples):
        rng = np.random.default_rng([SEED, index, number])
        kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
        level = int(rng.choice(3, p=stage.levels))
        turns = []
        for part, scene in enumerate(draw(kind, level, rng)):
            first: dict[str, Any] = {"images": save_images(scene, images, f"{number // 1000}/{number}-{part}")}
            for question, answer in scene.turns:
                turns.append(first | {"user": question, "assistant": answer})
                first = {}
        yield {"id": f"{stage.name}-{number:06d}", "source": f"{kind}-{level}", "conversations": turns}


def save_images(scene: Scene, images: Path, stem: str) -> list[str]:
    """Write the scene's images and return their names."""
    names = [f"{stem}-{k}.png" for k in range(len(scene.images))]
    for name, image in zip(names, scene.images, strict=True):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(images / name) as temporary:
            image.save(temporary, format="PNG", compress_level=1)
    return names


def run_stage(stage: Stage, index: int, model: Path, folder: Path) -> Path:
    """Draw the stage's images and learn from them; what is finished already is taken as it is."""
    data, run = folder / "data", folder / "run"
    if not (data / "train.jsonl").exists():
        write_jsonl(data / "train.jsonl", samples(stage, index, data / "images"))
    if not (run / "final" / "manifest.json").exists():
        settings = {
            "model.path": model,
            "data.train": data / "train.jsonl",
            "data.image_check": "header",
            # The tower sees already, and the steps are three times as fast.
            "method.name": "frozen-vision",
            "method.train_embeddings": "true",
            "training.output_dir": run,
            "training.seed": SEED + index,
            "training.batch_size": BATCH_SIZE,
            "training.micro_batch_size": BATCH_SIZE // PROCESSES,
            "training.learning_rate": stage.learning_rate,
            "training.schedule": stage.schedule,
            "training.warmup_steps": 20,
            "training.activation_checkpointing": "none",
            "training.loss_weighting": "token",
            "checkpoint.save_minutes": 5,
            "checkpoint.keep_last": 1,
        }
        options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        resume = ["--resume"] if any(run.glob("checkpoint-*")) else ["--training.overwrite", "true"]
        phi3v("train", *options, *resume, processes=PROCESSES)
        shutil.rmtree(data / "images")
    return run / "final"


def measure(model: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """The share of right answers to questions about new images, by kind and level."""
    data, out = folder / "data", folder / "eval"
    kinds = list(DESCRIPTIONS)
    if not (data / "test.jsonl").exists():
        write_jsonl(data / "test.jsonl", test_records(kinds, data / "images"))
    shutil.rmtree(out, ignore_errors=True)
    options = ("--metrics", "accuracy", "--batch-size", "32", "--max-new-tokens", "24", "--out", str(out))
    phi3v("eval", str(model), "--data", str(data / "test.jsonl"), *options)
    right: dict[str, list[bool]] = {}
    for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        right.setdefault("-".join(answer["id"].split("-")[:2]), []).append(bool(answer["correct"]))
    return {
        f"{kind}-{level}": {"n": len(of_level), "accuracy": round(sum(of_level) / len(of_level), 4)}
        for kind in kinds
        for level, name in enumerate(LEVELS)
        for of_level in [right[f"{kind}-{name}"]]
    }


def test_records(kinds: list[str], images: Path) -> Iterator[dict[str, Any]]:
    """Scenes that no stage drew, each question a record."""
    for place, kind in enumerate(kinds):
        for level, name in enumerate(LEVELS):
            for number in range(TEST_SCENES):
                # Four numbers where the stages have three: another stream of random numbers.
                scene = draw(kind, level, np.random.default_rng([SEED, place, level, 10**6 + number]))[0]
                names = save_images(scene, images, f"{kind}-{name}-{number}")
                for k, (question, answer) in enumerate(scene.turns):
                    turn = {"images": names, "user": question, "assistant": answer}
                    yield {"id": f"{kind}-{name}-{number}-{k}", "source": kind, "conversations": [turn]}


def publish(model: Path, scores: dict[str, dict[str, Any]], out: Path) -> None:
    """Put the model into the work folder's ``base``, with its card."""
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(model.iterdir()):
        if file.name != "manifest.json":
            shutil.copyfile(file, out / file.name)
    rows = []
    for kind in list(DESCRIPTIONS):
        cells = [f"{100 * scores[f'{kind}-{level}']['accuracy']:.0f} %" for level in range(len(LEVELS))]
        rows.append(f"| {kind} | {DESCRIPTIONS[kind]} | {' | '.join(cells)} |")
    card = (Path(__file__).parent / "tiny_base_card.md").read_text(encoding="utf-8")
    (out / "README.md").write_text(card.replace("{rows}", "\n".join(rows)), encoding="utf-8")


def phi3v(*arguments: str, processes: int = 1) -> None:
    """Run a command of the package, in so many processes of one thread each."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *launcher, "phi3v", *arguments]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tiny_base", help="where stages are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tiny_base.json")
    arguments = parser.parse_args()
    work: Path = arguments.work
    model = work / "start"
    if not (model / "config.json").exists():
        phi3v("model", "init", "--preset", "tiny", "--seed", str(SEED), "--out", str(model))
    seconds = 0.0
    for name, teach, settings in (("tower", teach_tower, TOWER), ("pointers", teach_pointers, POINTERS)):
        if not (work / name / "config.json").exists():
            began = time.perf_counter()
            teach(model, work / f"{name}.new", seed=SEED, **settings)
            (work / f"{name}.new" / "seconds").write_text(str(time.perf_counter() - began))
            (work / f"{name}.new").rename(work / name)
        model = work / name
        seconds += float((model / "seconds").read_text())
    for index, stage in enumerate(STAGES):
        folder = work / f"stage-{index}-{stage.name}"
        print(f"stage {index + 1} of {len(STAGES)}: {stage.name} in {folder}", flush=True)
        model = run_stage(stage, index, model, folder)
        seconds += json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    scores = measure(model, work / "test")
    publish(model, scores, work / "base")
    details = {
        "tower": TOWER,
        "pointers": POINTERS,
        "processes": PROCESSES,
        "batch_size": BATCH_SIZE,
        "stages": [asdict(stage) for stage in STAGES],
        "train_seconds": round(seconds, 1),
        "scores": scores,
    }
    write_result("tiny_base", details, arguments.out)
    print(f"the base model is in {work / 'base'}, its scores in {arguments.out}")


if __name__ == "__main__":
    main()
