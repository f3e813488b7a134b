"""The guide's tokenizer: byte-level BPE, cut like DeepSeek-V3's, trained on the dialogues."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

from localds.pretokenizers import SPLITTINGS
from training.dialogues import ASSISTANT, BOS, EOS, USER

if TYPE_CHECKING:
    from pathlib import Path

    from training.dialogues import Dialogues

SPLITTING = "deepseek-v3"
SPECIAL = (BOS, EOS, USER, ASSISTANT)
_TURNS = 60_000
_DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/results.md", "docs/refuted.md")


def train_tokenizer(dialogues: Dialogues, root: Path, words: int, seed: int) -> Tokenizer:
    """A tokenizer of `words` tokens, from dialogues and the documents below `root`.

    The documents are what a person may paste; they are few beside the dialogues.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = SPLITTINGS[SPLITTING].build()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        min_frequency=2,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = [(root / name).read_text(encoding="utf-8") for name in _DOCUMENTS]
    texts = [*documents, *dialogues.texts(Random(f"tokenizer/{seed}"), _TURNS)]
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != words:
        raise ValueError(
            f"the dialogues give {tokenizer.get_vocab_size()} tokens, not {words}; ask for fewer"
        )
    return tokenizer
