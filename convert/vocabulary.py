"""The tokenizer that goes into a GGUF file: byte-level BPE from a checkpoint's tokenizer.json."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convert.checkpoint import CheckpointError, read_json

if TYPE_CHECKING:
    from pathlib import Path

    from convert.checkpoint import Config

# Token types of `tokenizer.ggml.token_type`.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# Added tokens of this form act as control tokens even where tokenizer.json does not say so.
CONTROL_FORM = re.compile(r"<[|\uff5c].*[|\uff5c]>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A byte-level BPE vocabulary. `pre` names the splitter that runs before the merges."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    bos_id: int
    eos_id: int
    chat_template: str | None


def read_vocabulary(folder: Path, config: Config, pre: str) -> Vocabulary:
    """Read tokenizer.json, padded with unused tokens up to the config's vocab_size.

    Raises `CheckpointError` if it is missing, damaged, not byte-level BPE, or has ids beyond
    vocab_size.
    """
    path = folder / "tokenizer.json"
    data = read_json(path)
    try:
        model, added = data["model"], data.get("added_tokens", [])
        ids = {int(index): str(token) for token, index in model["vocab"].items()}
        merges = [_merge(merge) for merge in model["merges"]]
        byte_fallback = bool(model.get("byte_fallback"))
        ids |= {int(token["id"]): str(token["content"]) for token in added}
        types = {int(token["id"]): _added_type(token) for token in added}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a BPE tokenizer ({error!r})") from None
    if byte_fallback:
        raise CheckpointError(
            f"{path}: a SentencePiece vocabulary (byte_fallback); convert reads byte-level BPE"
        )
    size = config.integer("vocab_size")
    if max(ids, default=-1) >= size:
        raise CheckpointError(f"{path}: token id {max(ids)} is beyond vocab_size {size}")
    return Vocabulary(
        pre=pre,
        tokens=[ids.get(index, f"[PAD{index}]") for index in range(size)],
        types=[types.get(index, NORMAL if index in ids else UNUSED) for index in range(size)],
        merges=merges,
        bos_id=config.integer("bos_token_id"),
        eos_id=config.integers("eos_token_id")[0],
        chat_template=_chat_template(folder),
    )


def _merge(merge: str | list[str]) -> str:
    """Newer tokenizer.json files hold pairs, older ones the joined form that GGUF wants."""
    return merge if isinstance(merge, str) else " ".join(merge)


def _added_type(token: dict[str, Any]) -> int:
    if token.get("special") or CONTROL_FORM.fullmatch(token["content"]):
        return CONTROL
    return USER_DEFINED


def _chat_template(folder: Path) -> str | None:
    """The template of tokenizer_config.json, which beats the one in a file of its own."""
    config, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    stored = read_json(config).get("chat_template") if config.exists() else None
    if isinstance(stored, str):
        return stored
    return template.read_text(encoding="utf-8") if template.exists() else None
