"""Windows of a text, and models scored on them, against the plain logits of the same models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from checkpoints import VARIANTS, golden_config, golden_shapes, make_weights, write_checkpoint
from gguf import GGUFReader
from ggufs import spoil

import localds
from convert import convert_checkpoint
from localds import windows
from localds.evaluate import check_vocabularies, evaluate
from localds.scores import log_softmax, perplexity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from localds.model import Model
    from localds.windows import Windows

    Weights = dict[str, NDArray[np.float32]]

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 6


@pytest.fixture
def model(tiny_model: Path) -> Iterator[Model]:
    with localds.load(tiny_model) as loaded:
        yield loaded


def variant(folder: Path, change: Callable[[Weights], None]) -> Path:
    """The tiny model with other weights."""
    weights = make_weights(golden_shapes("v3"), VARIANTS["v3"].seed)
    change(weights)
    write_checkpoint(folder / "checkpoint", golden_config("v3"), weights)
    convert_checkpoint(folder / "checkpoint", folder / "other.gguf", pre=VARIANTS["v3"].pre)
    return folder / "other.gguf"


def test_windows(model: Model) -> None:
    assert not model.tokenizer.add_bos
    plain = windows.cut(model, TEXT, 64)
    assert (plain.inputs == plain.tokens).all()

    model.tokenizer.add_bos = True
    ids = model.tokenizer.encode(TEXT)
    cut = windows.cut(model, TEXT, 64)
    assert cut.tokens[0, 0] == model.tokenizer.bos_id
    assert cut.size == 64
    assert cut.tokens.shape == (len(ids) // 64, 64)
    assert cut.tokens.reshape(-1).tolist() == ids[: cut.tokens.size]
    assert (cut.inputs[:, 0] == model.tokenizer.bos_id).all()
    assert (cut.inputs[:, 1:] == cut.tokens[:, 1:]).all()
    assert len(windows.cut(model, TEXT, 64, 2).tokens) == 2
    assert len(windows.cut(model, TEXT, 64, 2000).tokens) == len(cut.tokens)


def test_texts_that_cannot_be_read(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 tokens, less than one window of 64"):
        windows.cut(model, "four", 64)
    with pytest.raises(ValueError, match=r"made for at most \d+ tokens, not for windows of"):
        windows.cut(model, TEXT, 1 << 20)
    file = tmp_path / "text"
    file.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match="byte 2 is not UTF-8"):
        windows.read_text(file)
    file.write_text(" \n")
    with pytest.raises(ValueError, match="the text is empty"):
        windows.read_text(file)


def predictions(model: Model, cut: Windows) -> NDArray[np.float64]:
    """Log-probabilities [n, n_vocab] of what comes after the second halves' tokens."""
    rows = []
    for ids in cut.inputs.tolist():
        logits = model.session().evaluate(ids, all_logits=True)
        rows.append(log_softmax(logits[cut.size // 2 : -1]))
    return np.concatenate(rows)


@pytest.mark.parametrize("size", [64, 51, 4])
def test_perplexity(model: Model, size: int) -> None:
    cut = windows.cut(model, TEXT, size, 3)
    reported: list[int] = []
    scores = evaluate(model, cut, on_progress=lambda tokens, _: reported.append(tokens))
    assert reported == [size] * 3
    expected = predictions(model, cut)
    targets = cut.tokens[:, size // 2 + 1 :].reshape(-1)
    nll = -expected[np.arange(len(expected)), targets]
    np.testing.assert_allclose(scores.nll, nll, rtol=1e-6)
    assert scores.kl is None


def test_a_window_must_leave_something_to_score(model: Model) -> None:
    with pytest.raises(ValueError, match="leave nothing to score"):
        evaluate(model, windows.cut(model, TEXT, 3))


def test_a_uniform_model(tmp_path: Path) -> None:
    def flatten(weights: Weights) -> None:
        weights["lm_head.weight"][:] = 0

    with localds.load(variant(tmp_path, flatten)) as model:
        scores = evaluate(model, windows.cut(model, TEXT, 64))
        assert perplexity(scores.nll) == pytest.approx((model.geometry.vocabulary, 0))


def test_a_model_beside_itself(model: Model) -> None:
    scores = evaluate(model, windows.cut(model, TEXT, 64), model)
    assert scores.kl is not None
    assert scores.same_top is not None
    assert (scores.kl == 0).all()
    assert scores.same_top.all()
    assert (scores.nll == scores.reference_nll).all()


def test_a_model_beside_another(model: Model, tmp_path: Path) -> None:
    def disturb(weights: Weights) -> None:
        for name, values in weights.items():
            if "mlp" in name:
                values *= np.float32(1.3)

    with localds.load(variant(tmp_path, disturb)) as other:
        cut = windows.cut(model, TEXT, 64)
        scores = evaluate(model, cut, other)
        log_q, log_p = predictions(model, cut), predictions(other, cut)
        expected = (np.exp(log_p) * (log_p - log_q)).sum(1)
        assert expected.mean() > 1e-3
        assert scores.kl is not None
        np.testing.assert_allclose(scores.kl, expected, rtol=1e-6, atol=1e-9)
        assert scores.reference_nll is not None
        alone = evaluate(other, cut)
        np.testing.assert_array_equal(scores.reference_nll, alone.nll)


def test_damaged_weights_are_no_result(tmp_path: Path) -> None:
    path = spoil(variant(tmp_path, lambda _: None), "output_norm.weight", 3)
    with (
        localds.load(path) as model,
        pytest.raises(ValueError, match="predictions are not finite"),
    ):
        evaluate(model, windows.cut(model, TEXT, 64))


def test_other_vocabularies_are_refused(model: Model, tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    data = bytearray(tiny_model.read_bytes())
    at = data.index(b"<|user|>")
    data[at : at + 8] = b"<|owner>"
    other.write_bytes(data)
    assert GGUFReader(other).fields["tokenizer.ggml.tokens"].contents(2) == "<|owner>"
    with localds.load(other) as loaded, pytest.raises(ValueError, match=r"token 2 is '<\|user\|>'"):
        check_vocabularies(model, loaded)


def test_a_full_disk_is_noticed_first(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Full)
    with pytest.raises(ValueError, match="--chunks"):
        evaluate(model, windows.cut(model, TEXT, 64), model)
