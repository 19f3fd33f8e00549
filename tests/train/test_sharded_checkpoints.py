"""Each rank saves its own part, and any engine on any number of ranks goes on from it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from resume_helpers import assert_same, assert_same_run, interrupted_copy
from rich.console import Console
from run_helpers import read_metrics
from safetensors.torch import load_file

from phi3v.cli import main
from phi3v.config import CheckpointConfig, RunConfig, TrainingConfig
from phi3v.data.shards.write import ShardOptions, shard_data
from phi3v.errors import UserError
from phi3v.train import assemble
from phi3v.train import pieces as pieces_module
from phi3v.train.checkpoint_folder import checkpoints, damage, step_of
from phi3v.train.checkpoints import formats
from phi3v.train.checkpoints.formats import choose_format
from phi3v.train.checkpoints.resume import find_resume_point
from phi3v.train.checkpoints.writer import Checkpointer
from phi3v.train.collectives import HostCollectives
from phi3v.train.device import RuntimeDevice, choose_device
from phi3v.train.engines import DataParallel, ZeroEngine
from phi3v.train.engines.choice import EngineChoice
from phi3v.train.finetuned import resolve_model
from phi3v.train.pieces import Piece, PieceError, gap, read_pieces, write_pieces

SLOW = pytest.mark.slow

SETTINGS: dict[str, object] = {
    "data.num_workers": 0,
    "training.max_steps": 4,
    "training.batch_size": 6,
    "training.micro_batch_size": 1,
    "training.learning_rate": 2e-3,
    "training.warmup_steps": 1,
    "training.schedule": "constant_with_warmup",
    "training.logging_steps": 1,
    "checkpoint.save_steps": 2,
    "checkpoint.keep_last": 10,
    "checkpoint.format": "sharded",
    "evaluation.before": "false",
    "evaluation.after": "false",
}


def command(model: Path, data: Path, out: Path, engine: str = "auto", **others: object) -> list[str]:
    """``phi3v train`` of a few steps that saves sharded checkpoints."""
    settings = SETTINGS | {
        "model.path": model,
        "data.train": data / "train.jsonl",
        "training.output_dir": out,
        "distributed.engine": engine,
    }
    settings |= others
    return ["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def main_with_readers(arguments: list[str]) -> int:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have readers
    return main(arguments)


def run(ranks: int, model: Path, data: Path, out: Path, engine: str, *flags: str, **others: object) -> str:
    arguments = [*command(model, data, out, engine, **others), *flags]
    return run_ranks(ranks, main_with_readers, arguments, folder=out.with_name(f"{out.name}-printed-{ranks}"))


@pytest.mark.parametrize(
    ("engine", "ranks", "replicas"),
    [
        *(pytest.param(engine, 2, 1, marks=SLOW) for engine in ("ddp", "zero1", "zero2", "zero3", "fsdp2")),
        # Not ddp: it lays out its buckets anew after a process's first step, and four ranks sum by the place in them.
        *(pytest.param(engine, 4, 1, marks=SLOW) for engine in ("zero1", "zero3", "fsdp2")),
        pytest.param("fsdp2", 4, 2, marks=SLOW),
    ],
)
def test_an_engine_goes_on_bit_by_bit(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, engine: str, ranks: int, replicas: int
) -> None:
    """On the same ranks; frozen weights are not written, and are there where the model is read."""
    whole = tmp_path / "whole"
    method: dict[str, object] = {"method.name": "frozen-vision", "distributed.replicas": replicas}
    method |= {"training.batch_size": 2 * ranks, "training.max_steps": 3}
    shown = run(ranks, small_model_dir, easy_vqa, whole, engine, **method)
    assert "checkpoints: sharded" in shown
    part = interrupted_copy(whole, 2, tmp_path / "part")
    shown = run(ranks, small_model_dir, easy_vqa, part, engine, "--resume", **method)
    assert "after step 2" in shown
    assert_same_run(whole, part, last=3)
    files = sorted((whole / "checkpoint-2" / "shards").iterdir())
    assert len(files) == ranks
    assert max(path.stat().st_size for path in files) < 1.2 * min(path.stat().st_size for path in files)
    names = {name for path in files for name in load_file(path)}
    assert not any("vision_embed_tokens.img_processor" in name for name in names)
    shown = run_ranks(2, _resolved, str(part / "checkpoint-3"), folder=tmp_path / "resolved")
    assert shown.count("putting the parts of") == 1  # for the other rank too
    assert_same(weights(Path(resolve_model(str(part / "checkpoint-3")).base)), weights(part / "final"))
    files[-1].unlink()  # what was trained is not to be taken from the base model
    with pytest.raises(UserError, match=f"shards/{files[-1].name} is missing"):
        resolve_model(str(whole / "checkpoint-2"))


@pytest.mark.parametrize(
    "chain",
    [
        (("ddp", 2), ("fsdp2", 2), ("auto", 1)),
        pytest.param(
            (("ddp", 2), ("zero2", 2), ("fsdp2", 3), ("zero3", 4), ("zero1", 3), ("auto", 1), ("fsdp2", 2)), marks=SLOW
        ),
    ],
)
def test_engines_go_on_from_each_other(
    tmp_path: Path,
    small_model_dir: Path,
    easy_vqa: Path,
    chain: tuple[tuple[str, int], ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A chain of engines and numbers of ranks against one process that was never interrupted.

    Float32 sums in another order: losses within 1e-5, as `test_engines` has it for other numbers of ranks.
    """
    last = len(chain)
    steady = {"training.warmup_steps": 0, "training.batch_size": 12}
    run(1, small_model_dir, easy_vqa, tmp_path / "one", "auto", **steady, **{"training.max_steps": last})
    out = tmp_path / "chain"
    for step, (engine, ranks) in enumerate(chain, 1):
        settings = steady | {"training.max_steps": step, "checkpoint.save_steps": 1}
        shown = run(ranks, small_model_dir, easy_vqa, out, engine, "--resume", **settings)
        assert bool(re.search("going on (on|with)", shown)) == (step > 1), shown
        state = json.loads((out / f"checkpoint-{step}" / "state.json").read_text())
        assert (state["engine"], state["optimizer"]["steps"]) == ("none" if ranks == 1 else engine, step)
    one, more = read_metrics(tmp_path / "one"), read_metrics(out)
    assert [line["step"] for line in more] == list(range(1, last + 1))
    assert [line["loss"] for line in more] == pytest.approx([line["loss"] for line in one], abs=1e-5)

    # One process without a group reads them; what is read is kept.
    tuned = resolve_model(str(out / f"checkpoint-{last}"))
    assert tuned.is_checkpoint
    assert_same(weights(Path(tuned.base)), weights(out / "final"))
    assert "putting the parts of" in capsys.readouterr().err
    assert resolve_model(str(out / f"checkpoint-{last}" / "model")).base == tuned.base
    with mock.patch.object(assemble.os, "utime", side_effect=PermissionError):  # another user's cache
        assert resolve_model(str(out / f"checkpoint-{last}" / "model")).base == tuned.base
    assert capsys.readouterr().err == ""
    assert_few_are_kept(out, Path(tuned.base))
    assert main(["export", str(out / f"checkpoint-{last}"), "--out", str(tmp_path / "export")]) == 0


