"""What a file recommends for sampling, and that the command line goes before it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from localds.gguf import GGUFError, GGUFFile
from localds.recommended import recommended_sampling

if TYPE_CHECKING:
    from pathlib import Path

INT, FLOAT = "add_int32", "add_float32"


def write(path: Path, **entries: tuple[str, float]) -> Path:
    """A file that says nothing but `general.sampling.*`."""
    writer = GGUFWriter(path, "deepseek2")
    for key, (kind, value) in entries.items():
        getattr(writer, kind)(f"general.sampling.{key}", value)
    writer.add_tensor("x", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_llama_cpp_reads(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.gguf",
        temp=(FLOAT, 0.25),
        top_k=(INT, 20),
        top_p=(FLOAT, 0.5),
        min_p=(FLOAT, 0.125),
        penalty_repeat=(FLOAT, 1.5),
        penalty_last_n=(INT, -1),
        mirostat=(INT, 2),
    )
    assert recommended_sampling(GGUFFile.open(path)) == {
        "temperature": 0.25,
        "top_k": 20,
        "top_p": 0.5,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "penalty_window": -1,
    }
    assert recommended_sampling(GGUFFile.open(write(tmp_path / "b.gguf", top_k=(INT, -1)))) == {
        "top_k": 0
    }
    assert recommended_sampling(GGUFFile.open(write(tmp_path / "c.gguf"))) == {}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"temp": (FLOAT, -1.0)}, "general.sampling.temp.*temperature is -1.0"),
        ({"temp": (FLOAT, float("nan"))}, "general.sampling.temp"),
        ({"top_p": (FLOAT, 2.0)}, "general.sampling.top_p.*top_p is 2.0"),
        ({"top_k": (FLOAT, 2.0)}, "general.sampling.top_k"),
        ({"penalty_last_n": (INT, -5)}, "general.sampling.penalty_last_n"),
    ],
)
def test_nonsense_is_an_error(
    tmp_path: Path, entry: dict[str, tuple[str, float]], message: str
) -> None:
    gguf = GGUFFile.open(write(tmp_path / "a.gguf", **entry))
    with pytest.raises(GGUFError, match=message):
        recommended_sampling(gguf)


def test_chat_follows_the_file_and_the_command_line(guide_path: Path) -> None:
    """The guide recommends a temperature of 0: any seed gives the same, unless asked for more."""
    assert GGUFReader(guide_path).get_field("general.sampling.temp") is not None

    def say(*options: str) -> str:
        command = [sys.executable, "-P", "-m", "localds", "chat", str(guide_path)]
        done = subprocess.run(
            [*command, "-p", "hello", "-n", "30", *options],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert say("--seed", "1") == say("--seed", "2") == say("--temp", "0")
    hot = ("--temp", "50", "--top-k", "0", "--top-p", "1", "--min-p", "0")
    assert say("--seed", "1", *hot) != say("--seed", "2", *hot)
