"""What the self-check remembers of a GPU, and how ranks on different ones agree; the verdicts here are made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from phi3v.config import RunConfig, TrainingConfig
from phi3v.machine import CPU
from phi3v.model.configuration import Phi3VConfig
from phi3v.train.collectives import HostCollectives
from phi3v.train.device import RuntimeDevice, choose_device
from phi3v.train.methods.loading import ModelFacts, make_skeleton
from phi3v.train.selfcheck import check, examine
from phi3v.train.selfcheck.check import SelfCheck, self_check
from phi3v.train.selfcheck.verdict import Verdict

GPU = RuntimeDevice(torch.device("cuda"), "bf16", "", 0, 1, gpu=replace(CPU, type="cuda", name="Some GPU"))
Look = Callable[..., SelfCheck]


def facts_of(folder: Path) -> ModelFacts:
    return ModelFacts(make_skeleton(Phi3VConfig.from_pretrained(folder)), torch.bfloat16, "packed_flex", "", 4096)


@pytest.fixture
def looks() -> list[str]:
    """One entry for each examination."""
    return []


@pytest.fixture
def look(small_model_dir: Path, tmp_path: Path, looks: list[str], monkeypatch: pytest.MonkeyPatch) -> Look:
    """The self-check of a GPU on which FlexAttention is as it is said."""
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))

    def run(
        state: Any = "passed", driver: str = "570.1", wanted: Any = "auto", hidden: int | None = None, **row: Any
    ) -> SelfCheck:
        def examined(case: Any) -> Iterator[Verdict]:
            looks.append(driver)
            yield Verdict("attention", "packed_flex", "trying")
            yield Verdict("attention", "packed_flex", state, "the loss", 0.5, 0.01, 0.03)

        monkeypatch.setattr(check, "examine_apart", examined)
        monkeypatch.setattr(check, "device_identity", lambda _: {"device": "Some GPU", "driver": driver})
        config = RunConfig(training=TrainingConfig(self_check=wanted))
        facts = facts_of(small_model_dir)
        if hidden is not None:
            facts.skeleton.config.hidden_size = hidden
        return self_check(config, facts, GPU, HostCollectives(1), lambda: row)

    return run


@pytest.mark.parametrize("state", ["passed", "failed"])
def test_a_verdict_is_remembered(look: Look, looks: list[str], state: str) -> None:
    first, second = look(state), look(state)
    assert looks == ["570.1"]
    assert (first.was_known, second.was_known) == (False, True)
    assert first.verdicts == second.verdicts
    assert second.paths.attention == ("packed_flex" if state == "passed" else "packed_segments")
    assert look(state, wanted="always").was_known is False
    assert look(state, wanted="off").verdicts == ()
    assert len(looks) == 2


def test_another_driver_or_shape_is_looked_at_anew(look: Look, looks: list[str]) -> None:
    look()
    look(driver="580.2")
    look(hidden=64)
    assert looks == ["570.1", "580.2", "570.1"]


def test_another_kind_of_row_is_looked_at_anew(look: Look, looks: list[str]) -> None:
    """A verdict on text says nothing of the tower, and one on a record alone nothing of what it may see of others."""
    for row in ({"layout": ((0, 9),)}, {"layout": ((0, 9), (0, 7))}, {"layout": ((3, 9, 9), (0, 7))}):
        look(**row)
        look(pages=1, **row)
    assert len(looks) == 6
    look(layout=((0, 5), (0, 6)), pages=2)
    assert len(looks) == 6


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_a_full_card_is_no_fault_of_a_kernel(text: str) -> None:
    """It would be remembered. A library's own allocations fail otherwise than torch's."""

    def work() -> Verdict:
        raise RuntimeError(text)

    assert examine._caught("loss", "chunked", work).state == "unchecked"


def test_what_could_not_be_checked_is_not_remembered(look: Look, looks: list[str]) -> None:
    found = look("unchecked")
    assert found.paths.attention == "packed_flex"
    assert "attention packed_flex could not be checked on Some GPU" in found.findings[0].what
    look("unchecked")
    assert len(looks) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"verdicts": 3}', '{"verdicts": [{"path": 1}]}', '{"verdicts": [["a"]]}', "\x00"]
)
def test_a_damaged_file_is_as_good_as_none(look: Look, looks: list[str], tmp_path: Path, content: str) -> None:
    look()
    (file,) = (tmp_path / "cache" / "self_check").iterdir()
    file.write_text(content)
    assert look().verdicts[0].state == "passed"
    assert len(looks) == 2
    assert json.loads(file.read_text())["verdicts"]


def test_a_cache_that_cannot_be_written_does_no_harm(look: Look, looks: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    assert look().verdicts
    assert look().verdicts
    assert len(looks) == 2


def rank_of_another_kind(folder: str) -> int:
    """Three ranks, of which the last has another card, on which FlexAttention is wrong."""
    runtime = choose_device("fp32")
    is_other = runtime.rank == 2
    looked = []

    def examined(case: Any) -> Iterator[Verdict]:
        looked.append(case)
        yield Verdict("attention", "packed_flex", "failed" if is_other else "passed", "the loss", 0.5, 0.01, 0.03)

    check.examine = examined
    check.device_identity = lambda _: {"device": "Other GPU" if is_other else "Some GPU"}
    config = RunConfig(training=TrainingConfig(self_check="always"))
    ranks = HostCollectives(3, timedelta(minutes=1))
    found = self_check(config, facts_of(Path(folder)), runtime, ranks, dict)
    print(runtime.rank, len(looked), found.paths.attention, found.device)
    return 0


def test_ranks_agree_on_the_strictest_verdict(
    small_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank of each kind of card looks, and no other."""
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))
    shown = run_ranks(3, rank_of_another_kind, str(small_model_dir), folder=tmp_path / "printed")
    assert sorted(shown.splitlines()) == [
        f"{rank} {looked} packed_segments Some GPU and Other GPU" for rank, looked in enumerate((1, 0, 1))
    ]