def assert_few_are_kept(run: Path, newest: Path) -> None:
    """Of the models that the cache puts together those that were used last, and all that processes use."""

    def resolved(step: int) -> Path:
        return Path(resolve_model(str(run / f"checkpoint-{step}")).base)

    killed = newest.with_name(".killed.new")
    killed.mkdir()
    with mock.patch.object(assemble, "KEPT", 2):
        older = resolved(1), resolved(2)
        assert all(folder.is_dir() for folder in (newest, *older)), "all are in use"
        assert not killed.exists()
        assemble._in_use.clear()
        assert resolved(1) == older[0]
        shutil.rmtree(newest)
        assemble._in_use.clear()
        assert resolved(step_of(checkpoints(run)[0])) == newest
        assert [folder.is_dir() for folder in (newest, *older)] == [True, True, False], "the second was used last"
        with mock.patch.object(assemble, "free_space", return_value=0):
            assert resolved(2) == older[1]
        assert [folder.is_dir() for folder in (newest, *older)] == [True, False, True], "room is made"


def _resolved(checkpoint: str) -> int:
    with mock.patch.object(assemble, "say", lambda _console, line: print(line)):
        resolve_model(checkpoint)
    return 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _choose(shared: Path, root: Path) -> int:
    """The form of checkpoints in a folder of all ranks and in one of each; and what is said of one of rank 0."""
    runtime = choose_device("fp32")
    collectives = HostCollectives(runtime.world_size)
    own = root / f"rank-{runtime.rank}"
    own.mkdir()
    for folder, wanted in ((shared, "auto"), (own, "auto"), (shared, "whole"), (own, "sharded")):
        config = RunConfig(training=TrainingConfig(output_dir=str(folder)), checkpoint=CheckpointConfig(format=wanted))
        for engine in ("zero2", "ddp"):
            try:
                form, why = choose_format(config, EngineChoice(engine, ""), runtime.rank, collectives)
                said = f"{form.name}: {why}"
            except UserError as error:
                said = str(error)
            print(f"{folder.name} {wanted} {engine} {said}")
        collectives.broadcast(None)
        assert not list(folder.iterdir())
    if runtime.rank == 0:
        (own / "checkpoint-3" / "shards").mkdir(parents=True)
    config = RunConfig(training=TrainingConfig(output_dir=str(root / "rank-0")))
    blind = mock.patch.object(Path, "is_dir", return_value=False) if runtime.rank else contextlib.nullcontext()
    try:
        with blind:  # as where the disk is not mounted
            find_resume_point("auto", config, runtime, collectives, Console(quiet=True))
    except UserError as error:
        print(error)
    return 0


