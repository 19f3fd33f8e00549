"""What the tests of the planner and of the doctor share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path_factory.getbasetemp() / "phi3v-cache"))
