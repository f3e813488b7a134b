"""`localds eval` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

import localds
from localds import windows
from localds.cli import app
from localds.evaluate import evaluate
from localds.scores import compare, perplexity

if TYPE_CHECKING:
    from click.testing import Result

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 6


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, words)])


def test_text_output(tiny_model: Path, text: Path) -> None:
    done = run(tiny_model, text, "--context", 64)
    assert done.exit_code == 0, done.output
    with localds.load(tiny_model) as model:
        expected = perplexity(evaluate(model, windows.cut(model, TEXT, 64)).nll)
    assert done.stdout == f"perplexity          {expected.value:.6g} ± {expected.error:.2g}\n"
    assert done.stderr == ""


def test_json_output(tiny_model: Path, text: Path) -> None:
    done = run(tiny_model, text, "--against", tiny_model, "-c", 64, "--chunks", 2, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    with localds.load(tiny_model) as model:
        scores = evaluate(model, windows.cut(model, TEXT, 64, 2), model)
    assert report["chunks"] == 2
    assert report["scored_tokens"] == 2 * 31
    assert report["perplexity"] == perplexity(scores.nll)._asdict()
    expected = compare(scores)
    assert report["comparison"]["mean_kl"] == {"value": 0, "error": 0}
    assert report["comparison"]["kl_99"] == expected.kl_99
    assert report["comparison"]["same_top"] == {"value": 1, "error": 0}


def test_comparison_output(tiny_model: Path, text: Path) -> None:
    done = run(tiny_model, text, "--against", tiny_model, "--context", 64)
    assert done.exit_code == 0, done.output
    assert "mean KL divergence  0 ± 0 nats\n" in done.stdout
    assert "same best token     100.00 ± 0.00 %\n" in done.stdout


def test_mistakes(tiny_model: Path, text: Path) -> None:
    for words, message in (
        ((text,), "less than one window of 512"),
        ((text, "--against", text, "-c", 64), "text.txt"),
        ((text.with_name("missing"),), "missing"),
    ):
        done = run(tiny_model, *words)
        assert done.exit_code == 1
        assert message in done.stderr
        assert done.stdout == ""
