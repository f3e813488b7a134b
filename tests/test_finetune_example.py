"""`localds finetune --example`: its data, what the model in the box says to them, and the run."""

from __future__ import annotations

import json
import os
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from localds.cli import app

pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

from localds.catalog.resolve import DEMO
from localds.finetune import example

if TYPE_CHECKING:
    from click.testing import Result

EVALUATION = Path(__file__).parent.parent / "training" / "evaluation" / "questions.toml"
MOST_LOST = 0.05
SYSTEM = "Reply with JSON."


def records(path: Path) -> list[list[dict[str, Any]]]:
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def asked(path: Path) -> set[str]:
    """Questions with the system prompt that asks for the format."""
    found = records(path)
    return {m[1]["content"].casefold() for m in found if m[0]["content"] == SYSTEM}


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["finetune", "--example", *map(str, words)])


def test_held_out_questions_are_not_trained() -> None:
    assert len(example.questions()) == len(asked(example.HELD_OUT)) == 40
    assert not asked(example.HELD_OUT) & asked(example.TRAIN)


def test_nothing_is_trained_that_the_evaluation_asks() -> None:
    with EVALUATION.open("rb") as file:
        questions = {entry["text"].casefold() for entry in tomllib.load(file)["question"]}
    trained = {m[-2]["content"].casefold() for m in records(example.TRAIN)}
    assert not trained & questions


def test_replies_are_one_line_of_json_with_a_command_that_exists() -> None:
    commands = {info.name for info in app.registered_commands}
    for messages in [*records(example.TRAIN), *records(example.HELD_OUT)]:
        reply = messages[-1]["content"]
        if messages[0]["content"] != SYSTEM:
            assert not reply.startswith("{")
            continue
        value = json.loads(reply)
        assert json.dumps(value) == reply
        if value["command"] is not None:
            program, name = value["command"].split()
            assert program == "localds"
            assert name in commands


def test_the_model_does_not_know_the_format() -> None:
    assert example.share_right(example.ask(None)) == 0


def test_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, but for what is learnt."""
    few = replace(example.OPTIONS, training=replace(example.OPTIONS.training, steps=2))
    monkeypatch.setattr(example, "OPTIONS", few)
    out = tmp_path / "out"
    done = run("-o", out)
    assert done.exit_code == 0, done.output
    assert (out / "adapter.gguf").exists()
    assert (out / "adapter_model.safetensors").exists()
    assert re.search(r"0% exactly right before, \d+% after", done.stdout)
    assert done.stdout.count("before: ") == done.stdout.count("after:  ") == 4
    assert f"--adapter {out}" in done.stdout
    again = run("-o", out)
    assert again.exit_code == 1
    assert "holds a run already" in again.stderr


@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not os.environ.get("LOCALDS_EXAMPLE"), reason="takes minutes: set LOCALDS_EXAMPLE=1"
)
def test_it_learns_the_format_and_keeps_its_answers(tmp_path: Path) -> None:
    import localds
    from localds.recommended import recommended_sampling
    from training.evaluate import ask, load_questions, share_right

    out = tmp_path / "out"
    done = run("-o", out)
    assert done.exit_code == 0, done.output
    assert example.share_right(example.ask(out)) > 0.9

    def evaluation(adapters: list[tuple[Path, float]]) -> float:
        with localds.load(DEMO, "cpu", adapters=adapters) as model:
            sampling = recommended_sampling(model.gguf)
            return share_right(ask(model, load_questions(), **sampling))

    assert evaluation([(out, 1.0)]) > evaluation([]) - MOST_LOST
