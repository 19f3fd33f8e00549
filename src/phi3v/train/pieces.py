"""Tensors that every rank writes and reads its own piece of, by ``torch.distributed.checkpoint`` (DCP).

A tensor is saved in its flattened form, of which a rank holds one contiguous piece: rows of a tensor that FSDP2
divides, what ZeRO's flat partitions have of it, a share of one that DDP holds whole. So a checkpoint of any of them can
be read by any other, on any number of ranks. The files are safetensors, whose headers say which piece they hold, and
whoever reads takes the slices it needs from them; nothing is pickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import distributed
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

# Of a rank's pieces that go into one file: it is put together in memory before it is written, and who reads opens all.
FILE_BYTES = 2**28

WEIGHTS = "weights"


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a tensor.

    Attributes:
        name: ``weights/PARAMETER``, or a moment's: ``exp_avg/PARAMETER``.
        values: [n], contiguous.
        start: the index of the first of them in the flattened tensor.
        size: of the whole tensor, in elements.
    """

    name: str
    values: torch.Tensor
    start: int
    size: int

    def __len__(self) -> int:
        return self.values.numel()

    @property
    def bytes(self) -> int:
        return self.values.numel() * self.values.element_size()

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Where it lies, as DCP says it."""
        return ChunkStorageMetadata(offsets=torch.Size([self.start]), sizes=torch.Size([len(self)]))

    def share(self, rank: int, ranks: int) -> Piece:
        """The part of it that a rank writes where all of them hold it."""
        first, end = (len(self) * number // ranks for number in (rank, rank + 1))
        return replace(self, values=self.values[first:end], start=self.start + first)


class PieceError(RuntimeError):
    """Pieces that cannot be written or read, with the reason."""


class HostCopies:
    """Copies of pieces in host memory, which is taken once: touching it for the first time costs more than the copy."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def missing(self, pieces: Iterable[Piece]) -> int:
        """Bytes that a copy takes beyond what is taken already."""
        sizes = ((piece.bytes, piece.values.is_cuda) for piece in pieces if not self._fits(piece))
        return sum(1 << (size - 1).bit_length() if pinned else size for size, pinned in sizes)  # as torch pins memory

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """What the pieces hold now; until the next call."""
        copies = []
        for piece in pieces:
            if not self._fits(piece):
                pinned = piece.values.is_cuda
                self._buffers[piece.name] = torch.empty_like(piece.values, device="cpu", pin_memory=pinned)
            buffer = self._buffers[piece.name]
            copies.append(replace(piece, values=buffer.copy_(piece.values, non_blocking=True)))
        if any(piece.values.is_cuda for piece in pieces):
            torch.cuda.current_stream().synchronize()
        return copies

    def _fits(self, piece: Piece) -> bool:
        buffer = self._buffers.get(piece.name)
        return buffer is not None and (buffer.shape, buffer.dtype) == (piece.values.shape, piece.values.dtype)


