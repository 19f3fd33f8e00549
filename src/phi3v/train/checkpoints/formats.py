"""The two forms of a checkpoint: rank 0 gathers and writes everything, or each rank writes its own part.

Both take what is saved in step with training, all ranks together; what is left to write touches host memory and files
only, so a thread may do it.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch

from phi3v.config import RunConfig
from phi3v.errors import UserError
from phi3v.paths import file_hash
from phi3v.train.checkpoint_folder import SHARDED_FORMAT, SHARDS, checkpoints, tensor_bytes
from phi3v.train.checkpoints.resume import ResumePoint
from phi3v.train.collectives import HostCollectives
from phi3v.train.engines import MOMENTS, Engine, to_host
from phi3v.train.engines.choice import EngineChoice
from phi3v.train.engines.sharded import without_weights
from phi3v.train.methods.optimizers import moment_bytes
from phi3v.train.methods.weights import (
    WRITE_ERRORS,
    IncompleteSaveError,
    failure_text,
    read_trained,
    save_description,
    save_final,
)
from phi3v.train.pieces import WEIGHTS, HostCopies, Piece, PieceError, difference, gap, read_pieces, write_pieces
from phi3v.train.prepare import PreparedRun

# SHA-256 and size of files that other ranks wrote, by their names in the checkpoint.
Known = Mapping[str, tuple[str, int]]


class CheckpointFormat(ABC):
    """What a checkpoint of a run consists of, beside its state.

    Attributes:
        name: as configured.
        subfolder: of a checkpoint; rank 0 makes it.
        collectives: among the threads that write, where all ranks do; None where rank 0 writes alone.
    """

    name: ClassVar[str]
    subfolder: ClassVar[str]
    collectives: HostCollectives | None = None

    def __init__(self, run: PreparedRun) -> None:
        self.run = run
        self.engine: Engine = run.engine
        self.rank = run.runtime.rank
        self.skeleton = without_weights(run.model)  # for the thread that writes: it may touch nothing that trains

    @abstractmethod
    def take(self) -> None:
        """Gather, or find, what is to be saved now; a collective."""

    @abstractmethod
    def disk_bytes(self) -> int:
        """Of the checkpoint; on rank 0."""

    @abstractmethod
    def memory_bytes(self) -> int:
        """That a copy takes on this rank, beyond what is taken already."""

    def facts(self) -> dict[str, Any]:
        """For ``state.json``."""
        return {}

    @abstractmethod
    def stage(self, unfinished: Path, *, copy: bool) -> Callable[[], Known] | None:
        """What is left to do; of nothing, None. A collective.

        Args:
            copy: what the next step changes.

        Returns:
            Writes to ``unfinished``, which exists. Among several ranks a collective: all fail if one does.
        """


class WholeFormat(CheckpointFormat):
    """Rank 0 gathers the tensors and writes what ``final/`` would hold, and the optimizer."""

    name = "whole"
    subfolder = "optimizer"
    tensors: dict[str, torch.Tensor] | None = None

    def take(self) -> None:
        self.tensors = self.engine.full_state_dict()

    def disk_bytes(self) -> int:
        """As the last one, or weights and moments if there is none."""
        for folder in checkpoints(self.run.folder)[:1]:
            return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        trained = sum(p.numel() for p in self.engine.model.parameters() if p.requires_grad)
        return tensor_bytes(self.tensors) + trained * moment_bytes(self.run.config.training)

    def memory_bytes(self) -> int:
        return self.disk_bytes() if self.rank == 0 else 0

    def stage(self, unfinished: Path, *, copy: bool) -> Callable[[], Known] | None:
        rest = self.engine.save_optimizer(unfinished / "optimizer", copy=copy)
        tensors, self.tensors = self.tensors, None
        if tensors is None:
            return None
        whole = to_host(tensors) if copy else tensors

        def write() -> Known:
            save_final(self.skeleton, self.run.processor, unfinished / "model", whole)
            rest()
            return {}

        return write


class ShardedFormat(CheckpointFormat):
    """Each rank writes the pieces that it holds; where several hold the same, each writes a share."""

    name = "sharded"
    subfolder = SHARDS
    pieces: list[Piece]

    def __init__(self, run: PreparedRun) -> None:
        super().__init__(run)
        self.collectives = HostCollectives(
            run.runtime.world_size, timedelta(minutes=run.config.distributed.timeout_minutes)
        )
        self._copies = HostCopies()
        trained = [(name, p.numel()) for name, p in self.skeleton.named_parameters() if p.requires_grad]
        self._sizes = {f"{kind}/{name}": size for kind in (WEIGHTS, *MOMENTS) for name, size in trained}

    def take(self) -> None:
        ranks, choice = self.run.runtime.world_size, self.engine.choice
        copies = choice.replicas if choice.divides_state else ranks  # of the state, each on so many ranks in a row
        shares = (piece.share(self.rank // (ranks // copies), copies) for piece in self.engine.pieces())
        self.pieces = [piece for piece in shares if len(piece)]

    def disk_bytes(self) -> int:
        return 4 * sum(self._sizes.values())

    def memory_bytes(self) -> int:
        return self._copies.missing(self.pieces) * self.run.runtime.node_ranks

    def facts(self) -> dict[str, Any]:
        return {"format": SHARDED_FORMAT, "optimizer": self.engine.facts()}

    def stage(self, unfinished: Path, *, copy: bool) -> Callable[[], Known] | None:
        pieces = self._copies.copy(self.pieces) if copy else self.pieces
        self.pieces = []
        collectives = self.collectives
        assert collectives is not None

        def write() -> Known:
            own: dict[str, tuple[str, int]] = {}
            lost = wrong = None
            try:
                lost = gap(pieces, self._sizes, collectives.group)
                files = write_pieces(unfinished / SHARDS, pieces, self.rank)
                lost = lost or difference(files, pieces)
                own = {f"{SHARDS}/{path.name}": (file_hash(path), path.stat().st_size) for path in files}
                if self.rank == 0:
                    save_description(self.skeleton, self.run.processor, unfinished / "model")
            except WRITE_ERRORS as error:
                wrong = failure_text(error)
            everywhere = collectives.all_gather((own, lost, wrong))
            for _, lost, _ in everywhere:
                if lost is not None:
                    raise IncompleteSaveError(lost)
            for rank, (_, _, wrong) in enumerate(everywhere):
                if wrong is not None:
                    raise PieceError(f"{wrong} (on rank {rank})")
            return {name: about for files, _, _ in everywhere for name, about in files.items()}

        return write


def choose_format(
    config: RunConfig, engine: EngineChoice, rank: int, collectives: HostCollectives
) -> tuple[type[CheckpointFormat], str]:
    """The form of a run's checkpoints, and the reason for it; a collective.

    Raises:
        UserError: each rank is to write its own part, and they share no disk.
    """
    wanted = config.checkpoint.format
    if wanted == "whole":
        return WholeFormat, "as configured"
    if wanted == "auto":
        if config.method.uses_adapters:
            return WholeFormat, "adapters are small"
        if not engine.divides_state:
            return WholeFormat, "every rank holds everything"
    apart = collectives.world_size > 1 and not shares_folder(Path(config.training.output_dir), rank, collectives)
    if apart and wanted == "sharded":
        raise UserError(
            "checkpoint.format is sharded, but not all ranks see this folder",
            where=config.training.output_dir,
            hint="take a folder on a disk that all machines share, or set checkpoint.format to auto",
        )
    if apart:
        return WholeFormat, "the ranks do not share the run folder"
    if wanted == "sharded":
        return ShardedFormat, "as configured"
    return ShardedFormat, f"{engine.name} divides the state, and the ranks share the run folder"


def shares_folder(folder: Path, rank: int, collectives: HostCollectives) -> bool:
    """Whether what rank 0 writes there is there for all; a collective."""
    mark = folder / f".shared-{collectives.broadcast(secrets.token_hex(8))}"  # never looked for before, so not cached
    if rank == 0:
        mark.touch()
    collectives.broadcast(None)
    seen = collectives.all_gather(mark.is_file())
    if rank == 0:
        mark.unlink()
    return all(seen)


def load_checkpoint(engine: Engine, point: ResumePoint, rank: int, collectives: HostCollectives) -> None:
    """Put a checkpoint's weights and optimizer into a prepared engine, whoever saved it; a collective.

    Raises:
        UserError: it cannot be read.
    """
    if not point.is_sharded:
        folder = point.folder if rank == 0 else None
        weights = read_trained(engine.model, folder / "model") if folder is not None else None
        engine.load_full_state_dict(weights)
        engine.load_optimizer(folder / "optimizer" if folder is not None else None)
        return
    engine.load_facts(point.state["optimizer"])
    wrong = None
    try:
        read_pieces(point.folder / SHARDS, list(engine.pieces()))
    except PieceError as error:
        wrong = f"cannot be read: {error} (on rank {rank})"
    for failed in collectives.all_gather(wrong):
        if failed is not None:
            hint = "name an older checkpoint with --resume, or start another run"
            raise UserError(failed, where=str(point.folder), hint=hint)
    engine.refresh()
