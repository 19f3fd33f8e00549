"""One HTML file that holds everything: style, script and data, and may load nothing.

Nothing that comes from data is ever part of the markup. It travels as compressed JSON in base64, which has no
character that means something in HTML, and the script shows it as text. On top, the page's own policy runs this one
script, by its hash, and lets nothing be loaded from anywhere.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import io
import json
import webbrowser
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from phi3v.data.jsonl import replacing
from phi3v.paths import cannot_write
from phi3v.terminal import say

WEBP_QUALITY = 72
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src '{style_hash}'; \
script-src '{script_hash}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<noscript>This page needs JavaScript. Everything it shows lies in the files it was made from.</noscript>
<main id="page" tabindex="-1"></main>
{blocks}
<script>{script}</script>
</body>
</html>
"""


def write_page(out: Path, title: str, parts: tuple[str, ...], blocks: dict[str, Any]) -> int:
    """Write a page, all or nothing, and return its size in bytes.

    Args:
        parts: names of the scripts in ``templates/``, in order; the style is the same for all pages.
        blocks: plain values by name, each of which the script unpacks by itself.

    Raises:
        UserError: it cannot be written.
    """
    # Half of a surrogate pair, as in the name of a folder, cannot be written as UTF-8; it becomes a question mark.
    content = build_page(title, parts, blocks).encode("utf-8", errors="replace")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise cannot_write(error, str(out), "choose another --out") from None
    return len(content)


def webp(image: Image.Image, side: int) -> str:
    """The image, its longer side at most ``side`` pixels, as WebP in base64."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    with io.BytesIO() as file:
        small.save(file, "WEBP", quality=WEBP_QUALITY, method=2)
        return base64.b64encode(file.getvalue()).decode("ascii")


def announce_page(console: Console, page: str, size: int, *, show: bool) -> None:
    """Say where a page of ``size`` bytes is, and with ``show`` open it in the browser."""
    say(console, f"{page}: {size / 1e6:.2f} MB")
    if show:
        webbrowser.open(Path(page).resolve().as_uri())


def build_page(title: str, parts: tuple[str, ...], blocks: dict[str, Any]) -> str:
    """The text of a page; see `write_page`."""
    style = _template("style.css")
    script = "(() => {\n'use strict';\n" + "\n".join(_template(f"{part}.js") for part in parts) + "\n})();"
    return PAGE.format(
        title=html.escape(title),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        blocks="\n".join(_block(name, value) for name, value in blocks.items()),
    )


def _template(name: str) -> str:
    return resources.files("phi3v.report").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _block(name: str, value: Any) -> str:
    data = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    packed = gzip.compress(data.encode("utf-8", errors="replace"), 6, mtime=0)
    return f'<script type="text/plain" id="data-{name}">{base64.b64encode(packed).decode("ascii")}</script>'