def write_pieces(folder: Path, pieces: Sequence[Piece], rank: int) -> list[Path]:
    """Write this rank's pieces.

    DCP takes each rank for a process alone: it would send the plans of all to one, which for hundreds of ranks takes it
    minutes and gigabytes. What it would look for in them is `gap`'s.

    Returns:
        The files that this rank wrote; they are on the disk.

    Raises:
        PieceError: it failed.
    """
    index, filled = {}, 0
    for piece in pieces:
        index[piece.name] = 1 + filled // FILE_BYTES
        filled += piece.bytes
    writer = _Writer(str(folder), rank, fqn_to_index_mapping=index, save_distributed=True)
    state = {piece.name: piece.values for piece in pieces}
    planner = _SavePlanner({piece.name: piece for piece in pieces})
    _expect_no_group()
    try:
        save(state, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:
        raise PieceError(_reason(error)) from error
    return [folder / name for name in writer.files]


def gap(pieces: Sequence[Piece], sizes: Mapping[str, int], group: ProcessGroup | None) -> str | None:
    """The first tensor that the pieces of all ranks do not make up, each element once; a collective.

    Told by how many elements they have, and by the sum of these elements' indices. Moments may all be missing.

    Args:
        sizes: elements of every tensor of any rank, by its name, in the same order on all ranks.
        group: of all ranks, for hosts; ``None``: this process is alone.
    """
    places = {name: place for place, name in enumerate(sizes)}
    found = torch.zeros(len(sizes), 2, dtype=torch.int64)
    for piece in pieces:
        count = len(piece)
        found[places[piece.name]] += torch.tensor([count, count * (2 * piece.start + count - 1) // 2])
    if group is not None:
        distributed.all_reduce(found, group=group)
    weights = torch.tensor([name.startswith(f"{WEIGHTS}/") for name in sizes])
    stepped = bool(found[~weights].any())  # else there are no moments yet
    for name, size, got in zip(sizes, sizes.values(), found.tolist(), strict=True):
        if got != [size, size * (size - 1) // 2] and (stepped or weights[places[name]]):
            return f"{name}: the parts of all ranks have {got[0]} of {size} elements, or not each of them once"
    return None


def read_pieces(folder: Path, pieces: Sequence[Piece]) -> None:
    """Let the pieces' values be what was saved, whoever saved it, in place. Each rank reads by itself.

    Raises:
        PieceError: it failed.
    """
    state = {piece.name: piece.values for piece in pieces}
    planner = _LoadPlanner({piece.name: piece for piece in pieces})
    _expect_no_group()
    try:
        load(state, storage_reader=HuggingFaceStorageReader(str(folder)), planner=planner, no_dist=True)
    except CheckpointException as error:
        raise PieceError(_reason(error)) from error


def saved_sizes(folder: Path) -> dict[str, tuple[int, torch.dtype]]:
    """Elements and dtype of every tensor that was saved."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    found = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        found[name] = (tensor.size.numel(), tensor.properties.dtype)
    return found


def difference(files: Iterable[Path], pieces: Sequence[Piece]) -> str | None:
    """The first tensor in the files of this rank that is not what its piece holds, bit by bit; None if all are."""
    own = {piece.name: piece for piece in pieces}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if not torch.equal(file.get_tensor(name), own[name].values.cpu()):
                    return f"{path.name}: {name} differs from what was trained"
    return None


def _expect_no_group() -> None:
    """DCP warns of what is meant; for good, since filters are the process's and threads call this."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _reason(error: CheckpointException) -> str:
    ((cause, _),) = error.failures.values()
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.strerror}{f' ({cause.filename})' if cause.filename else ''}"
    return " ".join(str(cause).split())[:300]


class _Writer(HuggingFaceStorageWriter):
    """Names files by the rank that writes them, and remembers them."""

    files: tuple[str, ...] = ()

    def __init__(self, path: str, rank: int, **settings: Any) -> None:
        super().__init__(path, **settings)
        self.number = rank + 1  # `rank` is 0: DCP knows of no other

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        (plan,) = super().prepare_global_plan(plans)
        return [replace(plan, storage_data=plan.storage_data | {"shard_index": self.number})]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future = super().write_data(plan, planner)
        self.files = tuple(sorted({result.storage_data.relative_path for result in future.wait()}))
        return future


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, piece in self.pieces.items():
            data = TensorWriteData(
                piece.chunk, TensorProperties(dtype=piece.values.dtype), size=torch.Size([piece.size])
            )
            index = MetadataIndex(name, piece.chunk.offsets)
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.pieces[index.fqn].values


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, piece in self.pieces.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                raise PieceError(f"{name} was not saved")
            if saved.size.numel() != piece.size:
                raise PieceError(f"{name} was saved with {saved.size.numel()} elements and has {piece.size} here")
            own = create_read_items_for_chunk_list(name, saved, [piece.chunk])
            if sum(item.lengths[0] for item in own) != len(piece):
                raise PieceError(f"{name} is incomplete")
            items += own
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.pieces[index.fqn].values
