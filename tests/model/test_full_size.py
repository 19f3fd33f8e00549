"""The real size, 4.1 billion parameters in bfloat16: created, saved and reloaded under 12 GB of resident memory.

Run with `pytest -m slow`: takes some minutes, 17 GB of disk and 10 GB of memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

GIGABYTE = 10**9
PARAMETERS = 4_146_621_440

# VmHWM and not ru_maxrss, which a child inherits from the process that started it.
PEAK = """
def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
"""
CREATE = """
import json, sys
from pathlib import Path
from phi3v.model.presets import init_model
count = init_model("phi-3.5-vision", Path(sys.argv[1]))
print(json.dumps({"count": count, "peak": peak()}))
"""
# Every weight is read: unread pages of a mapped file would not count.
RELOAD = """
import json, sys
import torch
from phi3v import Phi3VForCausalLM
model = Phi3VForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
parameters = list(model.parameters())
finite = all(bool(parameter.isfinite().all()) for parameter in parameters)
print(json.dumps({"count": sum(p.numel() for p in parameters), "finite": finite, "peak": peak()}))
"""
AGAIN = """
model.save_pretrained(sys.argv[2], max_shard_size="1GB")
print(json.dumps({"peak": peak()}))
"""


def run(code: str, *arguments: str) -> dict[str, int]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK + code, *arguments], capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    print(report)
    return report


def weight_map(folder: Path) -> dict[str, Path]:
    """The shard of every tensor; the library orders them differently after a reload."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return {key: folder / name for key, name in index["weight_map"].items()}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_created_saved_and_reloaded_under_12_gigabytes(tmp_path: Path) -> None:
    model = tmp_path / "model"
    if shutil.disk_usage(tmp_path).free < 20 * GIGABYTE:
        pytest.skip(f"needs 20 GB of disk in {tmp_path}")
    try:
        created = run(CREATE, str(model))
        assert created["count"] == PARAMETERS
        assert created["peak"] < 12 * GIGABYTE
        reloaded = run(RELOAD, str(model))
        assert reloaded["count"] == PARAMETERS
        assert reloaded["finite"]
        assert reloaded["peak"] < 12 * GIGABYTE
        saved = run(RELOAD + AGAIN, str(model), str(tmp_path / "again"))
        assert saved["peak"] < 12 * GIGABYTE
        before, after = weight_map(model), weight_map(tmp_path / "again")
        assert before.keys() == after.keys()
        for key in before:
            with safe_open(before[key], "pt") as one, safe_open(after[key], "pt") as other:
                assert torch.equal(one.get_tensor(key), other.get_tensor(key)), key
    finally:
        for folder in (model, tmp_path / "again"):
            shutil.rmtree(folder, ignore_errors=True)
