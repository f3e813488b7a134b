"""Random post-processors and settings for special tokens, agreeing or not."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from checkpoints import added_token
from tokenizer_files import write_json

if TYPE_CHECKING:
    from pathlib import Path

SPECIAL_CASES = 120
SPECIAL_TEXTS = ["<s>", "</s>", "<sep>", "<turn>"]
ROLES = ["bos", "eos", "unk", "sep", "pad", "cls", "mask"]


def write_special_case(index: int, folder: Path) -> dict[str, Any]:
    """Write tokenizer.json, tokenizer_config.json and config.json; return the last."""
    random = Random(index)
    processors: list[dict[str, Any]] = []
    if random.random() < 0.3:
        processors.append({"type": "ByteLevel"})
    if random.random() < 0.8:
        processors.append(_template(random))
    post = {"type": "Sequence", "processors": processors} if processors else None
    added = [added_token(i, text) for i, text in enumerate(SPECIAL_TEXTS)]
    write_json(folder / "tokenizer.json", {"added_tokens": added, "post_processor": post})
    chosen: dict[str, Any] = {f"{role}_token": _token(random) for role in ROLES}
    chosen |= {f"add_{role}_token": random.choice([None, True, False]) for role in ROLES}
    write_json(folder / "tokenizer_config.json", chosen if random.random() < 0.8 else {})
    config = {f"{role}_token_id": random.choice([None, 0, 2]) for role in ROLES}
    config["eos_token_id"] = 1
    write_json(folder / "config.json", config)
    return config


def _token(random: Random) -> str | None:
    return random.choice([None, None, *SPECIAL_TEXTS])


def _template(random: Random) -> dict[str, Any]:
    def part(text: str | None) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": text, "type_id": 0}}] if text else []

    texts = [[{"Sequence": {"id": name, "type_id": 0}}] for name in "AB"]
    first, last = _token(random), _token(random)
    middle = [item for _ in range(random.choice([0, 1, 2])) for item in part(_token(random))]
    return {
        "type": "TemplateProcessing",
        "single": [*part(first), *texts[0], *part(last)],
        "pair": [*part(first), *texts[0], *middle, *texts[1], *part(last)],
    }
