"""Importance matrices of a small model, and `localds imatrix`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import layer_oracle as oracle
import numpy as np
import pytest
from checkpoints import VARIANTS, golden_config, golden_shapes, make_weights, write_checkpoint
from ggufs import spoil
from typer.testing import CliRunner

import localds
from convert import convert_checkpoint
from localds import importance, windows
from localds.cli import app
from localds.commands import imatrix as command
from localds.importance import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from click.testing import Result

    from localds.model import Model

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 6


@pytest.fixture
def model(tiny_model: Path) -> Iterator[Model]:
    with localds.load(tiny_model) as loaded:
        yield loaded


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    keys = {
        key: field.contents()
        for key, field in reader.fields.items()
        if "." in key and key[0] != "G"
    }
    return keys, {tensor.name: tensor.data.reshape(tensor.shape[::-1]) for tensor in reader.tensors}


def matrices(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that products are made with, in numpy order."""
    tensors = {t.name: tuple(t.shape[::-1].tolist()) for t in gguf.GGUFReader(path).tensors}
    return {
        name: shape for name, shape in tensors.items() if len(shape) > 1 and name.startswith("blk.")
    }


def test_every_weight_is_recorded(model: Model, tiny_model: Path, tmp_path: Path) -> None:
    cut = windows.cut(model, TEXT, 64, 3)
    collector = Collector(model)
    assert list(collector.run(cut)) == [1, 2, 3]
    out = tmp_path / "imatrix.gguf"
    importance.save(out, collector.sums(), dataset="a text", chunks=3, size=64)
    keys, tensors = read(out)
    assert keys["general.type"] == "imatrix"
    assert keys["imatrix.datasets"] == ["a text"]
    assert keys["imatrix.chunk_count"] == 3
    assert keys["imatrix.chunk_size"] == 64

    weights = matrices(tiny_model)
    assert {name.rpartition(".")[0] for name in tensors} == set(weights)
    assert len(tensors) == 2 * len(weights)
    for name, shape in weights.items():
        squares, counts = tensors[name + ".in_sum2"], tensors[name + ".counts"]
        if "_exps" in name:
            assert squares.shape == (shape[0], shape[2])
            assert counts.shape == (shape[0], 1)
            # Each token goes to four experts.
            assert counts.sum() == 3 * 64 * golden_config("v3")["num_experts_per_tok"]
        else:
            assert squares.shape == (1, shape[-1] * (shape[0] if len(shape) == 3 else 1))
            assert counts.tolist() == [[3 * 64]]
        assert (squares[counts[:, 0] > 0] > 0).all()


def test_sums_of_the_first_layer(model: Model, tiny_model: Path) -> None:
    cut = windows.cut(model, TEXT, 64)
    collector = Collector(model)
    list(collector.run(cut))
    tensors = {t.name: t.data for t in gguf.GGUFReader(tiny_model).tensors}
    eps = golden_config("v3")["rms_norm_eps"]
    embedded = tensors["token_embd.weight"].astype(np.float64)[cut.inputs.reshape(-1)]
    hidden = oracle.rms_norm(embedded, tensors["blk.0.attn_norm.weight"], eps)
    sums = collector.sums()["blk.0.attn_kv_a_mqa.weight"]
    np.testing.assert_allclose(sums.squares[0], (hidden**2).sum(0), rtol=1e-5)
    assert sums.counts.tolist() == [cut.tokens.size]


def test_output_weight(model: Model) -> None:
    cut = windows.cut(model, TEXT, 100, 2)
    with_output = Collector(model, output_weight=True)
    list(with_output.run(cut))
    assert with_output.sums()["output.weight"].counts.tolist() == [200]
    without = Collector(model)
    list(without.run(cut))
    assert without.sums().keys() == with_output.sums().keys() - {"output.weight"}


def test_experts_that_were_never_reached(model: Model) -> None:
    collector = Collector(model)
    list(collector.run(windows.cut(model, TEXT, 4, 1)))
    found = collector.unreached()
    assert found
    for layer in found:
        counts = collector.sums()[f"blk.{layer.layer}.ffn_up_exps.weight"].counts
        assert layer.total == len(counts)
        assert layer.experts == [e for e, count in enumerate(counts) if count == 0]


