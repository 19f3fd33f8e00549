"""The images of docs/images, taken from real pages in headless Chromium.

    python docs/screenshots.py --run quickstart/run [--other output/another] [--chromium /usr/bin/chromium]

``--run`` is a finished run; with ``--other`` the two are compared. The preview shows three photographs and a scanned
page from scikit-image (extra bench), with questions written here.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from phi3v.report.preview import preview
from phi3v.report.report import report

IMAGES = Path(__file__).parent / "images"
MAX_BYTES = 300_000
# (image, turns): what the preview shows.
PHOTOGRAPHS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("chelsea.png", (("Which animal is this?", "a cat"), ("What colour is its fur?", "orange and white"))),
    ("coffee.png", (("What is in the cup?", "coffee"), ("What lies on the saucer?", "a spoon"))),
    ("rocket.jpg", (("What is on the launch pad?", "a rocket"),)),
    ("page.png", (("Is this a photograph or a page of text?", "a page of text"),)),
)


def photographs(folder: Path) -> Path:
    """A data file of real images."""
    package = importlib.util.find_spec("skimage")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).parent / "data"
    (folder / "images").mkdir(parents=True)
    lines = []
    for name, turns in PHOTOGRAPHS:
        shutil.copy(source / name, folder / "images" / name)
        conversation: list[dict[str, Any]] = [{"user": user, "assistant": answer} for user, answer in turns]
        conversation[0]["images"] = [name]
        lines.append({"id": name.split(".")[0], "source": "photographs", "conversations": conversation})
    file = folder / "photographs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


class Camera:
    """Takes screenshots of pages, each below `MAX_BYTES`."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def open(self, file: Path, *, width: int = 1180, scheme: str = "light") -> Any:
        context = self.browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        page = context.new_page()
        page.goto(file.resolve().as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    def take(self, page: Any, name: str, *, top: float = 0, height: int = 900) -> None:
        """A screenshot of the page from ``top`` on."""
        page.wait_for_timeout(300)
        width = page.viewport_size["width"]
        clip = {"x": 0, "y": top, "width": width, "height": height}
        shot = page.screenshot(full_page=True, clip=clip)
        with Image.open(io.BytesIO(shot)) as shot_image:
            out = IMAGES / f"{name}.webp"
            shot_image.save(out, "WEBP", quality=82, method=6)
        size = out.stat().st_size
        assert size < MAX_BYTES, f"{out} has {size} bytes"
        print(f"{out}: {size / 1000:.0f} kB")

    def take_section(self, page: Any, section: str, name: str, *, height: int = 900) -> None:
        """A screenshot that starts at a section, without the sticky page header."""
        page.evaluate("document.querySelector('header.top').style.position = 'static'")
        box = page.locator(f"#{section}").bounding_box()
        self.take(page, name, top=box["y"] + page.evaluate("scrollY") - 12, height=min(height, int(box["height"]) + 24))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        folder = Path(temporary)
        camera = Camera(playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"]))
        report([arguments.run], out=folder / "report.html")
        page = camera.open(folder / "report.html")
        camera.take(page, "report", height=1060)
        camera.take_section(page, "confusion", "report-confusion", height=900)
        dark = camera.open(folder / "report.html", scheme="dark")
        dark.locator("[data-value=changed]").click()
        camera.take_section(dark, "predictions", "report-predictions", height=780)
        camera.take(camera.open(folder / "report.html", width=390), "report-phone", height=860)
        if arguments.other is not None:
            report([arguments.run, arguments.other], out=folder / "compared.html")
            camera.take(camera.open(folder / "compared.html"), "report-compared", height=1060)
        preview(photographs(folder / "data"), folder / "preview.html", samples=4)
        page = camera.open(folder / "preview.html")
        camera.take_section(page, "samples", "preview", height=1100)
        camera.browser.close()


if __name__ == "__main__":
    main()
