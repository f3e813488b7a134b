"""Checks of what the metadata mean, after the container itself was found to be sound."""

from __future__ import annotations

from typing import Final

import numpy as np

from localds.gguf.metadata import StringArray, TypedMetadata

MAX_LAYERS: Final = 512
MAX_EXPERTS: Final = 1024


def validate(gguf: TypedMetadata) -> None:
    """Check vocabulary, special tokens, layers and experts; raises `GGUFError` naming the key.

    Files without these keys (adapters, importance matrices) pass.
    """
    _check_vocabulary(gguf)
    architecture = gguf.text("general.architecture", None)
    if architecture is not None:
        _check_layers(gguf, architecture)
        _check_experts(gguf, architecture)


def _check_vocabulary(gguf: TypedMetadata) -> None:
    tokens = _string_count(gguf, "tokenizer.ggml.tokens")
    _string_count(gguf, "tokenizer.ggml.merges")
    if tokens is None:
        return
    _check_token_property(gguf, "tokenizer.ggml.token_type", "iu", tokens)
    _check_token_property(gguf, "tokenizer.ggml.scores", "f", tokens)
    for key in gguf.metadata:
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            token = gguf.integer(key)
            if not 0 <= token < tokens:
                raise gguf.wrong(key, f"is {token}, beyond the {tokens} tokens of the vocabulary")


def _string_count(gguf: TypedMetadata, key: str) -> int | None:
    """Length of an array of strings, without decoding it."""
    entry = gguf.metadata.entries.get(key)
    if entry is None:
        return None
    if not isinstance(entry.value, StringArray):
        raise gguf.wrong(key, f"is {entry.kind}, expected an array of strings")
    return len(entry.value)


def _check_token_property(gguf: TypedMetadata, key: str, dtype_kinds: str, tokens: int) -> None:
    entry = gguf.metadata.entries.get(key)
    if entry is None:
        return
    if not isinstance(entry.value, np.ndarray) or entry.value.dtype.kind not in dtype_kinds:
        expected = "floats" if dtype_kinds == "f" else "integers"
        raise gguf.wrong(key, f"is {entry.kind}, expected an array of {expected}")
    if len(entry.value) < tokens:
        raise gguf.wrong(key, f"has {len(entry.value)} items for {tokens} tokens")


def _check_layers(gguf: TypedMetadata, architecture: str) -> None:
    key = f"{architecture}.block_count"
    layers = gguf.integer(key, 0)
    if not 0 <= layers <= MAX_LAYERS:
        raise gguf.wrong(key, f"is {layers}, at most {MAX_LAYERS} layers are possible")


def _check_experts(gguf: TypedMetadata, architecture: str) -> None:
    key = f"{architecture}.expert_count"
    experts = gguf.integer(key, 0)
    if not 0 <= experts <= MAX_EXPERTS:
        raise gguf.wrong(key, f"is {experts}, at most {MAX_EXPERTS} experts are possible")
    used_key = f"{architecture}.expert_used_count"
    for used in gguf.integers(used_key, []):
        if not 0 <= used <= experts:
            raise gguf.wrong(used_key, f"is {used}, of {experts} experts")