def variant_with_nan(folder: Path) -> Path:
    weights = make_weights(golden_shapes("v3"), VARIANTS["v3"].seed)
    write_checkpoint(folder / "checkpoint", golden_config("v3"), weights)
    convert_checkpoint(folder / "checkpoint", folder / "nan.gguf", pre=VARIANTS["v3"].pre)
    return spoil(folder / "nan.gguf", "blk.1.attn_norm.weight", 3)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    with (
        localds.load(variant_with_nan(tmp_path)) as model,
        pytest.raises(ValueError, match=r"inputs of blk\.1\.attn_\w+\.weight are not finite"),
    ):
        list(Collector(model).run(windows.cut(model, TEXT, 64)))


# ---- the command ----


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["imatrix", *map(str, words)])


def test_command(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = run(tiny_model, text, "-o", out, "--chunk-size", 64, "--chunks", 2)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{out}: 2 chunks of 64 tokens\n"
    keys, tensors = read(out)
    assert keys["imatrix.datasets"] == [str(text)]
    assert keys["imatrix.chunk_count"] == 2
    assert "output.weight.counts" not in tensors
    assert not list(tmp_path.glob("*.part"))


def test_command_reports_experts(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    words = (tiny_model, text, "-o", tmp_path / "out.gguf", "--chunks", 1)
    done = run(*words, "--chunk-size", 4)
    assert "were never reached" in done.stderr
    assert "  layer " in done.stderr
    done = run(*words, "--chunk-size", 256)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "missing.txt"}, "missing.txt"),
        ({"output": "missing/out.gguf"}, "there is no folder"),
        ({"output": "."}, "is a folder"),
        ({"output": "MODEL"}, "is the model"),
        ({"size": 4096}, "less than one window of 4096"),
    ],
)
def test_command_mistakes(
    tiny_model: Path, text: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    output = tmp_path / change.get("output", "out.gguf")
    done = run(
        tiny_model,
        tmp_path / change.get("text", text.name),
        "-o",
        tiny_model if output.name == "MODEL" else output,
        "--chunk-size",
        change.get("size", 64),
    )
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out.gguf").exists()


class Stop:
    """A collector's run that ends with an exception after some windows."""

    def __init__(self, error: BaseException, after: int) -> None:
        self.error = error
        self.after = after
        self.original = Collector.run

    def __call__(self, collector: Collector, text: windows.Windows) -> Iterator[int]:
        for chunk in self.original(collector, text):
            if chunk > self.after:
                raise self.error
            yield chunk


def stop(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
    stopped = Stop(error, after)
    monkeypatch.setattr(Collector, "run", lambda *args: stopped(*args))


def test_interrupt_saves_what_there_is(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    stop(monkeypatch, KeyboardInterrupt(), after=2)
    done = run(tiny_model, text, "-o", out, "--chunk-size", 64)
    assert done.exit_code == 130
    assert "stopped after 3 of" in done.stderr
    assert read(out)[0]["imatrix.chunk_count"] == 3


def test_interrupt_before_the_first_chunk(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_nothing(*_: object) -> Iterator[int]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Collector, "run", run_nothing)
    done = run(tiny_model, text, "-o", tmp_path / "out.gguf", "--chunk-size", 64)
    assert done.exit_code == 130
    assert "nothing was collected" in done.stderr
    assert not (tmp_path / "out.gguf").exists()


def test_results_are_saved_on_the_way(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    monkeypatch.setattr(command, "_SAVE_SECONDS", 0)
    monkeypatch.setattr(command, "_SAVE_SHARE", float("inf"))
    stop(monkeypatch, SystemError("power cut"), after=2)
    done = run(tiny_model, text, "-o", out, "--chunk-size", 64)
    assert isinstance(done.exception, SystemError)
    assert read(out)[0]["imatrix.chunk_count"] == 2
