"""Checkpoints by name: what is downloaded, how it goes on, and what keeps it from beginning."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from checkpoints import write_variant
from fake_hub import COMMIT, FakeHub, closed_port, go_to
from huggingface_hub import constants

from convert import Checkpoint, CheckpointError
from convert.hub import fetch
from convert.open import open_source
from convert.tensors import plan

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "owner/tiny-model"
UNWANTED = (
    "pytorch_model.bin",
    "consolidated.safetensors",
    "onnx/model.onnx",
    "original/model.safetensors",
    "figures/benchmark.jpg",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache instead of the user's."""
    folder = tmp_path / "cache" / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with a checkpoint in two shards, among files that nobody wants."""
    folder = write_variant("mixtral", tmp_path / "published")
    (folder / "README.md").write_text("# Tiny")
    (folder / "tokenizer_config.json").write_text("{}")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with FakeHub(NAME, files | dict.fromkeys(UNWANTED, b"unwanted")) as hub:
        go_to(hub.url, monkeypatch)
        yield hub


def test_fetches_what_is_needed(hub: FakeHub) -> None:
    snapshot = fetch(NAME)
    assert (snapshot.repository, snapshot.revision) == (NAME, COMMIT)
    assert hub.downloaded() == sorted(hub.files.keys() - {*UNWANTED})
    assert sorted(path.name for path in snapshot.folder.iterdir()) == hub.downloaded()
    assert plan(Checkpoint(snapshot.folder))


def test_fetches_once(hub: FakeHub) -> None:
    first = fetch(NAME)
    hub.requests.clear()
    assert fetch(NAME) == first
    assert hub.downloaded() == []


def test_takes_revisions(hub: FakeHub) -> None:
    hub.revisions = ("v1.0", COMMIT)
    assert fetch(NAME, "v1.0").revision == COMMIT
    with pytest.raises(CheckpointError, match=r"no revision 'v2'; leave out @v2"):
        fetch(NAME, "v2")


SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library waits before it asks again."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b'{"architectures": ["OtherForCausalLM"]}', "OtherForCausalLM"),
        ("tokenizer.json", b"[]", "tokenizer"),
    ],
)
def test_weights_are_not_fetched_in_vain(
    hub: FakeHub, file: str, content: bytes, message: str
) -> None:
    hub.files[file] = content
    with pytest.raises(CheckpointError, match=message):
        open_source(NAME, pre="tekken")
    assert not [name for name in hub.downloaded() if name.endswith(".safetensors")]


def test_opens_by_name(hub: FakeHub) -> None:
    source = open_source(f"{NAME}@main", pre="tekken")
    assert source.metadata["localds.source"] == NAME
    assert source.metadata["localds.revision"] == COMMIT
    assert hub.downloaded()
    assert len(source.targets) == 33


@pytest.mark.usefixtures("impatient")
def test_goes_on_when_the_connection_breaks(hub: FakeHub) -> None:
    hub.cut = {SHARD: [20000, 50000]}
    folder = fetch(NAME).folder
    asked = [path for kind, path, _ in hub.requests if kind == "GET" and path.endswith(SHARD)]
    assert len(asked) == 3
    assert (folder / SHARD).read_bytes() == hub.files[SHARD]


@pytest.mark.usefixtures("impatient")
def test_keeps_what_an_interrupted_download_has(hub: FakeHub) -> None:
    hub.cut = {SHARD: [20000] * 20}
    with pytest.raises(CheckpointError, match=r"the download stopped .* complete are kept"):
        fetch(NAME)
    hub.cut = {}
    hub.requests.clear()
    folder = fetch(NAME).folder
    assert hub.downloaded() == [SHARD]
    assert (folder / SHARD).read_bytes() == hub.files[SHARD]


@pytest.mark.usefixtures("impatient")
def test_incomplete_copy_without_connection(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.cut = {SHARD: [20000] * 20}
    with pytest.raises(CheckpointError, match="the download stopped"):
        fetch(NAME)
    go_to(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    with pytest.raises(CheckpointError, match="listed in the index, but not there"):
        Checkpoint(fetch(NAME).folder)


@pytest.mark.usefixtures("hub")
def test_without_connection_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = fetch(NAME)
    go_to(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    assert fetch(NAME).folder == snapshot.folder
    with pytest.raises(CheckpointError, match=r"cannot reach http://127.* no copy; go online"):
        fetch("owner/another")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "no such folder or file here, and no such model on http://127"),
        (401, "RepoNotFound", "for a private model log in with `hf auth login` or set HF_TOKEN"),
        (403, "GatedRepo", "accept the terms on http://127.0.0.1:.*/owner/tiny-model, then log in"),
        (400, "BadRequest", "answered with status 400; try again later"),
    ],
)
def test_denials(hub: FakeHub, status: int, code: str, message: str) -> None:
    hub.denial = (status, code)
    with pytest.raises(CheckpointError, match=message):
        fetch(NAME)


def test_impossible_name(hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match=r"owner/\.\.name--x: "):
        fetch("owner/..name--x")
    assert not hub.requests


def test_full_disk_is_foreseen(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(len(hub.files[name]) for name in hub.files if name not in UNWANTED)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed // 2))
    with pytest.raises(CheckpointError, match=r"GB are still to be downloaded, but .* has room"):
        fetch(NAME)
    assert hub.downloaded() == ["model.safetensors.index.json"]


def test_only_other_weights(hub: FakeHub) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(CheckpointError, match="convert reads safetensors only"):
        fetch(NAME)


def test_shard_that_is_not_there(hub: FakeHub) -> None:
    del hub.files["model-00002-of-00002.safetensors"]
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.* is not in the repository"):
        fetch(NAME)


def test_environment(hub: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN are those of the hub's own tools."""
    code = f"from convert.hub import fetch; print(fetch({NAME!r}).folder)"
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_secret",
    }
    run = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(run.stdout.strip()).is_relative_to(tmp_path / "home" / "hub")
    assert "Bearer hf_secret" in hub.tokens
