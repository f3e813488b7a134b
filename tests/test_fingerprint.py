"""A model's fingerprint: the same wherever the file lies, another where anything in it differs."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from offloading import load_offloaded

import localds
from localds.fingerprint import fingerprint
from localds.gguf import GGUFFile

if TYPE_CHECKING:
    from pathlib import Path


def of(path: Path) -> str:
    with GGUFFile.open(path) as gguf:
        return fingerprint(gguf)


def edited(source: Path, target: Path, at: int, data: bytes) -> Path:
    content = bytearray(source.read_bytes())
    assert content[at : at + len(data)] != data
    content[at : at + len(data)] = data
    target.write_bytes(content)
    return target


def test_path_and_time_do_not_matter(guide_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other-name.gguf"
    copy.write_bytes(guide_path.read_bytes())
    os.utime(copy, (1, 1))
    assert of(copy) == of(guide_path)
    assert len(of(copy)) == 64


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.3.ffn_up_exps.weight"])
@pytest.mark.parametrize("end", ["first", "last"])
def test_a_changed_tensor_matters(guide_path: Path, tmp_path: Path, name: str, end: str) -> None:
    with GGUFFile.open(guide_path) as gguf:
        tensor = gguf.tensors[name]
        at = tensor.offset + (0 if end == "first" else tensor.nbytes - 1)
        data = bytes([tensor.data[0 if end == "first" else -1] ^ 1])
    assert of(edited(guide_path, tmp_path / "m.gguf", at, data)) != of(guide_path)


def test_changed_metadata_matters(guide_path: Path, tmp_path: Path) -> None:
    key = "deepseek2.rope.freq_base"
    with GGUFFile.open(guide_path) as gguf:
        # The key's length in front of it, the value's kind behind.
        at = gguf.metadata.entries[key].offset + len(key)
        content = guide_path.read_bytes()
        at = content.index(struct.pack("<f", gguf.number(key)), at)
        other = struct.pack("<f", gguf.number(key) + 1)
    path = edited(guide_path, tmp_path / "m.gguf", at, other)
    with GGUFFile.open(path) as gguf:
        assert gguf.number(key) == struct.unpack("<f", other)[0]
    assert of(path) != of(guide_path)


def test_where_experts_lie_does_not_matter(guide_path: Path) -> None:
    with localds.load(guide_path) as resident, load_offloaded(guide_path, 20) as offloaded:
        assert resident.fingerprint == offloaded.fingerprint == of(guide_path)


def test_models_differ(guide_path: Path, tiny_model: Path) -> None:
    assert of(guide_path) != of(tiny_model)
