"""``phi3v bench`` and the scripts of ``benchmarks/``: options to a benchmark, its result to the screen and a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from phi3v.bench.generation import bench_generate
from phi3v.bench.pages import LETTER, draw_page, pages_for, write_pages
from phi3v.bench.preprocess import bench_preprocess
from phi3v.bench.result import with_environment, write_json
from phi3v.bench.training import default_preset, random_model
from phi3v.data.cache import cache_root
from phi3v.errors import UserError
from phi3v.paths import find_model


def preprocess_command(
    console: Console, *, images: Path | None, pages: int, repeats: int, num_crops: int, out: Path | None
) -> dict[str, Any]:
    """Measure preprocessing on the pictures of a folder, or on drawn letter pages.

    Raises:
        UserError: there is no such folder, or nothing in it.
    """
    if images is None:
        contents = [draw_page(seed, LETTER) for seed in range(pages)]
    else:
        if not images.is_dir():
            raise UserError("no such folder", where=f"--images {images}")
        files = sorted(path for path in images.iterdir() if path.is_file())[:pages]
        contents = [path.read_bytes() for path in files]
    return _finish("preprocess", bench_preprocess(contents, num_crops, repeats), console, out)


def generate_command(
    console: Console,
    *,
    preset: str | None,
    model: Path | None,
    data: Path | None,
    questions: int,
    batch_size: int,
    max_new_tokens: int,
    num_crops: int | None,
    out: Path | None,
) -> dict[str, Any]:
    """Measure generating with a model, or with random weights, on a data file, or on drawn pages."""
    folder = cache_root() / "bench"
    preset = preset or default_preset()
    path = (
        Path(find_model(str(model), f"--model {model}")) if model else random_model(preset, folder / f"model-{preset}")
    )
    pages = pages_for(questions)
    file = data or write_pages(folder / f"pages-{pages}", pages)
    figures = bench_generate(
        path,
        file,
        questions=questions,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        num_crops=num_crops,
    )
    return _finish("generate", {"model": str(model or f"{preset}, random weights")} | figures, console, out)


def _finish(name: str, figures: dict[str, Any], console: Console, out: Path | None) -> dict[str, Any]:
    result = with_environment(name, figures)
    table = Table("figure", "value", title=f"{name} on {result['device']}")
    for key, value in figures.items():
        if isinstance(value, dict):
            for inner, number in value.items():
                table.add_row(f"{key}: {inner}", str(number))
        else:
            table.add_row(key, str(value))
    console.print(table)
    if out is not None:
        write_json(result, out)
    return result
