"""Peak memory does not grow with the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TENSOR_BYTES = 50 << 20
TENSORS = 6
ALLOWED_BYTES = 64 << 20

CHILD = """
import sys
from pathlib import Path
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.workdir import WorkDir
from kvcompress.checkpoint.writer import copy_shards

def peak():
    # Not getrusage: its peak is inherited from the process that started this one.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

base, out, transformed = sys.argv[1:]

class Same:
    def plan(self, info):
        from kvcompress.checkpoint.safetensors_file import TensorSpec
        return [TensorSpec(info.name, info.dtype, info.shape)]
    def apply(self, name, tensor):
        yield name, tensor

if transformed == "yes":
    import torch
    torch.zeros(8).view(torch.uint8).numpy()
before = peak()
with WorkDir.open(out, {}) as work:
    copy_shards(Checkpoint.open(base), work, Same() if transformed == "yes" else None)
    work.publish()
print(peak() - before)
"""


def write_sparse_checkpoint(folder: Path) -> Path:
    """300 MiB of zeros that take no disk space."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    entries = {
        f"t{i}": {
            "dtype": "U8",
            "shape": [TENSOR_BYTES],
            "data_offsets": [i * TENSOR_BYTES, (i + 1) * TENSOR_BYTES],
        }
        for i in range(TENSORS)
    }
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + TENSORS * TENSOR_BYTES)
    return folder


def growth(folder: Path, out: Path, transformed: str, environment: dict[str, str]) -> int:
    command = [sys.executable, "-c", CHILD, str(folder), str(out), transformed]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert (out / "model.safetensors").stat().st_size > TENSORS * TENSOR_BYTES
    return int(done.stdout)


def test_copying_takes_a_chunk(tmp_path: Path, child_environment: dict[str, str]) -> None:
    assert growth(write_sparse_checkpoint(tmp_path / "base"), tmp_path / "out", "no", child_environment) < 16 << 20


def test_transforming_takes_a_tensor(tmp_path: Path, child_environment: dict[str, str]) -> None:
    found = growth(write_sparse_checkpoint(tmp_path / "base"), tmp_path / "out", "yes", child_environment)
    assert TENSOR_BYTES // 2 < found < ALLOWED_BYTES
