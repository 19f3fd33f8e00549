"""What goes wrong in the middle of a run: what is said, how it ends, and that nothing saved is lost."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from resume_helpers import assert_same_run, lines
from run_helpers import Train, read_metrics
from safetensors.torch import load_file

from phi3v.cli import main
from phi3v.data.table import open_table
from phi3v.train import prepare as prepare_module
from phi3v.train.checkpoint_folder import damage, find_checkpoint
from phi3v.train.checkpoints import writer as checkpointer
from phi3v.train.checkpoints.writer import Checkpointer
from phi3v.train.loop import TrainingLoop
from phi3v.train.observers import evaluation as evaluation_callback
from phi3v.train.observers import signals

SETTINGS = (
    *("evaluation.before", "false", "evaluation.after", "false", "checkpoint.save_steps", 1, "training.max_steps", 5),
    *("training.batch_size", 2, "training.micro_batch_size", 1, "checkpoint.keep_last", 10),
    *("method.name", "lora", "method.lora.rank", 4, "method.lora.dropout", 0.2),
)


def once_at(step: int, metrics: Path, act: Callable[[], None]) -> None:
    """Do something in another thread when a step has been logged."""

    def watch() -> None:
        while not (metrics.is_file() and metrics.read_text().count("\n") >= step):
            time.sleep(0.005)
        act()

    threading.Thread(target=watch, daemon=True).start()


def command(model: Path, data: Path, out: Path, *settings: object) -> list[str]:
    every: tuple[object, ...] = (
        *("model.path", model, "data.train", data / "train.jsonl", "data.num_workers", 0, "training.output_dir", out),
        *("training.learning_rate", 2e-3, "training.warmup_steps", 1, "training.logging_steps", 1),
        *(*SETTINGS, *settings),
    )
    pairs = dict(zip(every[::2], every[1::2], strict=True))
    return ["train", *(part for name, value in pairs.items() for part in (f"--{name}", str(value)))]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGUSR1,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_training_after_its_step(
    train: Train, tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (*SETTINGS, "checkpoint.save_steps", "null", "training.max_steps", 16)
    once_at(3, tmp_path / "run" / "metrics.jsonl", lambda: os.kill(os.getpid(), number))
    code, folder = train(*settings)
    assert code == 3
    found = find_checkpoint(folder)
    assert found.folder is not None
    step = int(found.folder.name.split("-")[1])
    assert step == read_metrics(folder)[-1]["step"] < 16
    shown = capsys.readouterr().err
    assert f"stopped by {number.name} after step {step}, which is saved in {found.folder}" in shown
    assert not (folder / "final").exists()
    if number == signal.SIGUSR1:
        settings = (*settings, "checkpoint.save_steps", 16)
        assert train(*settings, resume="auto")[0] == 0
        code, whole = train(*settings, out="whole")
        assert code == 0
        assert_same_run(whole, folder, last=16)


def test_a_signal_before_training_ends_at_once(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_module, "check_gradients", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
    code, folder = train(*SETTINGS)
    assert code == 3
    assert "stopped by SIGTERM while loading" in capsys.readouterr().err
    assert not folder.exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_interrupt_does_not_wait(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingLoop, "compute_loss", twice)
    code, folder = train(*SETTINGS)
    assert code == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(folder.glob("checkpoint-*"))


def test_a_second_signal_ends_a_step_that_does_not_end(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher repeats the first at once; that one says nothing."""

    def hangs(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(signals, "SECONDS_TO_REPEAT", 60.0)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(signals, "SECONDS_TO_REPEAT", 0.0)
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(600)

    monkeypatch.setattr(TrainingLoop, "compute_loss", hangs)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    try:
        code, folder = train(*SETTINGS)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 3
    assert "stopped by a second SIGHUP while training, within a step" in capsys.readouterr().err
    assert not list(folder.glob("checkpoint-*"))


def test_nohup_is_respected(train: Train) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.Signals() as held:
            os.kill(os.getpid(), signal.SIGHUP)
        assert held.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()], ids=["gpu", "host"]
)
def test_out_of_memory_names_the_newest_checkpoint(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    step = TrainingLoop.compute_loss

    def grows(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.step == 2:
            raise error
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TrainingLoop, "compute_loss", grows)
    code, folder = train(*SETTINGS)
    assert code == 2
    shown = capsys.readouterr().err
    assert "out of memory while training" in shown
    assert f"the newest checkpoint is {folder / 'checkpoint-2'}; lower training.micro_batch_size" in shown


def test_best_weights_on_a_full_disk(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = evaluation_callback.save_replacing

    def full(model: Any, processor: Any, folder: Path, tensors: Any) -> None:
        if len(saved) == 1:
            raise OSError(28, "No space left on device")
        saved.append(folder)
        save(model, processor, folder, tensors)

    saved: list[Path] = []
    scores = iter((0.25, 0.5, 0.4))
    result = SimpleNamespace(summary=dict, scores=[], questions=[], num_cut=0, sources=[], scores_of={})
    monkeypatch.setattr(evaluation_callback, "save_replacing", full)
    monkeypatch.setattr(
        evaluation_callback,
        "evaluate_model",
        lambda *args, **kwargs: SimpleNamespace(**vars(result), primary=SimpleNamespace(name="x", value=next(scores))),
    )
    settings = (*SETTINGS, "training.max_steps", 3, "evaluation.eval_steps", 1, "evaluation.keep_best", "true")
    code, _ = train(*settings)
    assert code == 0
    shown = " ".join(capsys.readouterr().out.split())
    said = "the best weights so far could not be kept: No space left on device; best/ holds those of step 1"
    assert shown.count(said) == 2  # step 3 is better than what is kept, and is tried again
    assert "final/ holds the weights of step 1" in shown


def _signalled(arguments: list[str], metrics: Path) -> int:
    if os.environ["RANK"] == "1":
        once_at(2, metrics, lambda: os.kill(os.getpid(), signal.SIGTERM))
    return main(arguments)


def test_a_signal_to_one_rank_stops_all(tmp_path: Path, small_model_dir: Path, easy_vqa: Path) -> None:
    out = tmp_path / "run"
    arguments = command(small_model_dir, easy_vqa, out, "training.max_steps", 60, "checkpoint.save_steps", "null")
    shown = run_ranks(2, _signalled, arguments, out / "metrics.jsonl", folder=tmp_path / "printed", codes=(3, 3))
    last = read_metrics(out)[-1]["step"]
    assert f"stopped by SIGTERM after step {last}, which is saved" in shown
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{last}"]
    assert damage(out / f"checkpoint-{last}") is None


def _whole_group_signalled(arguments: list[str], metrics: Path) -> int:
    os.setsid()
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have readers
    once_at(2, metrics, lambda: os.killpg(0, signal.SIGTERM))
    return 0 if main(arguments) == 3 else 1


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["none", "samples"])
def test_a_signal_to_all_processes_leaves_the_readers_alive(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, packing: str
) -> None:
    """As Slurm sends it; the step is done with what the readers still bring."""
    out = tmp_path / "run"
    settings = ("training.max_steps", 200, "data.num_workers", 2, "data.packing", packing)
    arguments = command(small_model_dir, easy_vqa, out, *settings)
    run_ranks(1, _whole_group_signalled, arguments, out / "metrics.jsonl", folder=tmp_path / "printed")
    assert find_checkpoint(out).folder == out / f"checkpoint-{read_metrics(out)[-1]['step']}"


def not_finite(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Losses that are no numbers in some micro-batches, counted from 1."""
    compute, count = TrainingLoop.compute_loss, iter(range(1, 1000))

    def spoilt(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if next(count) in calls else loss

    monkeypatch.setattr(TrainingLoop, "compute_loss", spoilt)


def test_a_step_that_is_not_finite_changes_nothing(
    train: Train, monkeypatch: pytest.MonkeyPatch, easy_vqa: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    not_finite(monkeypatch, {4})  # the second micro-batch of step 2
    code, folder = train(*SETTINGS)
    assert code == 0
    shown = " ".join(capsys.readouterr().out.split())
    (named,) = [record for record in open_table(easy_vqa / "train.jsonl") if f"{record.id} (line" in shown]
    assert f"step 2: the loss is not finite, so the step changes no weight; records: {named.id} (line" in shown
    assert not (folder / "checkpoint-2").exists()
    first, third = (load_file(folder / f"checkpoint-{n}" / "model" / "adapter_model.safetensors") for n in (1, 3))
    assert all(bool(tensor.isfinite().all()) for tensor in third.values())
    assert any(not torch.equal(first[name], third[name]) for name in first)
    assert [line["loss"] is None for line in read_metrics(folder)] == [False, True, False, False, False]


def test_steps_in_a_row_that_are_not_finite_end_the_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    not_finite(monkeypatch, {5, 6, 7, 8})
    code, folder = train(*SETTINGS, "training.max_nonfinite_steps", 2)
    assert code == 2
    shown = capsys.readouterr().err
    assert "the loss is not finite at step 4, 2 steps in a row; records: " in shown
    assert shown.count("(line ") == 2
    assert f"the newest checkpoint is {folder / 'checkpoint-2'}" in shown
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.fixture
def own_data(tmp_path: Path, easy_vqa: Path) -> Path:
    """A copy of the data, to damage."""
    return Path(shutil.copytree(easy_vqa, tmp_path / "data", symlinks=False))


def damage_picture(data: Path, record: int) -> Path:
    """Truncate the picture of a record; the whole file is kept beside it."""
    image = data / "images" / open_table(data / "train.jsonl")[record].turns[0].images[0]
    shutil.copy(image, image.with_suffix(".whole"))
    image.write_bytes(image.read_bytes()[:200])
    return image


def damage_after_the_check(monkeypatch: pytest.MonkeyPatch, data: Path, record: int = 7) -> None:
    check = prepare_module.check_gradients

    def check_then_damage(*args: Any, **kwargs: Any) -> int:
        checked = check(*args, **kwargs)
        damage_picture(data, record)
        return checked

    monkeypatch.setattr(prepare_module, "check_gradients", check_then_damage)


def test_a_picture_that_breaks_stops_the_run_and_can_be_repaired(
    train: Train, own_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (*SETTINGS, "data.train", own_data / "train.jsonl", "checkpoint.save_steps", "null")
    settings = (*settings, "training.max_steps", 12)
    with monkeypatch.context() as patched:
        damage_after_the_check(patched, own_data)
        code, folder = train(*settings)
    assert code == 2
    line = open_table(own_data / "train.jsonl")[7].line
    shown = capsys.readouterr().err
    assert f"train.jsonl:{line}: conversations[0].images[0]: the image is truncated" in shown
    saved = find_checkpoint(folder).folder
    assert saved is not None
    assert int(saved.name.split("-")[1]) == read_metrics(folder)[-1]["step"]
    for image in (own_data / "images").rglob("*.whole"):
        shutil.move(image, image.with_suffix(".png"))
    assert train(*settings, resume="auto")[0] == 0
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 13))


@pytest.mark.parametrize("packing", ["none", "samples"])
def test_a_picture_that_breaks_is_left_out_exactly(
    train: Train, own_data: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    """One step over all 24 records with one left out is one step over the 23 others."""
    settings = (*SETTINGS, "training.max_steps", 1, "method.lora.dropout", 0, "checkpoint.save_steps", "null")
    settings = (*settings, "data.packing", packing, "data.on_bad_sample", "skip", "data.pack_tokens", 700)
    records = (own_data / "train.jsonl").read_text().splitlines()
    (own_data / "others.jsonl").write_text("\n".join(records[:7] + records[8:]) + "\n")
    code, others = train(*settings, "data.train", own_data / "others.jsonl", "training.batch_size", 23, out="others")
    assert code == 0
    damage_after_the_check(monkeypatch, own_data)
    code, folder = train(*settings, "data.train", own_data / "train.jsonl", "training.batch_size", 24)
    assert code == 0
    (a,), (b,) = lines(others), lines(folder)
    assert (a["samples"], a["questions"], a["tokens"]) == (b["samples"], b["questions"], b["tokens"])
    # The same terms, summed in another order.
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    log = (folder / "log.txt").read_text()
    record = open_table(own_data / "train.jsonl")[7]
    result = json.loads(log.split("result ")[1].splitlines()[0])
    ((name, why),) = result["skipped"]
    assert name == f"{record.id} (line {record.line})"
    assert "the image is truncated" in why
    assert f"left out {name}: " in log


def _damaged(arguments: list[str], data: Path) -> int:
    check = prepare_module.check_gradients

    def check_then_damage(*args: Any, **kwargs: Any) -> int:
        checked = check(*args, **kwargs)
        if os.environ["RANK"] == "1":
            damage_picture(data, 7)
        return checked

    prepare_module.check_gradients = check_then_damage
    return main(arguments)


@pytest.mark.parametrize("choice", ["skip", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_picture_that_breaks_on_one_of_two_ranks(
    tmp_path: Path, small_model_dir: Path, own_data: Path, choice: str
) -> None:
    out = tmp_path / "run"
    settings = ("training.max_steps", 12, "data.on_bad_sample", choice)
    arguments = command(small_model_dir, own_data, out, *settings)
    codes = (0, 0) if choice == "skip" else (2, 2)
    shown = run_ranks(2, _damaged, arguments, own_data, folder=tmp_path / "printed", codes=codes)
    assert "the image is truncated" in shown
    assert read_metrics(out)[-1]["samples"] == (23 if choice == "skip" else 2 * len(read_metrics(out)))
    assert damage(find_checkpoint(out).folder or out) is None


def test_a_full_disk_leaves_what_was_saved(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 3 on no file may grow beyond some bytes, which is how a full disk looks to those who write."""
    save = Checkpointer.save
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(self: Checkpointer, state: Any) -> None:
        self.wait()
        if state.step >= 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        save(self, state)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpointer, "save", save_on_a_full_disk)
        try:
            code, folder = train(*SETTINGS)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    shown = capsys.readouterr()
    said = " ".join(shown.out.split())
    for step in (3, 4, 5):
        assert f"checkpoint of step {step} not saved: " in said
    assert "File too large" in said
    assert f"the newest checkpoint is {folder / 'checkpoint-2'}, and training goes on" in said
    assert "final: cannot be saved: " in shown.err
    assert not list(folder.glob(".checkpoint-*"))
    assert train(*SETTINGS, resume="auto")[0] == 0
    assert (folder / "final" / "manifest.json").is_file()


def test_too_little_room_is_said_before_anything_is_written(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpointer, "free_space", lambda folder: 1000)
    code, folder = train(*SETTINGS, "training.max_steps", 1)
    assert code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "checkpoint of step 1 not saved: it takes 0." in shown
    assert f"MB and 0.0 MB are free in {folder}; there is no checkpoint yet, and training goes on" in shown


def test_a_save_stands_though_older_ones_cannot_be_removed(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def busy(run_folder: Path, keep: int) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(checkpointer, "remove_older", busy)
    code, folder = train(*SETTINGS, "training.max_steps", 2)
    assert code == 0
    assert "not saved" not in " ".join(capsys.readouterr().out.split())
    assert (folder / "checkpoint-2" / "manifest.json").is_file()
    assert "older checkpoints could not be removed" in (folder / "log.txt").read_text()


def _dies(arguments: list[str], metrics: Path) -> int:
    if os.environ["RANK"] == "1":
        once_at(2, metrics, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return main(arguments)


def test_a_rank_that_dies_is_noticed(tmp_path: Path, small_model_dir: Path, easy_vqa: Path) -> None:
    out = tmp_path / "run"
    arguments = command(small_model_dir, easy_vqa, out, "training.max_steps", 60)
    shown = run_ranks(2, _dies, arguments, out / "metrics.jsonl", folder=tmp_path / "printed", codes=(1, -9))
    assert "error: another process of this run ended" in shown
    assert re.search(r"the newest checkpoint is \S+; start again with --resume", shown)
    assert "Traceback" not in shown
    assert find_checkpoint(out).folder is not None


def _hangs(arguments: list[str]) -> int:
    step = TrainingLoop.compute_loss

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1" and self.state.step == 2:
            time.sleep(12)
        return step(self, *args, **kwargs)

    TrainingLoop.compute_loss = slow
    return main(arguments)


@pytest.mark.slow
def test_a_rank_that_hangs_is_noticed(tmp_path: Path, small_model_dir: Path, easy_vqa: Path) -> None:
    out = tmp_path / "run"
    arguments = command(small_model_dir, easy_vqa, out, "distributed.timeout_minutes", 0.1)
    shown = run_ranks(2, _hangs, arguments, folder=tmp_path / "printed", codes=(1, 1))
    assert "did not answer within 0.1 minutes" in shown
    assert "checkpoint-2; start again with --resume" in shown
