"""Pages of a mapped file that are given back."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from localds.gguf import GGUFFile

ROWS = 4096  # of 4 KiB


def mapped_pages() -> int:
    """Bytes of files in this process's memory."""
    found = re.search(r"^RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_leave_memory_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "deepseek2")
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal((ROWS, 1024), np.float32) for name in ("a", "b")}
    for name, data in values.items():
        writer.add_tensor(f"{name}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(path) as file:
        tensor, other = file.tensors["a.weight"], file.tensors["b.weight"]
        sums = [int(t.data.sum()) for t in (tensor, other)]
        before = mapped_pages()
        file.give_back(tensor)
        assert before - mapped_pages() > 0.9 * tensor.nbytes
        assert [int(t.data.sum()) for t in (tensor, other)] == sums