def test_ranks_without_a_shared_disk(tmp_path: Path) -> None:
    """They save whole checkpoints; and where a sharded one is, but not for all, nothing is begun anew over it."""
    shared = tmp_path / "shared"
    shared.mkdir()
    said = run_ranks(2, _choose, shared, tmp_path, folder=tmp_path / "printed")
    assert said.count("shared auto zero2 sharded: zero2 divides the state, and the ranks share the run folder") == 2
    assert said.count("shared auto ddp whole: every rank holds everything") == 2
    assert "rank-1 auto zero2 whole: the ranks do not share the run folder" in said
    assert said.count("shared whole zero2 whole: as configured") == 2
    assert said.count("checkpoint.format is sharded, but not all ranks see this folder") == 4
    assert said.count("rank-0/checkpoint-3: cannot be seen on ") == 2


def test_the_scale_of_fp16_goes_to_another_engine() -> None:
    runtime = RuntimeDevice(torch.device("cpu"), "fp16", "", 0, 1)
    ours = DataParallel(torch.nn.Linear(1, 1), EngineChoice("none", ""), RunConfig(), runtime)
    ours.wrap()
    theirs = SimpleNamespace(cur_scale=1024.0, cur_iter=5, min_scale=1)
    zero: Any = SimpleNamespace(_engine=SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=theirs)))
    ours.put_scaler_state(vars(theirs))
    own = ours.scaler_state()
    assert own is not None
    assert own["scale"] == 1024.0
    ZeroEngine.put_scaler_state(zero, own | {"scale": 512.0})
    assert vars(theirs) == {"cur_scale": 512.0, "cur_iter": 5, "min_scale": 1}


def test_what_no_rank_has_or_two_have_is_told() -> None:
    """Each rank writes by itself, so nothing else would find it before a resume does."""
    sizes = {"weights/a": 6, "exp_avg/a": 6}

    def pieces(*ranges: tuple[int, int], name: str = "weights/a") -> list[Piece]:
        return [Piece(name, torch.zeros(end - start), start, 6) for start, end in ranges]

    whole = pieces((0, 6))
    assert gap(whole, sizes, None) is None, "no step was taken"
    assert gap(whole + pieces((0, 2), (2, 6), name="exp_avg/a"), sizes, None) is None
    assert gap(whole + pieces((0, 2), (3, 6), name="exp_avg/a"), sizes, None) is not None
    assert gap(pieces((0, 2), (3, 6)), sizes, None) == (
        "weights/a: the parts of all ranks have 5 of 6 elements, or not each of them once"
    )
    assert gap(pieces((0, 4), (3, 5)), sizes, None) is not None, "one is missing and one is there twice"


