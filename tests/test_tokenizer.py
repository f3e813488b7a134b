"""Tokenizers built from GGUF vocabularies give the ids of the models' own libraries."""

# ruff: noqa: RUF001

from __future__ import annotations

import json
import re
import time
import unicodedata
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiktoken
import tokenizers
import vocabularies as v
from corpus import CORPUS, messy_text
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from localds.gguf import GGUFError
from localds.pretokenizers import _CASED, SPLITTINGS
from localds.tokenizer import Tokenizer, TokenizerError

if TYPE_CHECKING:
    from pathlib import Path

BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER = "<\uff5cUser\uff5c>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabularies")


@pytest.fixture(scope="module")
def deepseek(folder: Path) -> Tokenizer:
    return v.tokenizer_of(folder, v.deepseek_metadata())


@pytest.fixture(scope="module")
def deepseek_library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(v.DEEPSEEK_JSON))


@pytest.fixture(scope="module")
def deepseek_plain_library() -> tokenizers.Tokenizer:
    """The library taking every token that GGUF calls control for plain text."""
    source = json.loads(v.DEEPSEEK_JSON.read_text(encoding="utf-8"))
    for added in source["added_tokens"]:
        added["special"] = v.is_control(added)
    library = tokenizers.Tokenizer.from_str(json.dumps(source))
    library.encode_special_tokens = True
    return library


@pytest.fixture(scope="module")
def mixtral(folder: Path) -> Tokenizer:
    return v.tokenizer_of(folder, v.mixtral_metadata())


@pytest.fixture(scope="module")
def mixtral_library() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(v.MIXTRAL_MODEL))


# DeepSeek-V3


def test_deepseek_ids_are_the_library_s(
    deepseek: Tokenizer, deepseek_library: tokenizers.Tokenizer
) -> None:
    for text in CORPUS:
        wanted = deepseek_library.encode(text, add_special_tokens=False).ids
        assert deepseek.encode(text, special=True, bos=False) == wanted, text


def test_deepseek_plain_ids_are_the_library_s(
    deepseek: Tokenizer, deepseek_plain_library: tokenizers.Tokenizer
) -> None:
    for text in CORPUS:
        assert deepseek.encode(text, bos=False) == deepseek_plain_library.encode(text).ids, text


@settings(max_examples=300, deadline=None)
@given(text=messy_text)
def test_deepseek_ids_are_the_library_s_on_anything(
    deepseek: Tokenizer,
    deepseek_library: tokenizers.Tokenizer,
    deepseek_plain_library: tokenizers.Tokenizer,
    text: str,
) -> None:
    assert deepseek.encode(text, special=True, bos=False) == deepseek_library.encode(text).ids
    ids = deepseek.encode(text, bos=False)
    assert ids == deepseek_plain_library.encode(text).ids
    assert deepseek.decode(ids) == text


def test_deepseek_special_tokens_only_where_asked(
    deepseek: Tokenizer, deepseek_library: tokenizers.Tokenizer
) -> None:
    text = f"{BOS}{USER}What is {EOS}?<\uff5cAssistant\uff5c><think>\n"
    ids = deepseek_library.encode(text, add_special_tokens=False).ids
    assert deepseek.encode(text, special=True) == ids
    plain = deepseek.encode(text)
    assert plain[0] == deepseek.bos_id == 0
    assert not {0, 1, deepseek.token_id(USER)} & set(plain[1:])
    # A user-defined token always counts.
    assert deepseek.token_id("<think>") in plain
    assert deepseek.decode(plain[1:]) == text


def test_deepseek_bos(deepseek: Tokenizer) -> None:
    hi = deepseek.encode("Hi", bos=False)
    assert deepseek.encode("Hi") == deepseek.encode("Hi", bos=True) == [0, *hi]
    assert deepseek.encode(f"{BOS}Hi", special=True) == [0, *hi]
    assert deepseek.encode(f"{BOS}Hi", special=True, bos=True) == [0, 0, *hi]
    assert deepseek.bos_text == BOS
    assert deepseek.eos_text == EOS
    assert deepseek.eos_ids == {1, deepseek.token_id("<|EOT|>")}
    assert deepseek.n_vocab == 129280


