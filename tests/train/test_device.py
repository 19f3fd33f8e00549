"""What a rank shares with the other ranks of its machine, and with them alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from phi3v import machine
from phi3v.train import device
from phi3v.train.device import RuntimeDevice, choose_device, default_workers


@pytest.mark.parametrize(("gpus", "nodes", "expected"), [(8, 8, 8), (8, 1, 8), (1, 4, 8), (64, 1, 0), (16, 2, 5)])
def test_readers_share_the_cores_of_their_machine(
    gpus: int, nodes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "available_cores", lambda: 96)
    runtime = RuntimeDevice(torch.device("cuda"), "bf16", "", 0, gpus * nodes, node_ranks=gpus)
    assert default_workers(runtime) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"SLURM_NTASKS_PER_NODE": "2"}, 2),
        ({"LOCAL_WORLD_SIZE": "64"}, 16),  # of another job
        ({}, 16),
    ],
)
def test_ranks_of_a_machine_as_launchers_tell_them(
    environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines of eight ranks; where nobody says so, as if all were on one."""
    for name in device.LOCAL_RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    state = SimpleNamespace(process_index=9, num_processes=16, local_process_index=1)
    monkeypatch.setattr(device, "PartialState", lambda **kwargs: state)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runtime = choose_device("fp32")
    assert (runtime.rank, runtime.world_size, runtime.node_ranks) == (9, 16, expected)
    assert runtime.gpu == machine.CPU
