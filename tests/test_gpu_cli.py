"""A GPU as a user meets it at the command line; MLX's CPU device stands in for one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

if TYPE_CHECKING:
    from pathlib import Path

LOCALDS = [sys.executable, "-P", "-m", "localds"]
BROKEN_MLX = 'raise ImportError("libmlx.so: cannot open shared object file")\n'


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment with folders of its own, and with a stand-in for a GPU."""
    names = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME")
    return os.environ | {name: str(tmp_path / name) for name in names} | {"LOCALDS_GPU": "cpu"}


def run(env: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LOCALDS, *map(str, words)],
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


def speeds_file(env: dict[str, str]) -> Path:
    from pathlib import Path

    return Path(env["XDG_CACHE_HOME"]) / "localds" / "speeds.json"


def check_one_message(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """One line of error, of which the last one on stderr is; nothing of Python's."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("localds: error: ")
    for word in words:
        assert word in done.stderr


def test_an_unknown_stand_in_is_told_by_every_command(
    home: dict[str, str], guide_path: Path
) -> None:
    env = home | {"LOCALDS_GPU": "tpu"}
    for words in (("chat", guide_path, "-p", "hi"), ("inspect", guide_path), ("doctor",)):
        check_one_message(run(env, *words), "LOCALDS_GPU='tpu'", "cpu, cpu-unified, none")
    # Who wants no GPU is not asked.
    done = run(env, "chat", guide_path, "-p", "hi", "-n", 2, "--device", "cpu")
    assert done.returncode == 0, done.stderr


def test_an_mlx_that_does_not_load(home: dict[str, str], guide_path: Path, tmp_path: Path) -> None:
    """By itself the CPU computes; who asks for the GPU is told how to mend MLX."""
    package = tmp_path / "broken" / "mlx"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "core.py").write_text(BROKEN_MLX)
    env = home | {"PYTHONPATH": str(package.parent)}
    words = ("chat", guide_path, "-p", "hi", "-n", 2)
    done = run(env, *words)
    assert done.returncode == 0, done.stderr
    assert "GPU" not in done.stderr
    check_one_message(run(env, *words, "--device", "gpu"), "cannot be loaded", "libmlx.so", "pip")


def test_kept_speeds_that_are_damaged_are_measured_again(
    home: dict[str, str], guide_path: Path
) -> None:
    words = ("inspect", guide_path, "--cpu-moe", "--json")
    first = run(home, *words)
    assert "measuring" in first.stderr
    assert "measuring" not in run(home, *words).stderr
    whole = speeds_file(home).read_text()
    assert json.loads(whole)
    speeds_file(home).write_text(whole[: len(whole) // 2])
    again = run(home, *words)
    assert again.returncode == 0, again.stderr
    assert "measuring" in again.stderr
    assert json.loads(again.stdout)["gpu"]["slots"] == json.loads(first.stdout)["gpu"]["slots"]
    assert json.loads(speeds_file(home).read_text())


@pytest.mark.parametrize("options", [(), ("--n-cpu-moe", "3")])
def test_ctrl_c_while_a_prompt_is_read(
    home: dict[str, str], guide_path: Path, options: tuple[str, ...]
) -> None:
    """It ends soon, with 130 and without a word of Python's."""
    prompt = "many words are here\n" * 300
    program: Any = [*LOCALDS, "chat", guide_path, "-p", prompt, "-n", "5", *options]
    with subprocess.Popen(
        program,
        env=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell inherits that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("localds: GPU "):
                break
        time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=30)
    assert running.returncode == 130, err
    assert "Traceback" not in err
    assert "reply 0 tokens" in err


def test_evaluating_stays_on_the_cpu(
    home: dict[str, str], guide_path: Path, tmp_path: Path
) -> None:
    """It computes with the CPU's kernels whatever GPU there is, to the same figures."""
    text = tmp_path / "text.txt"
    text.write_text("localds runs models of the DeepSeek family on one computer.\n" * 12)
    words = ("eval", guide_path, text, "-c", 64, "--json")
    done, expected = run(home, *words), run(home | {"LOCALDS_GPU": "none"}, *words)
    assert done.returncode == 0, done.stderr
    assert "GPU" not in done.stderr
    assert json.loads(done.stdout)["perplexity"] == json.loads(expected.stdout)["perplexity"]
