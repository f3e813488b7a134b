"""The tokenizer that goes into a GGUF file: byte-level BPE from a checkpoint's tokenizer.json."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convert.checkpoint import CheckpointError, Config

if TYPE_CHECKING:
    from pathlib import Path

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

    Raises `CheckpointError` if it is missing, damaged, no BPE, or has ids beyond vocab_size.
    """
    path = folder / "tokenizer.json"
    try:
        data = json.loads(path.read_bytes())
        model, added = data["model"], data.get("added_tokens", [])
        ids = {int(index): str(token) for token, index in model["vocab"].items()}
        merges = [_merge(merge) for merge in model["merges"]]
        ids |= {int(token["id"]): str(token["content"]) for token in added}
        types = {int(token["id"]): _added_type(token) for token in added}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; convert needs it") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a BPE tokenizer ({error!r})") from None
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
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return None
    template = json.loads(path.read_bytes()).get("chat_template")
    return template if isinstance(template, str) else None
