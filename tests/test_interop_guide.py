"""The model in the box in llama.cpp: trained weights, real routing, real text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from divergence import mean_kl
from llama_cpp import find_llama_cpp

import localds
from localds.prompt import encode_prompt
from training.evaluate import load_questions
from training.windows import conversations

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.interop

QUESTIONS = 20
GENERATE = 32
NEAR_TIE = 1e-2
MEAN_KL = 1e-3


def test_the_guide_says_the_same_in_llama_cpp(guide_path: Path, tmp_path: Path) -> None:
    llama_cpp = find_llama_cpp(tmp_path)
    path = tmp_path / "guide.gguf"
    path.symlink_to(guide_path)
    with localds.load(path) as model:
        words = model.geometry.vocabulary
        for question in load_questions()[:: len(load_questions()) // QUESTIONS]:
            messages = [{"role": "user", "content": question.text}]
            ids = encode_prompt(model.tokenizer, model.template, messages, {}).ids
            theirs = llama_cpp.logits(path, ids, GENERATE, words)
            greedy = theirs[len(ids) - 1 : -1].argmax(axis=1).tolist()
            ours = model.logits([*ids, *greedy])
            top_two = np.sort(theirs, axis=1)[:, -2:]
            clear = top_two[:, 1] - top_two[:, 0] > NEAR_TIE
            np.testing.assert_array_equal(
                ours.argmax(axis=1)[clear], theirs.argmax(axis=1)[clear], err_msg=question.text
            )


def test_predictions_on_conversations(guide_path: Path, tmp_path: Path) -> None:
    llama_cpp = find_llama_cpp(tmp_path)
    path = tmp_path / "guide.gguf"
    path.symlink_to(guide_path)
    with localds.load(path) as model:
        divergence = []
        for ids in conversations(model, count=4, size=512).tokens:
            theirs = llama_cpp.logits(path, ids.tolist(), 1, model.geometry.vocabulary)
            divergence.append(mean_kl(theirs, model.logits(ids)))
    print(f"mean KL {np.mean(divergence):.1e}")
    assert np.mean(divergence) < MEAN_KL
