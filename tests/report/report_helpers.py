"""What the tests of pages share."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Opens a page and waits until it is ready; what goes wrong in its script, or is asked of the network, fails the test.
OpenPage = Callable[..., Any]

HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"> & \' " ${7} <!-- ]]>'


def block(page: Path, name: str) -> Any:
    """What the page's script unpacks under this name."""
    found = re.search(rf'<script type="text/plain" id="data-{name}">([^<]*)</script>', page.read_text(encoding="utf-8"))
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def rewrite(path: Path, **changes: Any) -> None:
    """Change fields of every line of a JSONL file."""
    lines = [json.loads(line) | changes for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