def test_ranks_write_and_read_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are named by their rank and cut by size; any number of ranks reads them."""
    monkeypatch.setattr(pieces_module, "FILE_BYTES", 12)
    whole = {name: torch.randn(7) for name in ("weights/a", "weights/b")}
    for rank in range(3):
        shares = [Piece(name, values, 0, 7).share(rank, 3) for name, values in whole.items()]
        names = {path.name for path in write_pieces(tmp_path, shares, rank)}
        assert len(names) == (1 if rank < 2 else 2)
        assert all(name.startswith(f"shard-{rank + 1:05d}-") for name in names)
    for ranks in (1, 2):
        for rank in range(ranks):
            empty = [Piece(name, torch.empty(7), 0, 7).share(rank, ranks) for name in whole]
            read_pieces(tmp_path, empty)
            for piece in empty:
                assert torch.equal(piece.values, whole[piece.name][piece.start : piece.start + len(piece)])
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(PieceError, match=r"weights/. is incomplete"):
        read_pieces(tmp_path, [Piece(name, values, 0, 7) for name, values in whole.items()])


def _full_disk_on_rank_1(arguments: list[str]) -> int:
    """No file of rank 1 may grow beyond some bytes after step 2, which is how a full disk looks to who writes."""
    save = Checkpointer.save

    def save_on_a_full_disk(self: Checkpointer, state: Any) -> None:
        self.wait()
        if state.step >= 2 and self.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        save(self, state)

    with mock.patch.object(Checkpointer, "save", save_on_a_full_disk):
        return main(arguments)


@SLOW
def test_a_full_disk_of_one_rank_fails_the_save_of_all(tmp_path: Path, small_model_dir: Path, easy_vqa: Path) -> None:
    out = tmp_path / "run"
    arguments = command(small_model_dir, easy_vqa, out, "fsdp2", **{"checkpoint.save_steps": 1})
    shown = run_ranks(2, _full_disk_on_rank_1, arguments, folder=tmp_path / "printed", codes=(0, 0))
    for step in (2, 3, 4):
        assert f"checkpoint of step {step} not saved: File too large" in shown
    assert "(on rank 1)" in shown
    assert [path.name for path in sorted(out.glob("*checkpoint-*"))] == ["checkpoint-1"]
    assert damage(out / "checkpoint-1") is None
    assert (out / "final" / "manifest.json").is_file()


def _killed_when_written(arguments: list[str]) -> int:
    """Rank 1 is gone when its second file is on the disk, before the others hear of it."""
    written: list[Path] = []

    def write_and_die(*args: Any) -> list[Path]:
        written.extend(write_pieces(*args))
        if os.environ["RANK"] == "1" and len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return written[-1:]

    with mock.patch.object(formats, "write_pieces", write_and_die):
        return main(arguments)


def test_a_rank_that_dies_in_a_save_leaves_no_checkpoint(tmp_path: Path, small_model_dir: Path, easy_vqa: Path) -> None:
    out = tmp_path / "run"
    arguments = command(small_model_dir, easy_vqa, out, "fsdp2", **{"training.max_steps": 40})
    shown = run_ranks(2, _killed_when_written, arguments, folder=tmp_path / "printed", codes=(1, -9))
    assert "error: another process of this run ended" in shown
    assert "checkpoint-2; start again with --resume" in shown
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
    assert damage(out / "checkpoint-2") is None
    assert len(list(out.glob(".checkpoint-4.*.new/shards/*"))) == 2


def _hangs_in_a_save(arguments: list[str]) -> int:
    """The disk of rank 1 does not answer while it writes the second checkpoint, and training goes on."""
    saves: list[Path] = []

    def write(folder: Path, *args: Any) -> list[Path]:
        saves.append(folder)
        if os.environ["RANK"] == "1" and len(saves) == 2:
            time.sleep(40)
        return write_pieces(folder, *args)

    with mock.patch.object(formats, "write_pieces", write):
        return main(arguments)


@SLOW
def test_a_rank_whose_disk_hangs_is_given_up(tmp_path: Path, small_model_dir: Path, easy_vqa: Path) -> None:
    out = tmp_path / "run"
    others = {"training.max_steps": 40, "distributed.timeout_minutes": 0.3}
    arguments = command(small_model_dir, easy_vqa, out, "fsdp2", **others)
    shown = run_ranks(2, _hangs_in_a_save, arguments, folder=tmp_path / "printed", codes=(1, 1))
    assert "did not answer within 0.3 minutes" in shown
    assert "checkpoint-2; start again with --resume" in shown
    assert "Traceback" not in shown
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]


def _stopped_in_a_save(arguments: list[str]) -> int:
    """SIGTERM comes to rank 1 while it writes the second checkpoint, which takes it longer than a step."""
    saves: list[Path] = []

    def write(folder: Path, *args: Any) -> list[Path]:
        saves.append(folder)
        if os.environ["RANK"] == "1" and len(saves) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        return write_pieces(folder, *args)

    with mock.patch.object(formats, "write_pieces", write):
        return main(arguments)


@SLOW
@pytest.mark.parametrize("steps", [1, 2])
def test_a_signal_in_a_save_and_damage_after_it(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, steps: int
) -> None:
    """That save is finished, the step that follows is saved too; whichever part of it is damaged, the other stands."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    settings: dict[str, object] = {"training.max_steps": 8, "checkpoint.save_steps": steps, "checkpoint.keep_last": 2}
    run(2, small_model_dir, easy_vqa, whole, "fsdp2", **settings)
    arguments = command(small_model_dir, easy_vqa, out, "fsdp2", **settings)
    shown = run_ranks(2, _stopped_in_a_save, arguments, folder=tmp_path / "printed", codes=(3, 3))
    newest, before = checkpoints(out)
    assert step_of(before) == 2 * steps
    assert f"which is saved in {newest}" in shown
    assert damage(newest) is None
    assert damage(before) is None
    file = sorted((newest / "shards").iterdir())[1]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    shown = run(2, small_model_dir, easy_vqa, out, "fsdp2", "--resume", **settings)
    assert f"skipped {newest}: shards/{file.name} is not what was written (its SHA-256 differs)" in shown
    assert f"{before.name} (the newest valid checkpoint)" in shown
    assert_same_run(whole, out, 8)


