"""`localds finetune` as a user runs it, with a model of random weights."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

import localds
from localds.adapters import Base, read_adapter
from localds.cli import app
from localds.gguf import GGUFFile

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

if TYPE_CHECKING:
    from click.testing import Result

SMALL = ("--length", 32, "--batch", 4, "--rank", 4, "--device", "cpu", "--lr", 0.01)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{n} and one more is ", "completion": f"{n + 1}."} for n in range(40)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["finetune", *map(str, words)])


def metrics(out: Path, event: str = "step") -> list[dict[str, Any]]:
    lines = (out / "training" / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


def test_from_data_to_an_adapter(tiny_model: Path, data: Path, out: Path) -> None:
    done = run(tiny_model, "--data", data, "-o", out, *SMALL, "--steps", 4)
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter.gguf",
        "training",
    }
    assert not list(out.rglob("*.part"))
    steps = metrics(out)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert metrics(out, "evaluated")[-1]["step"] == 4
    for told in ("40 examples from 40 records", "Memory on the CPU", "held-out loss"):
        assert told in done.stderr
    assert "step 4/4, loss" in done.stderr
    assert "tokens/s" in done.stderr
    # llama.cpp's own weakness with such models is told, and what to do.
    assert "llama.cpp would ignore" in done.stderr
    assert "--merge" in done.stderr
    assert f"use it: localds chat {tiny_model} --adapter {out}" in done.stdout
    with GGUFFile.open(tiny_model) as gguf:
        base = Base.of(gguf)
        folder, file = read_adapter(out, base), read_adapter(out / "adapter.gguf", base)
    assert folder.config.rank == 4
    assert any(pair["b"].any() for pair in folder.tree.values())
    for name, pair in folder.tree.items():
        for part, array in pair.items():
            np.testing.assert_array_equal(array, file.tree[name][part])
    with localds.load(tiny_model, "cpu") as plain:
        before = plain.logits([1, 2, 3])
    with localds.load(tiny_model, "cpu", adapters=[(out, 1.0)]) as adapted:
        assert np.abs(adapted.logits([1, 2, 3]) - before).max() > 1e-3


def test_a_folder_with_a_run_is_refused(tiny_model: Path, data: Path, out: Path) -> None:
    arguments = (tiny_model, "-d", data, "-o", out, *SMALL, "--steps", 1, "--targets", "o_proj")
    assert run(*arguments).exit_code == 0
    again = run(*arguments)
    assert again.exit_code == 1
    assert "holds a run already; go on with it (--resume)" in again.stderr
    other = run(*arguments, "--resume", "--rank", 8)
    assert other.exit_code == 1
    assert "was begun differently" in other.stderr
    smaller = run(*arguments, "--resume", "--batch", 1)
    assert smaller.exit_code == 1
    assert "batch is 1, and the run was begun with 4 rows at once" in smaller.stderr


def test_resume_without_a_run(tiny_model: Path, data: Path, out: Path) -> None:
    done = run(tiny_model, "-d", data, "-o", out, *SMALL, "--resume")
    assert done.exit_code == 1
    assert "holds no run" in done.stderr


def test_ctrl_c_saves_and_resume_goes_on_exactly(
    tiny_model: Path, data: Path, out: Path, tmp_path: Path
) -> None:
    words = [tiny_model, "-d", data, *SMALL, "--steps", 12, "--targets", "o_proj,q_b_proj"]
    whole = tmp_path / "whole"
    assert run(*words, "-o", whole).exit_code == 0

    command = [sys.executable, "-P", "-m", "localds", "finetune", *map(str, words), "-o", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log = out / "training" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the run was over before the signal came")
    assert process.returncode == 130, errors
    assert "what is done is kept in" in errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert not (out / "adapter_config.json").exists()

    assert run(*words, "-o", out, "--resume").exit_code == 0
    assert [step["step"] for step in metrics(out)] == [*range(1, 13)]
    assert [step["loss"] for step in metrics(out)] == [step["loss"] for step in metrics(whole)]


def test_a_dry_run_writes_nothing(tiny_model: Path, data: Path, out: Path) -> None:
    done = run(tiny_model, "-d", data, "-o", out, *SMALL, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "40 examples from 40 records" in done.stdout
    assert "optimizer" in done.stdout
    assert "at once" in done.stdout
    assert not out.exists()


def test_several_sources(tiny_model: Path, data: Path, out: Path, tmp_path: Path) -> None:
    more, valid = tmp_path / "more.jsonl", tmp_path / "valid.jsonl"
    more.write_text('{"text": "one two three four"}\n{"text": "five six"}\n')
    valid.write_text('{"text": "seven eight nine"}\n')
    done = run(tiny_model, "-d", data, "-d", more, "--valid", valid, "-o", out, *SMALL, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "43 examples from" in done.stdout
    assert "1 examples are kept for evaluation" in done.stdout


def test_bad_lines_are_listed(tiny_model: Path, out: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"text": }\n{"texts": "x"}\n')
    done = run(tiny_model, "-d", bad, "-o", out, *SMALL)
    assert done.exit_code == 1
    assert "bad.jsonl:2:" in done.stderr
    assert "bad.jsonl:3:" in done.stderr
    assert not out.exists()


def test_what_does_not_fit(tiny_model: Path, data: Path, out: Path) -> None:
    done = run(tiny_model, "-d", data, "-o", out, *SMALL, "--ram", "20MB")
    assert done.exit_code == 1
    assert "training needs" in done.stderr
    assert "the budget is 19.1 MiB" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", 5, "--epochs", 2], "exclude each other"),
        (["--targets", "qkv"], "'qkv' is unknown"),
        (["--method", "qlora"], "choose lora, rslora or dora"),
        (["--rank", 0], "rank is 0"),
        (["--curriculum", "512,64"], "several that rise"),
        (["--curriculum", "much"], "are no numbers"),
        (["--lr", 0], "learning_rate is 0"),
        (["--schedule", "steep"], "schedule is 'steep'"),
        (["--example"], "--example has its own model and data"),
    ],
)
def test_usage(tiny_model: Path, data: Path, out: Path, words: list[object], message: str) -> None:
    done = run(tiny_model, "-d", data, "-o", out, "--device", "cpu", *words)
    assert done.exit_code == 2
    assert message in done.stderr


def test_what_is_missing(tiny_model: Path) -> None:
    done = run(tiny_model)
    assert done.exit_code == 2
    assert "--data" in done.stderr


def test_dora_writes_no_gguf_and_says_why(tiny_model: Path, data: Path, out: Path) -> None:
    done = run(tiny_model, "-d", data, "-o", out, *SMALL, "--steps", 1, "--method", "dora")
    assert done.exit_code == 0, done.output
    assert "no GGUF adapter was written" in done.stderr
    assert "--merge" in done.stderr
    assert not (out / "adapter.gguf").exists()
    assert (out / "adapter_model.safetensors").exists()


def test_a_curriculum_of_lengths(tiny_model: Path, data: Path, out: Path) -> None:
    done = run(
        tiny_model, "-d", data, "-o", out, *SMALL, "--steps", 4, "--curriculum", "32,64",
        "--targets", "o_proj", "--no-gguf", "--eval-share", 0,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert not (out / "adapter.gguf").exists()
    assert metrics(out, "evaluated") == []


def test_experts_that_do_not_fit(
    tiny_model: Path, data: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where some experts come from RAM, losses are the same; MLX's CPU device stands in."""
    monkeypatch.setenv("LOCALDS_GPU", "cpu")
    monkeypatch.setattr("localds.finetune.sizes.STAGING_BYTES", 1)  # one expert at a time
    words = (
        tiny_model, "-d", data, *SMALL, "--device", "gpu", "--steps", 2, "--eval-share", 0,
        "--targets", "o_proj,gate_proj",
    )  # fmt: skip
    assert run(*words, "-o", tmp_path / "whole").exit_code == 0
    vram = next(
        f"{size}KB"
        for size in range(50_000, 60_000, 100)
        if run(*words, "-o", out, "--dry-run", "--vram", f"{size}KB").exit_code == 0
    )
    done = run(*words, "-o", out, "--vram", vram)
    assert done.exit_code == 0, done.output
    assert "come from RAM or the disk" in done.stderr
    expected = [step["loss"] for step in metrics(tmp_path / "whole")]
    assert [step["loss"] for step in metrics(out)] == pytest.approx(expected, abs=1e-4)