def test_deepseek_loads_within_half_a_second(folder: Path) -> None:
    gguf = v.gguf_of(folder, v.deepseek_metadata())
    gguf.strings("tokenizer.ggml.tokens")
    gguf.strings("tokenizer.ggml.merges")
    # The processor's time: other programs may be running.
    taken = []
    for _ in range(3):
        started = time.process_time()
        Tokenizer.from_gguf(gguf)
        taken.append(time.process_time() - started)
    assert min(taken) < 0.5


# Mixtral


def test_mixtral_ids_are_the_library_s(
    mixtral: Tokenizer, mixtral_library: SentencePieceProcessor
) -> None:
    for text in CORPUS:
        wanted = mixtral_library.EncodeAsIds(text)
        assert mixtral.encode(text, bos=False) == wanted, text


@settings(max_examples=300, deadline=None)
@given(text=messy_text)
def test_mixtral_ids_are_the_library_s_on_anything(
    mixtral: Tokenizer, mixtral_library: SentencePieceProcessor, text: str
) -> None:
    ids = mixtral.encode(text, bos=False)
    assert ids == mixtral_library.EncodeAsIds(text)
    # The library cannot tell a space from its own stand-in.
    assert mixtral.decode(ids) == text.replace("\u2581", " ")
    assert mixtral.decode(ids) == mixtral_library.DecodeIds(ids)


def test_mixtral_special_tokens_only_where_asked(
    mixtral: Tokenizer, mixtral_library: SentencePieceProcessor
) -> None:
    text = "<s>[INST] Hi [/INST] Hello</s>[INST] Bye [/INST]"
    wanted = [
        1,
        *mixtral_library.EncodeAsIds("[INST] Hi [/INST] Hello"),
        2,
        *mixtral_library.EncodeAsIds("[INST] Bye [/INST]"),
    ]
    assert mixtral.encode(text, special=True) == wanted
    assert mixtral.encode(text) == [1, *mixtral_library.EncodeAsIds(text)]
    assert mixtral.decode(wanted) == "[INST] Hi [/INST] Hello [INST] Bye [/INST]"
    assert (mixtral.bos_id, mixtral.eos_ids, mixtral.bos_text) == (1, {2}, "<s>")


def test_mixtral_leading_space(mixtral: Tokenizer) -> None:
    ids = mixtral.encode("time", bos=False)
    assert mixtral.decode(ids) == "time"
    # What continues a text keeps its space.
    stream = mixtral.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == " time"


def test_without_a_space_prefix(folder: Path) -> None:
    metadata = {**v.mixtral_metadata(), "tokenizer.ggml.add_space_prefix": False}
    tokenizer = v.tokenizer_of(folder, metadata)
    ids = tokenizer.encode("time flies", bos=False)
    assert tokenizer.token_text(ids[0]) == "time"
    assert tokenizer.decode(ids) == "time flies"
    assert tokenizer.decode(tokenizer.encode(" time", bos=False)) == " time"


# Streaming


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 129_279), max_size=30), special=st.booleans())
def test_deepseek_streams_what_it_decodes(
    deepseek: Tokenizer, ids: list[int], special: bool
) -> None:
    assert_streams(deepseek, ids, special)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 31_999), st.integers(3, 258)), max_size=30))
def test_mixtral_streams_what_it_decodes(mixtral: Tokenizer, ids: list[int]) -> None:
    assert_streams(mixtral, ids, special=False)


def assert_streams(tokenizer: Tokenizer, ids: list[int], special: bool) -> None:
    """Pieces add up to the text that the bytes are."""
    stream = tokenizer.stream(special=special)
    pieces = [*map(stream.push, ids), stream.flush()]
    hidden = set() if special else set(map(tokenizer.token_id, tokenizer.special_texts))
    data = b"".join(tokenizer.token_bytes(i) for i in ids if i not in hidden)
    assert "".join(pieces) == data.decode("utf-8", "replace")
    assert "".join(pieces) == tokenizer.decode(ids, special=special, start=False)


