"""`localds trace`: the choices it records, and files that are none of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from offloading import load_offloaded
from typer.testing import CliRunner

import localds
from localds.cli import app
from localds.gguf import GGUFFile
from localds.memory.latents import LatentCache
from localds.routing_trace import Trace, Tracer, load_trace
from localds.windows import cut, states

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

ROWS = ("layers", "tokens", "ids")
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


def test_choices_follow_from_the_router(guide_path: Path, text: Path) -> None:
    """Those of the first layer with experts, computed with numpy from its hidden states."""
    trace = record(guide_path, text, "-n", 64, "--chunk", 64)
    with localds.load(guide_path) as model, GGUFFile.open(guide_path) as gguf:
        dense, moe = model.decoder.layers[:2]
        rows = LatentCache(2, model.geometry.cache_width, 64)
        rows.reserve(64)
        x = model.decoder.embedding(cut(model, TEXT, 64, 1).inputs[0])
        x = dense.feed_forward(dense.attention(x, rows.layers[0], 0))
        x = moe.attention(x, rows.layers[1], 0).astype(np.float64)
        norm, router, bias = (
            gguf.tensors[f"blk.1.{name}"].data.view(np.float32)
            for name in ("ffn_norm.weight", "ffn_gate_inp.weight", "exp_probs_b.bias")
        )
        normalized = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-6) * norm
        scores = 1 / (1 + np.exp(-normalized @ router.reshape(16, -1).T)) + bias
    # Two of four groups, by the sum of their best two (DeepSeek-V3, section 2.1.2).
    groups = np.sort(scores.reshape(-1, 4, 4))[..., -2:].sum(-1)
    used = groups >= np.sort(groups)[:, -2:-1]
    scores[~np.repeat(used, 4, axis=1)] = -np.inf
    np.testing.assert_array_equal(trace.ids[:64], np.argsort(-scores)[:, :4])


def test_prompts_choose_like_replies(guide_path: Path, text: Path) -> None:
    """But for ties that rounding breaks, which depends on how many tokens are read at once."""
    one = record(guide_path, text, "-n", 64).ids.reshape(64, 5, 4)
    many = record(guide_path, text, "-n", 64, "--chunk", 64).ids.reshape(5, 64, 4)
    same = np.sort(one) == np.sort(many.transpose(1, 0, 2))
    assert same.all(axis=-1).mean() > 0.9


def test_a_file_of_its_own_rights(guide_path: Path, text: Path) -> None:
    """The file is as readable as any other that is made there, and nothing is left beside it."""
    record(guide_path, text, "-n", 2)
    assert text.with_suffix(".npz").stat().st_mode == text.stat().st_mode
    assert sorted(path.name for path in text.parent.iterdir()) == ["text.npz", "text.txt"]


def test_every_flipped_byte_is_told_or_harmless(guide_path: Path, text: Path) -> None:
    record(guide_path, text, "-n", 4)
    path = text.with_suffix(".npz")
    whole = path.read_bytes()
    told = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            load_trace(path)
        except ValueError as error:
            told += 1
            assert str(path) in str(error)
    assert told > len(whole) // 3


def test_a_model_without_experts_is_told(guide_path: Path) -> None:
    with localds.load(guide_path) as model:
        dense = replace(model.decoder, layers=model.decoder.layers[:1])
        with pytest.raises(ValueError, match="no routed experts"):
            Tracer(dense)
        with pytest.raises(ValueError, match="nothing to keep"):
            Tracer(model.decoder).trace()


@pytest.mark.parametrize(
    "damage", ["empty", "text", "cut", "other", "ids", "twice", "calls", "endless", "pickle"]
)
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
        case "twice":
            np.savez(path, **{**arrays, "ids": arrays["ids"] * 0})
        case "calls":
            np.savez(path, **{**arrays, **{name: arrays[name][:0] for name in ROWS}})
        case "endless":
            np.savez(path, **{**arrays, "n_layers": np.inf})
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
