"""`localds trace`: the choices it records, and files that are none of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from offloading import load_offloaded
from typer.testing import CliRunner

import localds
from localds.cli import app
from localds.gguf import GGUFFile
from localds.routing_trace import Trace, load_trace
from localds.windows import cut, states

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

TEXT = "How do I download a model, and which of them fit into 16 GB of memory? " * 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["trace", *map(str, words)])


def record(model: Path, text: Path, *words: object) -> Trace:
    path = text.with_suffix(".npz")
    done = run(model, text, "-o", path, *words)
    assert done.exit_code == 0, done.output
    return load_trace(path)


def test_counts_are_those_of_the_experts_computed(guide_path: Path, text: Path) -> None:
    """The store counts the tokens of each expert as they are multiplied."""
    trace = record(guide_path, text, "-n", 96, "--chunk", 96)
    assert (trace.n_layers, trace.n_experts, trace.ids.shape) == (5, 16, (5 * 96, 4))
    assert trace.layers.tolist() == [0, 1, 2, 3, 4]
    assert trace.tokens.tolist() == [96] * 5
    with load_offloaded(guide_path, 20) as model:
        store = model.offload.store
        before = store.counts().astype(int)
        list(states(model.decoder, cut(model, TEXT, 96, 1)))
        counts = store.counts() - before
    for layer in range(5):
        chosen = trace.ids[96 * layer : 96 * (layer + 1)]
        np.testing.assert_array_equal(np.bincount(chosen.ravel(), minlength=16), counts[layer])


def test_one_by_one_is_a_reply(guide_path: Path, text: Path) -> None:
    trace = record(guide_path, text, "-n", 20)
    assert trace.tokens.tolist() == [1] * 100
    assert trace.layers.tolist() == [0, 1, 2, 3, 4] * 20
    assert all(len(set(row)) == 4 for row in trace.ids.tolist())


def test_the_first_choice_follows_from_the_router(guide_path: Path, text: Path) -> None:
    """The best expert of the first layer with experts, computed with numpy from hidden states."""
    trace = record(guide_path, text, "-n", 1)
    with localds.load(guide_path) as model, GGUFFile.open(guide_path) as gguf:
        decoder = model.decoder
        ids = cut(model, TEXT, 1, 1).inputs[0]
        session = model.session(16)
        x = decoder.embedding(ids)
        for layer, rows in zip(decoder.layers[:2], session._cache.layers[:2], strict=True):
            x = layer.attention(x, rows, 0)
            if layer is decoder.layers[0]:
                x = layer.feed_forward(x)
        norm = gguf.tensors["blk.1.ffn_norm.weight"].data.view(np.float32)
        router = gguf.tensors["blk.1.ffn_gate_inp.weight"].data.view(np.float32).reshape(16, -1)
        bias = gguf.tensors["blk.1.exp_probs_b.bias"].data.view(np.float32)
    normalized = x[0] / np.sqrt(np.mean(x[0] ** 2) + 1e-6) * norm
    scores = 1 / (1 + np.exp(-router @ normalized)) + bias
    assert set(trace.ids[0].tolist()) <= set(np.argsort(-scores)[:12].tolist())


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "other", "ids", "pickle"])
def test_other_files_are_told(guide_path: Path, text: Path, damage: str) -> None:
    record(guide_path, text, "-n", 4)
    path = text.with_suffix(".npz")
    with np.load(path) as archive:
        arrays = dict(archive)
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text(TEXT)
        case "cut":
            path.write_bytes(path.read_bytes()[:-40])
        case "other":
            np.savez(path, x=np.zeros(3))
        case "ids":
            np.savez(path, **{**arrays, "ids": arrays["ids"] + 16})
        case _:
            np.savez(path, **{**arrays, "ids": np.array([{}], object)})
    with pytest.raises(ValueError, match=str(path)):
        load_trace(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "/nothing/here/x.npz"], "there is no folder"),
        (["-o", "MODEL"], "is the model"),
    ],
)
def test_mistakes(guide_path: Path, text: Path, words: list[str], message: str) -> None:
    words = [str(guide_path) if word == "MODEL" else word for word in words]
    done = run(guide_path, text, *words)
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