def test_a_character_comes_out_whole(deepseek: Tokenizer, mixtral: Tokenizer) -> None:
    for tokenizer in (deepseek, mixtral):
        text = "👩\u200d🚀𝔸ก็"
        stream = tokenizer.stream(start=True)
        ids = tokenizer.encode(text, bos=False)
        pieces = [stream.push(i) for i in ids]
        assert len(ids) > len(text)
        assert "" in pieces
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == text


def test_bytes_that_are_no_text_become_replacement_characters_when_that_is_certain(
    mixtral: Tokenizer,
) -> None:
    byte = {value: mixtral.token_id(f"<0x{value:02X}>") for value in range(256)}
    stream = mixtral.stream()
    # E2 82 AC is the euro sign; AC alone and a cut E2 82 are nothing.
    steps = [(0xE2, ""), (0x82, ""), (0xAC, "€"), (0xAC, "\ufffd"), (0xE2, ""), (0x82, "")]
    assert [stream.push(byte[value] or 0) for value, _ in steps] == [text for _, text in steps]
    assert stream.push(byte[0x41] or 0) == "\ufffdA"
    assert stream.push(byte[0xF0] or 0) == ""
    assert stream.flush() == "\ufffd"


# Other ways of splitting

LETTER = r"[^\r\n\p{L}\p{N}]?"
REFERENCES = {
    # tokenization_kimi.py
    "kimi-k2": "|".join(
        [
            r"[\p{Han}]+",
            LETTER + r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            LETTER + r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
    # tokenizer.json of GLM-4 and Llama 3
    "glm4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # tekken.json
    "tekken": v.tekken()[0],
}


@pytest.fixture(scope="module", params=list(REFERENCES))
def pair(request: pytest.FixtureRequest, folder: Path) -> tuple[Tokenizer, tiktoken.Encoding]:
    """Our tokenizer and tiktoken, which has a regex engine and merge loop of its own."""
    pre: str = request.param
    ours = v.tokenizer_of(folder, v.rank_metadata(pre))
    reference = tiktoken.Encoding(
        pre, pat_str=REFERENCES[pre], mergeable_ranks=v.tekken()[1], special_tokens={}
    )
    return ours, reference


def test_ids_are_tiktoken_s(pair: tuple[Tokenizer, tiktoken.Encoding]) -> None:
    ours, reference = pair
    for text in CORPUS:
        assert ours.encode(text) == reference.encode_ordinary(text), text
        assert ours.decode(ours.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(text=messy_text)
def test_ids_are_tiktoken_s_on_anything(
    pair: tuple[Tokenizer, tiktoken.Encoding], text: str
) -> None:
    ours, reference = pair
    assert ours.encode(text) == reference.encode_ordinary(text)


def test_written_merges_do_as_well_as_those_made_from_ranks(folder: Path) -> None:
    ranks = v.tekken()[1]
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1 and rank < 2000:
            left, right = last_merge(token, ranks)
            merges.append(f"{v.byte_level(left)} {v.byte_level(right)}")
    small = {token: rank for token, rank in ranks.items() if rank < 2000}
    tokens = [v.byte_level(token) for token in sorted(small, key=small.__getitem__)]
    ours = v.tokenizer_of(folder, v.bpe_metadata(tokens, merges, pre="tekken"))
    reference = tiktoken.Encoding(
        "small", pat_str=REFERENCES["tekken"], mergeable_ranks=small, special_tokens={}
    )
    for text in CORPUS:
        assert ours.encode(text) == reference.encode_ordinary(text), text


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that a token is made of, by merging its bytes while the rank stays lower."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        rank, i = min(
            (ranks.get(parts[i] + parts[i + 1], 1 << 30), i) for i in range(len(parts) - 1)
        )
        assert rank < ranks[token]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


BYTES = [v.byte_level(bytes([byte])) for byte in range(256)]


@pytest.mark.parametrize(
    ("pre", "text", "wanted"),
    [
        # Digits singly, spaces before letters and punctuation only, lines and CJK apart.
        ("deepseek-llm", "Hello  world", "Hello| | world"),
        ("deepseek-llm", "x = 1234;\r\n", "x| =| |1|2|3|4|;|\r|\n"),
        ("deepseek-llm", "你好world안녕", "你好|world|안녕"),
        ("deepseek-llm", "it's «ж» ¡ß", "it|'|s| «|ж|» ¡|ß"),
        # The class for CJK begins at U+0800 and takes what others have joined apart again.
        ("deepseek-llm", "一，。b ", "一|，|。|b| "),
        ("deepseek-llm", "‘a’ \u1f7d\u2126\u10d0ж", "‘|a|’| |\u1f7d\u2126|\u10d0|ж"),
        ("deepseek-llm", "a\n\n\tb  \n", "a|\n|\n|\tb|  |\n"),
        # Up to three digits from the left; ASCII punctuation may lead ASCII letters.
        ("deepseek-v3", "12345 a", "123|45| a"),
        ("deepseek-v3", "foo(bar)_baz", "foo|(bar|)_|baz"),
        ("deepseek-v3", "漢字カナABC", "漢字カナ|ABC"),
        ("deepseek-v3", "e\u0301a  b\n\n c", "e\u0301a| | b|\n\n| c"),
        ("gpt-2", "I'll  say 2023!", "I|'ll| | say| 2023|!"),
        ("gpt-2", "a\n\nb  ", "a|\n|\n|b|  "),
    ],
)
def test_splits(pre: str, text: str, wanted: str) -> None:
    pieces = SPLITTINGS[pre].build().pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == wanted.split("|")


def test_cased_letters_of_deepseek_llm_are_cased() -> None:
    inside = re.compile(f"[{_CASED}]")
    cased = {chr(i) for i in range(0x20000) if unicodedata.category(chr(i)) in {"Lu", "Ll", "Lt"}}
    assert all(letter in cased for letter in map(chr, range(0x20000)) if inside.match(letter))
    # Latin, Greek and Cyrillic are complete.
    assert all(inside.match(letter) for letter in cased if letter < "\u0530")


# Special tokens


def special_metadata(**more: Any) -> dict[str, Any]:
    tokens = [*BYTES, "<a>", "<ab>", "<a", "  ", "<think>", "</think>", "<end>", "[PAD]"]
    types = [v.NORMAL] * 256 + [v.CONTROL] * 2 + [v.USER_DEFINED] * 2
    types += [v.CONTROL] * 3 + [v.UNUSED]
    return v.bpe_metadata(tokens, [], types, **more)


def test_the_longest_token_matches_first(folder: Path) -> None:
    tokenizer = v.tokenizer_of(folder, special_metadata())
    texts = [tokenizer.token_text(i) for i in tokenizer.encode("<ab><a> <a   <a", special=True)]
    assert texts == ["<ab>", "<a>", "Ġ", "<a", "  ", "Ġ", "<a"]
    texts = [tokenizer.token_text(i) for i in tokenizer.encode("<ab><a>")]
    assert texts == ["<a", "b", ">", "<a", ">"]
    assert set(tokenizer.special_texts) == {"<a>", "<ab>", "<think>", "</think>", "<end>"}


def test_control_tokens_have_no_text_but_think_tags_do(folder: Path) -> None:
    tokenizer = v.tokenizer_of(folder, special_metadata())
    ids = tokenizer.encode("<think>x</think>y<end>", special=True)
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "<think>x</think>y"
    assert tokenizer.decode(ids, special=True) == "<think>x</think>y<end>"
    pad = tokenizer.token_id("[PAD]")
    assert pad is not None
    assert tokenizer.decode([pad], special=True) == ""


def test_parts_join_where_no_special_token_divides_them(deepseek: Tokenizer) -> None:
    parts = [(USER, True), ("never", False), ("theless", True), (f" {USER}", False)]
    user = deepseek.encode(USER, special=True, bos=False)
    rest = deepseek.encode(f"nevertheless {USER}", bos=False)
    assert deepseek.encode_parts(parts, bos=False) == [*user, *rest]
    assert len(user) == 1


def test_turns_end_with_every_end_token(folder: Path) -> None:
    tokens = [*BYTES, "<eos>", "<|im_end|>", "<|user|>", "[EOS]"]
    types = [v.NORMAL] * 256 + [v.CONTROL] * 3 + [v.NORMAL]
    ids = {"eos_token_id": 256, "eot_token_id": 7, "eom_token_id": 8}
    tokenizer = v.tokenizer_of(folder, v.bpe_metadata(tokens, [], types, **ids))
    assert tokenizer.eos_ids == {256, 257, 258, 7, 8}


def test_a_text_that_spells_a_control_token_is_not_looked_up_whole(folder: Path) -> None:
    tokens = [*BYTES, "secret", "word"]
    types = [v.NORMAL] * 256 + [v.CONTROL, v.NORMAL]
    tokenizer = v.tokenizer_of(folder, v.bpe_metadata(tokens, [], types, pre="glm4"))
    assert tokenizer.encode("secret") == [BYTES.index(char) for char in "secret"]
    assert tokenizer.encode("word") == [257]
    assert tokenizer.encode("secret", special=True) == [256]


def test_bos_as_the_file_or_the_family_says(folder: Path) -> None:
    def first(**keys: Any) -> int:
        metadata = v.bpe_metadata(BYTES, [], bos_token_id=9, **keys)
        return v.tokenizer_of(folder, metadata).encode("A")[0]

    letter = BYTES.index("A")
    assert first() == letter
    assert first(add_bos_token=True) == 9
    assert first(pre="tekken") == 9
    assert first(pre="tekken", add_bos_token=False) == letter
    without = v.tokenizer_of(folder, v.bpe_metadata(BYTES, [], add_bos_token=True))
    assert without.encode("A") == [letter]
    with pytest.raises(TokenizerError, match="no bos token"):
        without.encode("A", bos=True)


def test_lone_surrogates_become_replacement_characters(deepseek: Tokenizer) -> None:
    assert deepseek.decode(deepseek.encode("a\ud800b", bos=False)) == "a\ufffdb"
    assert deepseek.decode(deepseek.encode("\ud83d\ude00", bos=False)) == "😀"


def test_a_missing_byte_is_an_error_only_where_it_is_needed(folder: Path) -> None:
    tokenizer = v.tokenizer_of(folder, v.bpe_metadata(BYTES[:0x61], []))
    assert tokenizer.encode("ABC") == [0x41, 0x42, 0x43]
    with pytest.raises(TokenizerError, match="0x62"):
        tokenizer.encode("Ab")


def test_ids_outside_the_vocabulary_are_refused(deepseek: Tokenizer) -> None:
    for token in (-1, 129280):
        with pytest.raises(TokenizerError, match="outside the vocabulary of 129280"):
            deepseek.decode([token])


# Files that make no sense


def spm(**changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary of bytes and a few letters, with changes; None removes a key."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b"]
    values = {
        "model": "llama",
        "tokens": tokens,
        "scores": np.arange(len(tokens), dtype=np.float32),
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * 3, np.int32),
        **changes,
    }
    return {f"tokenizer.ggml.{k}": value for k, value in values.items() if value is not None}


def changed(**changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary, with changes; None removes a key."""
    metadata = v.bpe_metadata(BYTES, ["a b"])
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


AB = [*BYTES, "ab"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (changed(model="wordpiece"), "'wordpiece'.*gpt2, llama"),
        (changed(model=None), "tokenizer.ggml.model"),
        (changed(pre="banana"), "'banana'.*deepseek-llm, deepseek-v3, kimi-k2, glm4"),
        (changed(pre=None), "tokenizer.ggml.pre"),
        (changed(), "merges do not fit"),
        (changed(tokens=[]), "tokens is empty"),
        (changed(tokens=None), "tokenizer.ggml.tokens"),
        (
            changed(tokens=[*BYTES, "A"], token_type=None),
            "tokens 65 and 256 are both 'A'|tokens 32 and 256",
        ),
        (changed(tokens=AB, token_type=None, merges=["ab"]), "holds 'ab'"),
        (changed(tokens=AB, token_type=None, merges=["a b c"]), "holds 'a b c'"),
        (changed(tokens=AB, token_type=None, merges=[" ab"]), "holds ' ab'"),
        (changed(tokens=AB, token_type=None, merges=["a "]), "holds 'a '"),
        (changed(tokens=AB, token_type=None, merges=None), "merges is missing"),
        (changed(tokens=AB, token_type=None, merges=["x yz"]), "merges do not fit"),
        (changed(tokens=AB, token_type=None, merges=7), "merges"),
        (changed(tokens=AB, token_type=np.ones(256, np.int32)), "256 items for 257 tokens"),
        (changed(tokens=AB, token_type=np.full(257, 9, np.int32)), "holds 9"),
        (changed(tokens=AB, token_type=["x"]), "token_type"),
        (changed(tokens=AB, token_type=None, bos_token_id=257), "bos_token_id is 257"),
        (
            changed(tokens=AB, token_type=None, eos_token_id=v.ggufs.Typed("i32", -1)),
            "eos_token_id is -1",
        ),
        (changed(tokens=AB, token_type=None, eot_token_id=1.5), "eot_token_id"),
        (changed(tokens=AB, token_type=None, add_bos_token=1), "add_bos_token"),
        (spm(scores=None), "scores is missing"),
        (spm(scores=np.zeros(7, np.float32)), "shorter than the 262"),
        (spm(scores=np.zeros(262, np.int32)), "scores"),
        (spm(scores=np.full(262, np.nan, np.float32)), "not finite"),
        (spm(tokens=["", *spm()["tokenizer.ggml.tokens"][1:]]), "SentencePiece refuses"),
        (spm(token_type=np.full(262, 2, np.int32)), "SentencePiece refuses"),
        (spm(token_type=np.full(262, 6, np.int32)), "SentencePiece refuses"),
        (spm(token_type=np.array([2, *[6] * 5, *[1] * 256], np.int32)), "SentencePiece refuses"),
    ],
)
def test_nonsense_is_an_error_that_says_what_is_wrong(
    folder: Path, metadata: dict[str, Any], message: str
) -> None:
    gguf = v.gguf_of(folder, metadata)
    with pytest.raises((TokenizerError, GGUFError), match=message):
        Tokenizer.from_gguf(gguf)


def test_the_small_vocabularies_are_good_as_they_stand(folder: Path) -> None:
    assert v.tokenizer_of(folder, spm()).encode("ab", bos=False) == [259, 260, 261]
    assert v.tokenizer_of(folder, changed(tokens=AB, token_type=None)).encode("ab") == [256]
    untyped = v.tokenizer_of(folder, changed(tokens=AB, token_type=None))
    assert untyped.encode("ab") == [256]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_vocabularies_load_and_round_trip_or_are_refused(
    folder: Path, data: st.DataObject
) -> None:
    text = st.text("ab <>\u2581\u0120\u00e9\ud800"[:-1], max_size=3)
    tokens = data.draw(st.lists(text, max_size=12))
    tokens = data.draw(st.sampled_from([tokens, BYTES + tokens]))
    keys = {
        "model": data.draw(st.sampled_from(["gpt2", "llama"])),
        "merges": data.draw(st.lists(st.text("ab ", max_size=4), max_size=4)),
        "scores": np.array(
            data.draw(st.lists(st.floats(width=32), min_size=280, max_size=280))
            if data.draw(st.booleans())
            else [0.0] * 280,
            np.float32,
        ),
        "token_type": np.array(
            data.draw(st.lists(st.integers(0, 7), min_size=280, max_size=280)), np.int32
        ),
        "bos_token_id": data.draw(st.integers(0, 300)),
    }
    metadata = v.bpe_metadata(
        tokens, **{"merges": None, **{k: keys[k] for k in keys if k != "token_type"}}
    )
    metadata["tokenizer.ggml.token_type"] = keys["token_type"]
    try:
        tokenizer = v.tokenizer_of(folder, metadata)
        ids = tokenizer.encode("ab <a> b\u00e9", special=True)
    except (TokenizerError, GGUFError):
        return
    assert all(0 <= i < tokenizer.n_vocab for i in ids)
    tokenizer.decode(range(tokenizer.n_vocab))
