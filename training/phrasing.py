"""How people put a question: frames, other words, haste and typing mistakes."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

from training.topics import fill

if TYPE_CHECKING:
    from random import Random

    from training.topics import Intent

# Shares of utterances that are treated in each way.
SYNONYMS, BEFORE, AFTER, TELEGRAPHIC = 0.35, 0.12, 0.10, 0.10
LOWER, UPPER, NO_END, NO_MARKS, EXTRA_MARKS = 0.6, 0.04, 0.5, 0.15, 0.04

# Shares of utterances with wrong keys and with words that the writer cannot spell, and of those
# words in these utterances.
TYPOS, BAD_SPELLERS, MISSPELLED = 0.3, 0.3, 0.5

HELD_OUT_ONE_IN = 12
"""Of the phrasings, which are kept out of training to choose by; the evaluation has its own."""

_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_NEIGHBOURS = {
    key: "".join(row[max(i - 1, 0) : i] + row[i + 1 : i + 2])
    for row in _KEYS
    for i, key in enumerate(row)
}
# Commands, options and names with digits are no words.
_WORD = re.compile(r"(?<![\w./:-])[A-Za-z']+(?![\w./:-])")
_SMALL_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "do",
        "does",
        "did",
        "i",
        "is",
        "am",
        "are",
        "be",
        "to",
        "of",
        "my",
        "me",
        "it",
        "its",
        "this",
        "that",
        "can",
        "could",
        "would",
        "should",
        "you",
        "please",
        "there",
        "in",
        "on",
        "for",
        "with",
        "and",
        "so",
        "just",
    ]
)


class Phraser:
    """Makes utterances of intents; the arguments are the contents of the topics' files."""

    def __init__(self, frames: dict[str, Any], misspellings: dict[str, list[str]]) -> None:
        self._misspellings = misspellings
        self._how: list[str] = frames["how"]
        self._before: list[str] = frames["before"]
        self._after: list[str] = frames["after"]
        self._synonyms = {
            re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])", re.IGNORECASE): others
            for word, others in frames["synonyms"].items()
        }

    def utter(
        self, intent: Intent, rng: Random, values: dict[str, str], *, held_out: bool = False
    ) -> str:
        """One way to ask for `intent`, from its held-out phrasings or from the others."""
        text = fill(self._phrase(intent, rng, held_out), values)
        if rng.random() < SYNONYMS:
            text = self._reword(text, rng)
        if rng.random() < BEFORE:
            text = rng.choice(self._before) + text
        if rng.random() < AFTER:
            text = text.rstrip("?.! ") + rng.choice(self._after)
        text = _hurry(text, rng)
        if rng.random() < BAD_SPELLERS:
            text = self._misspell(text, rng)
        return text

    def _misspell(self, text: str, rng: Random) -> str:
        def write(match: re.Match[str]) -> str:
            ways = self._misspellings.get(match[0].lower())
            return rng.choice(ways) if ways and rng.random() < MISSPELLED else match[0]

        return _WORD.sub(write, text)

    def _phrase(self, intent: Intent, rng: Random, held_out: bool) -> str:
        kinds = {
            "do": [p for p in intent.do if _is_held_out(p) == held_out],
            "questions": [p for p in intent.questions if _is_held_out(p) == held_out],
            "short": [p for p in intent.short if _is_held_out(p) == held_out],
        }
        shares = {"do": 0.35, "questions": 0.45, "short": 0.2}
        present = [kind for kind, phrases in kinds.items() if phrases]
        if not present:  # too few phrasings to keep any out
            return rng.choice([*intent.do, *intent.questions, *intent.short])
        kind = rng.choices(present, [shares[kind] for kind in present])[0]
        phrase = rng.choice(kinds[kind])
        return rng.choice(self._how).replace("{do}", phrase) if kind == "do" else phrase

    def _reword(self, text: str, rng: Random) -> str:
        matching = [pattern for pattern in self._synonyms if pattern.search(text)]
        for pattern in rng.sample(matching, min(len(matching), rng.randint(1, 2))):
            other = rng.choice(self._synonyms[pattern])
            text = pattern.sub(lambda _, other=other: other, text, count=1)
        return text


def _is_held_out(phrase: str) -> bool:
    digest = hashlib.sha256(phrase.casefold().encode()).digest()
    return digest[0] % HELD_OUT_ONE_IN == 0


def _hurry(text: str, rng: Random) -> str:
    """Small letters, missing marks and words, wrong keys: as people type."""
    if rng.random() < TELEGRAPHIC:
        kept = [word for word in text.split() if word.lower() not in _SMALL_WORDS]
        text = " ".join(kept) if len(kept) > 1 else text
    case = rng.random()
    if case < LOWER:
        text = text.lower()
    elif case < LOWER + UPPER:
        text = text.upper()
    if rng.random() < NO_END:
        text = text.rstrip("?.! ") or text
    elif rng.random() < EXTRA_MARKS:
        text += rng.choice(["??", "!!", "...", " ???", "!"])
    if rng.random() < NO_MARKS:
        text = re.sub(r"(?<=\w)'(?=\w)|,(?= )", "", text)
    if rng.random() < TYPOS:
        for _ in range(rng.choice([1, 1, 1, 2, 2, 3])):
            text = _mistype(text, rng)
    return text


def _mistype(text: str, rng: Random) -> str:
    """One mistake in a word of letters; commands, options and names with digits stay whole."""
    words = [
        (m.start(), m.end()) for m in re.finditer(r"(?<![\w./:-])[A-Za-z]{3,}(?![\w.:/-])", text)
    ]
    if not words:
        return text
    start, end = rng.choices(words, [end - start for start, end in words])[0]
    at = rng.randrange(start, end)
    before, letter, after = text[:at], text[at], text[at + 1 :]
    match rng.randrange(6):
        case 0:  # two letters change places
            return before + after[:1] + letter + after[1:] if at + 1 < end else text
        case 1 | 2:
            return before + after
        case 3:
            return before + letter + letter + after
        case 4:
            near = _NEIGHBOURS[letter.lower()]
            return before + rng.choice(near) + after
        case _:  # the space behind the word is lost, or stands one letter early
            return text[:end] + text[end + 1 :] if rng.random() < 0.5 else _split(text, at, start)


def _split(text: str, at: int, start: int) -> str:
    return f"{text[:at]} {text[at:]}" if at > start else text
