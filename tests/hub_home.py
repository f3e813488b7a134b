"""A user's folders and a hub for tests of downloads: nothing of the real ones is touched."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_hub import FakeHub, go_to, sha256
from huggingface_hub import constants

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = "owner/Tiny-Chat-GGUF"


def content(seed: int, size: int) -> bytes:
    """The same arbitrary bytes on every run."""
    return random.Random(seed).randbytes(size)


SMALL = "Tiny-Chat-Q4_K_M.gguf"
PARTS = tuple(f"Q8_0/Tiny-Chat-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3))
FILES = {
    "README.md": b"# Tiny",
    SMALL: content(1, 3_000_000),
    "Tiny-Chat-Q2_K.gguf": content(2, 1000),
    "Tiny-Chat-imatrix.gguf": content(3, 1000),
    "mmproj-F16.gguf": content(4, 1000),
    **{name: content(5 + i, 400_000 + i) for i, name in enumerate(PARTS)},
}

MODELS = f"""
[tiny]
title = "Tiny Chat"
repository = "{REPOSITORY}"
parameters = "1M"
context = 2048
license = "mit"
default = "Q4_K_M"
[tiny.quants]
Q4_K_M = {{ files = "{SMALL}", size = "3 MB" }}
Q8_0 = {{ files = "Q8_0/*-of-00003.gguf", size = 1200003 }}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folders of a user, in this process and those that it starts, who knows `tiny`."""
    for name in ("CONFIG", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "config" / "localds").mkdir(parents=True)
    (tmp_path / "config" / "localds" / "models.toml").write_text(MODELS)
    return tmp_path


@pytest.fixture
def model_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with two quants of a model, one of them in parts, among files that nobody wants."""
    assert home.exists()
    with FakeHub(REPOSITORY, dict(FILES)) as hub:
        go_to(hub.url, monkeypatch)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def blobs(home: Path) -> list[Path]:
    """The files in the blobs folder of the repository."""
    folder = home / "hf" / "hub" / "models--owner--Tiny-Chat-GGUF" / "blobs"
    return sorted(folder.iterdir()) if folder.exists() else []


def install(home: Path, repository: str, files: dict[str, bytes], commit: str = "c" * 40) -> Path:
    """Put files into the cache, as a tool of the hub does; returns the snapshot."""
    folder = home / "hf" / "hub" / ("models--" + repository.replace("/", "--"))
    snapshot = folder / "snapshots" / commit
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for name, data in files.items():
        blob = folder / "blobs" / sha256(data)
        blob.write_bytes(data)
        path = snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(blob)
    return snapshot