def _killed_in_a_save(arguments: list[str], out: str, victims: tuple[int, ...], save: int, after: float) -> int:
    """The victims are killed some time after so many saves have begun."""

    left = set(Path(out).glob(".checkpoint-*.new"))  # of the last kill

    def watch() -> None:
        seen: set[Path] = set()
        while len(seen - left) < save:
            seen |= set(Path(out).glob(".checkpoint-*.new"))
            time.sleep(0.001)
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGKILL)

    if int(os.environ["RANK"]) in victims:
        threading.Thread(target=watch, daemon=True).start()
    code = main_with_readers(arguments)
    if int(os.environ["RANK"]) in victims:  # another one was killed a moment before
        os.kill(os.getpid(), signal.SIGKILL)
    return code


@SLOW
@pytest.mark.parametrize(("engine", "ranks", "kills"), [("fsdp2", 2, 8), ("zero2", 2, 8), ("fsdp2", 4, 4)])
def test_kills_at_random_moments_of_saves(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, engine: str, ranks: int, kills: int
) -> None:
    """kill -9 of one rank, or of all, while a save is in flight; then the run is the one that was not disturbed."""
    last = 3 * kills + 2
    settings: dict[str, object] = {"training.max_steps": last, "training.batch_size": ranks}
    settings |= {"checkpoint.save_steps": 1, "checkpoint.keep_last": 2}
    if ranks == 2:  # what reads ahead is killed too, in a file and in shards
        shard_data([easy_vqa / "train.jsonl"], tmp_path / "shards", ShardOptions(shard_size=20_000))
        file, shards = easy_vqa / "train.jsonl", tmp_path / "shards"
        sources = [{"path": str(file), "max_records": 9, "name": "file"}, {"path": str(shards), "max_records": 9}]
        settings |= {"data.train": json.dumps(sources), "data.num_workers": 2}
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(ranks, small_model_dir, easy_vqa, whole, engine, **settings)
    draw = random.Random(engine)
    arguments = [*command(small_model_dir, easy_vqa, out, engine, **settings), "--resume"]
    newest = -1
    for kill in range(kills):
        victims = tuple(range(ranks)) if kill % 4 == 3 else (draw.randrange(ranks),)
        codes = [-9 if rank in victims else 1 for rank in range(ranks)]
        save, after = draw.randint(1, 3), draw.uniform(0, 0.3)
        printed = tmp_path / f"printed-{kill}"
        run_ranks(
            *(ranks, _killed_in_a_save, arguments, str(out), victims, save, after),
            folder=printed,
            codes=codes,
        )
        assert [damage(folder) for folder in checkpoints(out)] == [None] * len(checkpoints(out))
        before, newest = newest, max(map(step_of, checkpoints(out)), default=-1)
        assert newest >= before
    shown = run_ranks(ranks, main_with_readers, arguments, folder=tmp_path / "last")
    assert newest > 0
    assert f"checkpoint-{newest} (the newest valid checkpoint)" in shown
    assert not list(out.glob(".checkpoint-*"))
    assert_same_run(whole, out, last)
