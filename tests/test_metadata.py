"""Metadata of converted checkpoints, beside what llama.cpp's converter writes for the same ones.

`tests/golden/metadata` holds its keys, types and values, made by `make_metadata_golden.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_cases import CASES, GOLDEN_METADATA, our_metadata, write_case
from special_cases import SPECIAL_CASES, SPECIAL_TEXTS, write_special_case
from tokenizer_files import write_json

from convert.config import CheckpointError, Config
from convert.general import general_metadata
from convert.model_name import ModelName, parse_name, size_label, title
from convert.special_tokens import special_metadata


@pytest.mark.parametrize("name", CASES)
def test_keys_of_llama_cpp(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    theirs = json.loads((GOLDEN_METADATA / f"{name}.json").read_text(encoding="utf-8"))
    assert our_metadata(case, write_case(case, tmp_path)) == theirs | case.ours


# Names and cards, beside the gguf package's own reader


WORDS = ["DeepSeek", "V2", "v3.1", "Lite", "Chat", "16B", "8x7B", "A3B", "7b1", "mini", "instruct"]
WORDS += [
    "0324",
    "32K",
    "q4_k",
    "fp16",
    "bf16",
    "LoRA",
    "vision",
    "1.5b",
    "xl",
    "iter2",
    "4bit",
    "",
]


@settings(max_examples=400, derandomize=True)
@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=6),
    st.sampled_from(["", "acme/", "./"]),
    st.sampled_from([0, 200_000, 7_000_000_000, 16_000_000_000]),
)
def test_names(words: list[str], owner: str, parameters: int) -> None:
    name = owner + "-".join(words)
    full, organization, basename, finetune, version, size = gguf.Metadata.get_model_id_components(
        name, parameters
    )
    assert parse_name(name, parameters) == ModelName(
        full, organization, basename, size, finetune, version
    )
    assert title(full) == gguf.Metadata.id_to_title(full)


@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize("count", [1, 950, 12_345, 999_499, 1e6, 5.55e9, 9.96e9, 671e9, 2e12])
def test_size_labels(count: float, experts: int) -> None:
    expected = gguf.size_label(int(count), int(count), 7, experts)
    assert size_label(int(count), 7 if experts else 0, experts) == expected


def test_name_in_the_config_and_in_the_cache(tmp_path: Path) -> None:
    """Hub folders are named by commit, which is no model's name."""
    folder = tmp_path / "models--acme--Thing-7B-Chat" / "snapshots" / "abc123"
    keys = general_metadata(folder, Config({}), [], None, None)
    assert keys["general.name"] == "Thing 7B Chat"
    assert keys["general.organization"] == "Acme"
    assert keys["localds.source"] == "acme/Thing-7B-Chat"
    assert keys["localds.revision"] == "abc123"
    assert keys["general.source.repo_url"] == "https://huggingface.co/acme/Thing-7B-Chat"
    keys = general_metadata(tmp_path, Config({"_name_or_path": "x/Mine-3B"}), [], None, "main")
    assert keys["general.name"] == "Mine 3B"
    assert keys["localds.source"] == tmp_path.name
    assert keys["localds.revision"] == "main"
    assert "general.source.repo_url" not in keys


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("README.md", "---\na: [\n---\n", "README.md: its front matter is not valid YAML"),
        ("generation_config.json", '{"top_k": "many"}', "top_k is 'many'"),
        ("generation_config.json", "{", "not valid JSON"),
    ],
)
def test_broken_card(file: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        general_metadata(tmp_path, Config({}), [], None, None)


# Special tokens


@pytest.mark.parametrize("index", range(SPECIAL_CASES))
def test_special_tokens_of_llama_cpp(index: int, tmp_path: Path) -> None:
    """Templates and settings of every kind, agreeing or not."""
    theirs = json.loads((GOLDEN_METADATA / "special_tokens.json").read_text(encoding="utf-8"))
    config = write_special_case(index, tmp_path)
    keys = special_metadata(tmp_path, Config(config), len(SPECIAL_TEXTS))
    assert {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()} == theirs[
        index
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token_id": 7}, "eos_token_id is 7, outside of the 4 tokens"),
        ({"bos_token_id": 0}, "no token ends a text"),
    ],
)
def test_broken_special_tokens(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        special_metadata(tmp_path, Config(config), 4)


def test_first_of_several_ends(tmp_path: Path) -> None:
    keys = special_metadata(tmp_path, Config({"eos_token_id": [3, 2]}), 4)
    assert keys == {"tokenizer.ggml.eos_token_id": 3}


def test_where_templates_come_from(tmp_path: Path) -> None:
    """Settings beat files, chat_template.jinja beats chat_template.json, companions have names."""
    config = Config({"eos_token_id": 1})

    def templates() -> dict[str, Any]:
        keys = special_metadata(tmp_path, config, 4)
        return {key: value for key, value in keys.items() if "template" in key}

    write_json(tmp_path / "chat_template.json", {"chat_template": "json"})
    assert templates() == {"tokenizer.chat_template": "json"}
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert templates() == {"tokenizer.chat_template": "jinja"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag-x.jinja").write_text("rag")
    assert templates() == {
        "tokenizer.chat_template": "jinja",
        "tokenizer.chat_template.rag_x": "rag",
        "tokenizer.chat_templates": ["rag_x"],
    }
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "settings"})
    assert templates() == {"tokenizer.chat_template": "settings"}
