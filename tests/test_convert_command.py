"""`localds convert` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from checkpoints import write_variant

from localds.gguf import GGUFFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_variant("v3", tmp_path_factory.mktemp("checkpoint") / "v3")


def run(tmp_path: Path, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "localds", "convert", "--pre", "deepseek-v3"]
    return subprocess.run(
        [*command, *map(str, words)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
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


def test_verify_finds_one_wrong_row(folder: Path, tmp_path: Path) -> None:
    """A row of zeros among 320 changes the whole tensor less than rounding to Q4_0 may."""
    assert run(tmp_path, folder, "-o", "m.gguf", "--type", "Q4_0").returncode == 0
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        tensor = file.tensors["token_embd.weight"]
        offset, row = tensor.offset, tensor.nbytes // 320
    with (tmp_path / "m.gguf").open("r+b") as stream:
        stream.seek(offset + 100 * row)
        stream.write(bytes(row))
    done = run(tmp_path, folder, "-o", "m.gguf", "--verify")
    assert done.returncode == 1
    assert "token_embd.weight" in done.stdout
    assert "1.00000" in done.stdout


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    """A resumption finds the header that it left only where no set decides the order of keys."""
    folder = write_variant("v3", tmp_path / "v3")
    added = {"add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(added))
    files = set()
    for seed in "0123":
        done = run(
            tmp_path, folder, "-o", "m.gguf", "--type", "Q8_0", "--force", PYTHONHASHSEED=seed
        )
        assert done.returncode == 0, done.stderr
        files.add((tmp_path / "m.gguf").read_bytes())
    assert len(files) == 1


INTERRUPTED = """
    import os, signal
    import convert.pipeline as pipeline
    from localds.cli import main
    real = pipeline.quantize
    def quantize(target, *rest):
        if target.name == "blk.2.attn_output.weight":
            os.kill(os.getpid(), signal.SIGINT)
        return real(target, *rest)
    pipeline.quantize = quantize
    main()
"""


def test_ctrl_c_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    words = ["convert", str(folder), "--pre", "deepseek-v3", "-o", "m.gguf", "--type", "Q4_K_M"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(INTERRUPTED), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("run the same command with --resume to go on")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf.part", "m.gguf.part.json"]
    assert json.loads((tmp_path / "m.gguf.part.json").read_text())["done"] > 0
    assert run(tmp_path, *words[1:], "--resume").returncode == 0
    words[words.index("m.gguf")] = "whole.gguf"
    assert run(tmp_path, *words[1:]).returncode == 0
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


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
