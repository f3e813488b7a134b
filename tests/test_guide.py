"""The model in the box: what it is, what it answers, how its experts are used, what it was told."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import localds
from convert import convert, open_source
from localds.catalog.resolve import find_model
from localds.evaluate import evaluate
from localds.recommended import recommended_sampling
from localds.scores import compare, perplexity
from training.evaluate import (
    LEAST_SHARE,
    MUST_BE_RIGHT,
    REPORTS,
    ROOT,
    ask,
    load_questions,
    routing,
    share_right,
)
from training.facts import commands
from training.topics import fill, load_intents, words
from training.windows import conversations
from tui.plain import HELP

if TYPE_CHECKING:
    from collections.abc import Iterator

    from localds.model import Model
    from training.evaluate import Answer

LARGEST = 16_000_000


@pytest.fixture(scope="module")
def model(guide_path: Path) -> Iterator[Model]:
    with localds.load(guide_path) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def answers(model: Model) -> list[Answer]:
    return list(ask(model, load_questions(), temperature=0.0))


def test_is_a_small_deepseek_v3(guide_path: Path, model: Model) -> None:
    metadata, geometry = model.gguf.metadata, model.geometry
    assert guide_path.stat().st_size <= LARGEST
    assert geometry.architecture == "deepseek2"
    assert metadata["deepseek2.attention.q_lora_rank"] > 0
    assert metadata["deepseek2.expert_gating_func"] == 2  # sigmoid
    assert geometry.dense_layers == 1
    assert geometry.experts_shared == 1
    assert geometry.experts > geometry.experts_used > 1
    assert "blk.1.exp_probs_b.bias" in model.gguf.tensors
    assert model.gguf.tensors["blk.1.ffn_down_exps.weight"].type.name == "Q8_0"
    assert model.template.origin == "file"


def test_names_the_right_command_or_fact(answers: list[Answer]) -> None:
    wrong = [(a.question.text, a.reply) for a in answers if not a.right]
    assert share_right(answers) >= MUST_BE_RIGHT, wrong


def test_chat_takes_the_likeliest_token(model: Model) -> None:
    """So the answers below are those that a user gets."""
    assert recommended_sampling(model.gguf) == {"temperature": 0.0}


def test_every_expert_is_used(model: Model, answers: list[Answer]) -> None:
    shares = routing(model, answers)
    geometry = model.geometry
    assert list(shares) == list(range(geometry.dense_layers, geometry.layers))
    for layer, share in shares.items():
        assert share.mean() == pytest.approx(1)
        assert share.min() >= LEAST_SHARE, (layer, share)


def test_ends_its_replies(model: Model, answers: list[Answer]) -> None:
    """A model that has learned to stop says the token that ends a reply, not a cut-off sentence."""
    ended = [a.reply.rstrip()[-1:] in (".", "!", "?") for a in answers]
    assert np.mean(ended) > 0.98
    assert model.tokenizer.eos_ids


def test_the_evaluation_is_held_out() -> None:
    questions = load_questions()
    forms = Counter(question.form for question in questions)
    assert len(questions) >= 150
    assert min(forms[form] for form in ("plain", "short", "typos")) >= 50
    asked = {words(question.text) for question in questions}
    assert len(asked) == len(questions)
    known = set()
    for intent in load_intents():
        for phrase in (*intent.do, *intent.questions, *intent.short):
            known |= {words(fill(phrase, values)) for values in intent.fills}
    # There is one way only to ask with a single word.
    assert all(len(text) == 1 for text in asked & known)
    assert len(asked & known) < 0.04 * len(asked)


def test_what_it_was_told_is_what_localds_has() -> None:
    """Fails where a command or an option goes or is renamed: then the topics must follow."""
    known = {command.name for command in commands()}
    options = {name for c in commands() for option in c.options for name in option.names}
    options |= {"--help", "-h", "--version"}
    slashes = set(re.findall(r"/[a-z]+", HELP)) | {"/exit", "/quit"}
    for intent in load_intents():
        for answer in (fill(a, values) for a in intent.answers for values in intent.fills[:1]):
            code = re.findall(r"`([^`]+)`", answer)
            for text in code:
                for word in re.findall(r"\blocalds ([a-z]+)\b(?!\.)", text):
                    assert word in known | {"finetune"}, (intent.id, answer)
                if "localds" in text or text.startswith("-"):
                    for option in re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", text):
                        assert option in options, (intent.id, answer)
                if re.fullmatch(r"/[a-z]+( TEXT)?", text):
                    assert text.split()[0] in slashes, (intent.id, answer)


def test_the_report_is_on_this_file(guide_path: Path) -> None:
    digest = hashlib.sha256(guide_path.read_bytes()).hexdigest()
    assert digest in (ROOT / "docs" / "demo-model.md").read_text(encoding="utf-8")
    assert digest in (REPORTS / "replies.md").read_text(encoding="utf-8")


def test_chats_on_a_machine_with_nothing(tmp_path: Path) -> None:
    """No network, no models, no settings: it chats, says what it is, and how to get a real one."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    for name in ("CONFIG", "STATE", "CACHE"):
        environment[f"XDG_{name}_HOME"] = str(tmp_path / name.lower())
    done = subprocess.run(
        [sys.executable, "-P", "-m", "localds", "chat", "-p", "how do I download a model?"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "localds pull" in done.stdout
    first = done.stderr.splitlines()[0]
    assert "built-in demo" in first
    assert "localds pull v2-lite-chat" in first
    assert not list((tmp_path / "hf").rglob("*.gguf"))


def test_is_found_without_a_name(home: Path, guide_path: Path) -> None:
    assert home.exists()
    assert find_model().path == guide_path


def test_quantization_costs_what_it_should(guide_path: Path, model: Model, tmp_path: Path) -> None:
    """Perplexity of real text after real routing: fewer bits lose more, and a little at most."""
    windows = conversations(model, count=12, size=256)
    reference = perplexity(evaluate(model, windows).nll).value
    assert 1 < reference < 5
    divergence = {}
    for recipe in ("Q6_K", "Q4_K_M", "Q2_K"):
        path = tmp_path / f"{recipe}.gguf"
        convert(open_source(str(guide_path)), path, recipe=recipe)
        with localds.load(path) as quantized:
            scores = compare(evaluate(quantized, windows, model))
        divergence[recipe] = scores.mean_kl.value
        assert scores.reference_perplexity.value == pytest.approx(reference)
    assert divergence["Q6_K"] < divergence["Q4_K_M"] < divergence["Q2_K"]
