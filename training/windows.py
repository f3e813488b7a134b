"""Conversations with the guide as windows of tokens: real text for tests and measurements."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import numpy as np

from localds.prompt import encode_prompt
from localds.windows import Windows
from training.dialogues import Dialogues

if TYPE_CHECKING:
    from localds.model import Model


def conversations(model: Model, count: int, size: int, seed: int = 7) -> Windows:
    """`count` conversations of `size` tokens on phrasings that were kept out of training."""
    dialogues, rng = Dialogues(), Random(seed)
    windows = [_tokens(model, dialogues, rng, size) for _ in range(count)]
    tokens = np.array(windows, np.int32)
    return Windows(tokens, tokens)


def _tokens(model: Model, dialogues: Dialogues, rng: Random, size: int) -> list[int]:
    messages: list[dict[str, str]] = []
    while True:
        question, answer = dialogues.turn(rng, held_out=True)
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        options = {"add_generation_prompt": False}
        ids = encode_prompt(model.tokenizer, model.template, messages, options).ids
        if len(ids) >= size:
            return ids[:size]
