"""The command line for people's own data."""

from __future__ import annotations

from pathlib import Path

import pytest
from own_files import Convert, converter


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    """See `converter`."""
    return converter(tmp_path, capsys)