def test_the_biases_of_a_trained_router_move(tiny_model: Path, data: Path, out: Path) -> None:
    """By V3's rule, 0.001 a step; what no adapter file can hold lies beside them."""
    done = run(tiny_model, "-d", data, "-o", out, *SMALL, "--steps", 3, "--targets", "router")
    assert done.exit_code == 0, done.output
    assert "router_biases.safetensors" in done.stderr
    assert metrics(out)[-1]["balance"]["unevenness"] >= 1
    moved = mx.load(str(out / "router_biases.safetensors"))
    with GGUFFile.open(tiny_model) as gguf:
        names = [name for name in gguf.tensors if name.endswith("exp_probs_b.bias")]
        assert set(moved) == set(names)
        for name in names:
            before = gguf.tensors[name].data.view(np.float32)
            changes = (np.array(moved[name]) - before) / 0.001
            assert np.abs(changes).max() <= 3.01
            assert np.abs(changes).max() > 0.9
            np.testing.assert_allclose(changes, np.round(changes), atol=0.01)


def test_progress_of_other_targets_leaves_the_router_alone(
    tiny_model: Path, data: Path, out: Path
) -> None:
    done = run(tiny_model, "-d", data, "-o", out, *SMALL, "--steps", 1, "--targets", "o_proj")
    assert done.exit_code == 0, done.output
    assert not (out / "router_biases.safetensors").exists()
    assert metrics(out)[-1]["balance"]["unevenness"] >= 1


def test_without_mlx(data: Path, out: Path, tiny_model: Path) -> None:
    code = (
        "import sys\n"
        "import importlib.util as util\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'mlx' else found(name, *more)\n"
        "sys.modules['mlx'] = None\n"
        "from localds.cli import app\n"
        f"app({['finetune', str(tiny_model), '-d', str(data), '-o', str(out)]!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "localds[finetune]" in done.stderr
    assert "Traceback" not in done.stderr
