"""What a report costs: its size, the time until it can be used in Chromium, and what refreshing takes from training.

    python benchmarks/report_page.py [--questions 50000] [--run quickstart/run] [--chromium /usr/bin/chromium]

A made-up run with many predictions is written and reported. A page counts as usable when its gallery shows cards and a
search has been answered. With ``--run``, the report of that run is measured too, and a refresh of it while it trains.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw

from bench_result import ROOT, write_result
from phi3v.config import DataConfig, RunConfig
from phi3v.processing.tiny_tokenizer import WORDS
from phi3v.report.live import LiveReport
from phi3v.report.report import report

SPREAD = 0.05


def make_run(
    folder: Path, *, questions: int, pictures: int = 40, steps: int = 200, seed: int = 0, metric: str = "accuracy"
) -> Path:
    """Write a run folder as a run leaves it, with made-up numbers and images of coloured shapes."""
    generator = Random(seed)
    images = folder / "data" / "images"
    images.mkdir(parents=True)
    for number in range(pictures):
        picture = Image.new("RGB", (240, 180), tuple(generator.randrange(170, 256) for _ in range(3)))
        x, y = generator.randrange(140), generator.randrange(90)
        colour = tuple(generator.randrange(200) for _ in range(3))
        ImageDraw.Draw(picture).ellipse((x, y, x + 80, y + 80), fill=colour)
        picture.save(images / f"{number}.png")
    config = RunConfig(data=DataConfig(train="train.jsonl", eval=str(folder / "data" / "test.jsonl")))
    config.training.learning_rate *= 1 + seed
    config.training.output_dir = str(folder)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (folder / "environment.json").write_text('{"command": ["phi3v", "train"], "gpus": []}', encoding="utf-8")
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            line = {
                "step": step,
                "loss": 4 / (1 + step / 20) + generator.uniform(0, SPREAD),
                "grad_norm": 1 + generator.random(),
                "learning_rate": 1e-4 * (1 - step / steps),
                "samples_per_second": 4 + generator.random(),
                "questions_per_second": 9 + generator.random(),
                "tokens_per_second": 2000 + 100 * generator.random(),
                "peak_memory_gb": 2.5,
                "seconds": step * 1.5,
            }
            file.write(json.dumps(line) + "\n")
            if step % (steps // 4) == 0:
                score = {"value": step / steps / 2, "low": step / steps / 2 - 0.04, "high": step / steps / 2 + 0.04}
                measured = {"step": step, "eval": {metric: score | {"n": 100}}, "best": True, "eval_seconds": 2.0}
                file.write(json.dumps(measured) + "\n")
    answers = WORDS[20:32]
    truths = [generator.choice(answers) for _ in range(questions)]
    prompts = [" ".join(generator.choices(WORDS, k=9)) + "?" for _ in range(questions)]
    most_frequent, times = Counter(truths).most_common(1)[0]
    for when, skill in (("before", 0.2), ("after", 0.7)):
        correct = cut = 0
        with (folder / f"predictions_{when}.jsonl").open("w", encoding="utf-8") as file:
            for number, (truth, prompt) in enumerate(zip(truths, prompts, strict=True)):
                answer = truth if generator.random() < skill else generator.choice(answers)
                correct += answer == truth
                line = {
                    "id": f"test-{number:06}",
                    "prompt": prompt,
                    "images": [f"{number % pictures}.png"],
                    "references": [truth],
                    "prediction": answer,
                    "score": float(answer == truth),
                    "correct": answer == truth,
                    "cut": number % 10 == 9 and answer != truth,
                }
                cut += bool(line["cut"])
                file.write(json.dumps(line) + "\n")
        share = correct / questions
        score = {"value": share, "low": max(0.0, share - SPREAD), "high": min(1.0, share + SPREAD), "n": questions}
        score["most_frequent"] = times / questions
        summary = {"metric": metric, "score": share, "num_questions": questions, "scores": {metric: score}}
        summary |= {"max_new_tokens": 64, "num_cut": cut, "most_frequent_answer": most_frequent}
        (folder / f"eval_{when}.json").write_text(json.dumps(summary), encoding="utf-8")
    result = {"steps": steps, "train_seconds": steps * 1.5, "samples_per_second": 4.5, "peak_memory_gb": 2.5}
    (folder / "log.txt").write_text(f"2026-01-01 INFO phi3v: result {json.dumps(result)}\n", encoding="utf-8")
    (folder / "final").mkdir()
    return folder


def open_in_chromium(page_file: Path, chromium: str) -> dict[str, float]:
    """Seconds until curves are there, until the gallery is, and that a search takes then."""
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        start = time.perf_counter()
        page.goto(page_file.resolve().as_uri(), wait_until="commit")
        page.wait_for_selector("#curves path")
        curves = time.perf_counter() - start
        page.wait_for_selector("html[data-ready] .prediction")
        usable = time.perf_counter() - start
        wanted = page.locator(".prediction").last.get_attribute("data-id")
        start = time.perf_counter()
        page.get_by_label("search predictions").fill(wanted or "")
        expect(page.locator(".prediction")).to_have_count(1)
        search = time.perf_counter() - start
        browser.close()
    return {"curves": round(curves, 2), "gallery": round(usable, 2), "search": round(search, 2)}


def measure_page(folder: Path, out: Path, chromium: str) -> dict[str, Any]:
    """The report of one run: seconds to write it, its bytes, and how it opens."""
    start = time.perf_counter()
    told = report([folder], out=out)
    return {
        "predictions": told["runs"][0]["predictions"],
        "seconds_to_write": round(time.perf_counter() - start, 2),
        "bytes": told["bytes"],
        "seconds_in_chromium": open_in_chromium(out, chromium),
    }


def seconds_of_refresh(folder: Path) -> float:
    """What one refresh at a logging step takes; the report of the run is written again after it."""

    class State:
        is_world_process_zero = True

    live = LiveReport(folder)
    live.on_train_begin(None, State(), None)
    taken = []
    with live:
        for _ in range(5):
            live._next = 0.0
            before = live.seconds
            live.on_log(None, State(), None)
            taken.append(live.seconds - before)
    return round(sorted(taken)[2], 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=50_000)
    parser.add_argument("--run", type=Path, help="a finished run, e.g. the quickstart's")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "report_page.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_run(Path(temporary) / "many", questions=arguments.questions, pictures=2000)
        result = {"made_up_run": measure_page(folder, Path(temporary) / "many.html", arguments.chromium)}
        if arguments.run is not None:
            result["run"] = measure_page(arguments.run, Path(temporary) / "run.html", arguments.chromium)
            result["seconds_of_refresh"] = seconds_of_refresh(arguments.run)
    print(json.dumps(write_result("report_page", result, arguments.out), indent=2))


if __name__ == "__main__":
    main()
