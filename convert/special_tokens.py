"""Special tokens, what is added around a text, and chat templates, as `tokenizer.*` keys.

They come from tokenizer_config.json, tokenizer.json's post-processor and config.json, in the order
of precedence of llama.cpp's converter, so that both write the same.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from convert.config import CheckpointError, read_json

if TYPE_CHECKING:
    from pathlib import Path

    from convert.config import Config
    from convert.source import Value

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# GGUF has no place for `cls`, which only stands in for a missing bos.
_KEYS = {
    **{role: role for role in ("bos", "eos", "eot", "eom", "mask")},
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
}
_ADDED = ("bos", "eos", "sep")
_TEMPLATE_NAME = frozenset(string.ascii_letters + string.digits)
# Where nothing else names these roles, GLM's tokens have them.
_GLM_TOKENS = {
    "bos": "[gMASK]",
    "eot": "<|user|>",
    "unk": "<|endoftext|>",
    "eom": "<|observation|>",
}


@dataclass
class _Roles:
    """Texts of the tokens by role, and whether they are put around a text (`add`)."""

    texts: dict[str, str]
    add: dict[str, bool] = field(default_factory=dict)


def special_metadata(
    folder: Path, config: Config, n_vocab: int, *, glm: bool = False
) -> dict[str, Value]:
    """The keys for special tokens and templates of a vocabulary of `n_vocab` tokens.

    Raises `CheckpointError` for an id outside of the vocabulary, or where no token ends a text.
    """
    tokenizer = _optional_json(folder / "tokenizer.json")
    settings = _optional_json(folder / "tokenizer_config.json")
    roles = _Roles({role: _content(settings.get(f"{role}_token")) for role in _ROLES})
    roles.texts = {role: text for role, text in roles.texts.items() if text}
    if tokenizer:
        _follow_processor(roles, tokenizer, has_settings=bool(settings))
    for role in _ROLES:
        flag = settings.get(f"add_{role}_token")
        if isinstance(flag, bool):
            roles.add.setdefault(role, flag)
    known = {token["content"]: token["id"] for token in reversed(tokenizer.get("added_tokens", []))}
    ids = {role: known[text] for role, text in roles.texts.items() if settings and text in known}
    for role in _ROLES:
        key = f"{role}_token_id"
        part = config if key in config else config.section("text_config")
        stated = part.integers(key) if key in part else []
        # Of several ends of text the first is the one; the others are found by their texts.
        if stated and (len(stated) == 1 or role == "eos"):
            ids.setdefault(role, stated[0])
    if glm:
        ids = {role: known[text] for role, text in _GLM_TOKENS.items() if text in known} | ids
    _check_ids(ids, n_vocab, folder)
    keys: dict[str, Value] = {
        f"tokenizer.ggml.{_KEYS[role]}_token_id": ids[role] for role in _KEYS if role in ids
    }
    keys |= {
        f"tokenizer.ggml.add_{role}_token": roles.add[role] for role in _ADDED if role in roles.add
    }
    return keys | template_metadata(folder, settings)


def template_metadata(folder: Path, settings: dict[str, Any]) -> dict[str, Value]:
    """The chat templates: those of tokenizer_config.json, or else those in files of their own."""
    stored = settings.get("chat_template") if "chat_template" in settings else _stored(folder)
    choices = [{"name": "default", "template": stored}] if isinstance(stored, str) else stored or []
    keys: dict[str, Value] = {}
    names = []
    for choice in choices:
        name = "".join(c if c in _TEMPLATE_NAME else "_" for c in str(choice.get("name", "")))
        if not name or choice.get("template") is None:
            continue
        if name != "default":
            names.append(name)
        suffix = "" if name == "default" else f".{name}"
        keys[f"tokenizer.chat_template{suffix}"] = str(choice["template"])
    if names:
        keys["tokenizer.chat_templates"] = names
    return keys


def _stored(folder: Path) -> Any:
    """Templates in files: chat_template.jinja with companions, or chat_template.json."""
    template = folder / "chat_template.jinja"
    if not template.is_file():
        return _optional_json(folder / "chat_template.json").get("chat_template")
    files = [template, *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    return [
        {
            "name": "default" if file is template else file.stem,
            "template": file.read_text(encoding="utf-8"),
        }
        for file in files
    ]


def _follow_processor(roles: _Roles, tokenizer: dict[str, Any], *, has_settings: bool) -> None:
    """What tokenizer.json puts around a text beats what tokenizer_config.json says."""
    for role, stand_in in (("bos", "cls"), ("eos", "sep")):
        if stand_in in roles.texts:
            roles.texts.setdefault(role, roles.texts[stand_in])
    processor = tokenizer.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "ByteLevel":
            roles.add.setdefault("bos", False)
            roles.add.setdefault("eos", False)
        elif step.get("type") == "TemplateProcessing":
            _follow_template(roles, step, has_settings=has_settings)


def _follow_template(roles: _Roles, step: dict[str, Any], *, has_settings: bool) -> None:
    single = [_special(part) for part in step.get("single", [])]
    first, last = (single[0], single[-1]) if len(single) > 1 else (None, None)
    if first:
        if first not in (roles.texts.get("bos"), roles.texts.get("cls")):
            for role in ("bos", "cls") if has_settings else ("bos",):
                roles.texts.setdefault(role, first)
        roles.add["bos"] = first in (roles.texts.get("bos"), roles.texts.get("cls"))
    if last:
        if has_settings and roles.texts.get("eos", last) != last:
            # The config's end of text ends a turn, if the processor puts another one.
            roles.texts["eom" if "eot" in roles.texts else "eot"] = roles.texts["eos"]
        roles.texts["eos"] = last
        roles.add["eos"] = True
    _follow_pair(roles, step.get("pair", []), first, last, has_settings=has_settings)


def _follow_pair(
    roles: _Roles, pair: list[Any], first: str | None, last: str | None, *, has_settings: bool
) -> None:
    """A token between the two texts of a pair is a separator if it is known as one."""
    if pair and first and _special(pair[0]) == first:
        pair = pair[1:]
    if pair and last and _special(pair[-1]) == last:
        pair = pair[:-1]
    ends = [part.get("Sequence", {}).get("id") for part in (*pair[:1], *pair[-1:])]
    middle = [_special(part) for part in pair[1:-1]]
    if ends != ["A", "B"] or not middle:
        return
    separators = {roles.texts.get("sep"), roles.texts.get("eos")} - {None}
    found = (middle[0] in separators and not last) or (len(middle) == 2 and middle[1] in separators)
    roles.add["sep"] = found
    if found and has_settings and "eos" in roles.texts:
        roles.texts.setdefault("sep", roles.texts["eos"])


def _special(part: dict[str, Any]) -> str | None:
    token = part.get("SpecialToken", {}).get("id")
    return token if isinstance(token, str) else None


def _content(entry: Any) -> str:
    """A token's text, given as such or as an object; empty where there is none."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else ""


def _check_ids(ids: dict[str, int], n_vocab: int, folder: Path) -> None:
    for role, index in ids.items():
        if not 0 <= index < n_vocab:
            raise CheckpointError(
                f"{folder}: {role}_token_id is {index}, outside of the {n_vocab} tokens; "
                "correct it in config.json or tokenizer_config.json"
            )
    if "eos" not in ids:
        raise CheckpointError(
            f"{folder}: no token ends a text; name eos_token in tokenizer_config.json "
            "or eos_token_id in config.json"
        )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
