"""`localds convert` as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_variant

from localds.gguf import GGUFFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_variant("v3", tmp_path_factory.mktemp("checkpoint") / "v3")


def run(tmp_path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "localds", "convert", "--pre", "deepseek-v3"]
    return subprocess.run(
        [*command, *map(str, words)], cwd=tmp_path, capture_output=True, text=True, check=False
    )


def test_plan_file_and_verification(folder: Path, tmp_path: Path) -> None:
    done = run(tmp_path, folder, "--type", "q8_0", "--verify")
    assert done.returncode == 0, done.stderr
    assert "routed experts" in done.stderr
    assert "GB/s" in done.stdout
    assert "largest relative errors" in done.stdout
    [path] = tmp_path.iterdir()
    assert path.name.lower() == "v3-q8_0.gguf"
    with GGUFFile.open(path) as file:
        assert file.tensors["blk.1.ffn_up_exps.weight"].type.name == "Q8_0"
        assert file.integer("general.file_type") == 7


def test_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    done = run(tmp_path, folder, "--dry-run", "--keep", "attn_.*=F16")
    assert done.returncode == 0, done.stderr
    assert "F16" in done.stderr
    assert not list(tmp_path.iterdir())


def test_verify_finds_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    assert run(tmp_path, folder, "--type", "F16", "-o", "m.gguf").returncode == 0
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        offset = file.tensors["blk.1.attn_output.weight"].offset
    with (tmp_path / "m.gguf").open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\x00\x44" * 8)
    done = run(tmp_path, folder, "-o", "m.gguf", "--verify")
    assert done.returncode == 1
    assert "blk.1.attn_output.weight" in done.stdout
    assert "1 tensors are not what the source holds" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at/all"], "nowhere/at/all"),
        (["{folder}", "--type", "Q9"], "'Q9' is not known"),
        (["{folder}", "--type", "fit:1KiB"], "smallest file of this model"),
        (["{folder}", "--keep", "zzz=Q8_0"], "matches no tensor"),
        (["{folder}", "--imatrix", "{folder}/config.json"], "importance matrix"),
        (["{folder}", "--split", "huge"], "size 'huge' is not understood"),
        (["{folder}", "-o", "no/such/m.gguf"], "no/such does not exist"),
        (["{folder}", "--pre", "klingon"], "klingon"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    done = run(tmp_path, *(word.format(folder=folder) for word in words))
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("localds: error:") == 1
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_existing_file_stays(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"precious")
    done = run(tmp_path, folder, "-o", "m.gguf")
    assert done.returncode == 1
    assert "--force" in done.stderr
    assert (tmp_path / "m.gguf").read_bytes() == b"precious"
