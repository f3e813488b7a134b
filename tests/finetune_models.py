"""Tokenizers and templates that training data is encoded with, and how to read the result."""

from __future__ import annotations

from functools import cache
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import vocabularies as v

from localds.catalog.resolve import DEMO
from localds.finetune.data import Encoder
from localds.finetune.data.records import read_record
from localds.gguf import GGUFFile
from localds.template import ChatTemplate, template_for
from localds.tokenizer import Tokenizer

if TYPE_CHECKING:
    from localds.finetune.data import Encoded


@cache
def guide() -> tuple[Tokenizer, ChatTemplate]:
    gguf = GGUFFile.open(DEMO)
    tokenizer = Tokenizer.from_gguf(gguf)
    return tokenizer, template_for(gguf, tokenizer)


@cache
def deepseek() -> Tokenizer:
    with TemporaryDirectory() as folder:
        return v.tokenizer_of(Path(folder), v.deepseek_metadata())


@cache
def mixtral() -> Tokenizer:
    with TemporaryDirectory() as folder:
        return v.tokenizer_of(Path(folder), v.mixtral_metadata())


@cache
def template(source: str, bos: str, eos: str) -> ChatTemplate:
    return ChatTemplate(source, bos, eos)


def encoder(tokenizer: Tokenizer, source: str | None = None, **options: Any) -> Encoder:
    """An encoder with a template's `source`; the guide's where there is none."""
    chosen = template(source, tokenizer.bos_text, tokenizer.eos_text) if source else guide()[1]
    return Encoder(tokenizer, chosen, **{"length": 4096, **options})


def encode(encoder: Encoder, record: dict[str, Any]) -> list[Encoded]:
    return encoder.encode(read_record(record))


def spelled(tokenizer: Tokenizer, example: Encoded) -> list[tuple[bool, str]]:
    """The example as stretches of text, each with whether it is trained."""
    assert example.ids.dtype == "int32"
    assert example.ids.shape == example.trained.shape
    pairs = zip(example.trained.tolist(), example.ids.tolist(), strict=True)
    return [
        (trained, tokenizer.decode([i for _, i in run], special=True, start=False))
        for trained, run in groupby(pairs, key=lambda pair: pair[0])
    ]


def taught(tokenizer: Tokenizer, example: Encoded) -> list[str]:
    """The stretches that are trained."""
    return [text for trained, text in spelled(tokenizer, example) if trained]
