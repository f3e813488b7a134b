"""Conversations to train on: endless, seeded, cut to any length."""

from __future__ import annotations

import re
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from training.phrasing import Phraser
from training.topics import fill, load_frames, load_intents, load_misspellings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"

# Shares of conversations with a system prompt, of questions with words cut into unusual tokens, of
# the words in these, and of the user's tokens that count in the loss: mostly the guide learns what
# to say, a little how to read.
SYSTEM, LOOSE, CUT_WORDS, USER_LOSS = 0.06, 0.3, 0.2, 0.1

# What is answered shows in the first tokens; the rest is quickly known by heart. So most answers
# are cut off, and the time goes to more questions. Nothing is learned from where they are cut.
CUT, CUT_TOKENS = 0.9, (4, 10)
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are the guide to localds.",
    "Answer briefly.",
    "You are a patient teacher.",
    "You help people with their computers.",
)


class Dialogues:
    """Draws questions with their answers, and whole conversations."""

    def __init__(self) -> None:
        self.intents = load_intents()
        self._weights = [intent.weight for intent in self.intents]
        self._phraser = Phraser(load_frames(), load_misspellings())

    def turn(self, rng: Random, *, held_out: bool = False) -> tuple[str, str]:
        """A question and its answer."""
        intent = rng.choices(self.intents, self._weights)[0]
        values = rng.choice(intent.fills)
        question = self._phraser.utter(intent, rng, values, held_out=held_out)
        return question, fill(rng.choice(intent.answers), values)

    def texts(self, rng: Random, count: int) -> Iterator[str]:
        """Questions and answers, for the tokenizer to be trained on."""
        for _ in range(count):
            yield from self.turn(rng)


class Encoder:
    """Turns conversations into tokens; questions are sometimes cut otherwise than they would be.

    Such cuts look like misspelled words to the model, as those of BPE dropout do (arXiv
    1910.13267), but come from the seed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bos, self.eos, self.user, self.assistant = map(
            tokenizer.token_to_id, (BOS, EOS, USER, ASSISTANT)
        )
        self.plain = lru_cache(maxsize=1 << 14)(self._encode)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def loose(self, text: str, rng: Random) -> list[int]:
        """The tokens of `text` with some words cut in two before they are encoded."""
        ids: list[int] = []
        start = 0
        for match in re.finditer(r"\w{4,}", text):
            if rng.random() < CUT_WORDS:
                end = rng.randrange(match.start() + 1, match.end())
                ids += self._encode(text[start:end])
                start = end
        return ids + self._encode(text[start:])


def conversation(
    dialogues: Dialogues, encoder: Encoder, rng: Random, length: int, *, held_out: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Inputs and targets [length]; a target of -1 does not count.

    Turns follow each other until there is no more room, the last may be cut.
    """
    ids = [encoder.bos]
    counts = [False]
    if rng.random() < SYSTEM:
        system = encoder.plain(rng.choice(_SYSTEM_PROMPTS))
        ids += system
        counts += [False] * len(system)
    while len(ids) <= length:
        question, answer = dialogues.turn(rng, held_out=held_out)
        loose = not held_out and rng.random() < LOOSE
        cut = encoder.loose(question, rng) if loose else encoder.plain(question)
        asked = [encoder.user, *cut, encoder.assistant]
        said = [*encoder.plain(answer), encoder.eos]
        if not held_out and rng.random() < CUT:
            said = said[: rng.randint(*CUT_TOKENS)]
        ids += asked + said
        read = [not held_out and rng.random() < USER_LOSS for _ in asked]
        read[0] = False  # where an answer was cut, no question follows in truth
        counts += read + [True] * len(said)
    tokens = np.array(ids[: length + 1], np.int64)
    return tokens[:-1], np.where(counts[1 : length + 1], tokens[1:], -1)


def batch(
    dialogues: Dialogues,
    encoder: Encoder,
    seed: str,
    rows: int,
    length: int,
    *,
    held_out: bool = False,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`rows` conversations, the same for the same seed: inputs and targets [rows, length]."""
    rng = Random(seed)
    pairs = [conversation(dialogues, encoder, rng, length, held_out=held_out) for _ in range(rows)]
    inputs, targets = zip(*pairs, strict=True)
    return np.stack(inputs), np.stack(targets)
