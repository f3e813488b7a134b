"""A checkpoint's model card (README.md) and sampling defaults, as `general.*` keys."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from convert.config import CheckpointError, read_json
from convert.model_name import parse_name, title

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from convert.source import Value

Card = dict[str, Any]

# The card's entries for each key of `general.`, the first that is there counts.
_ENTRIES = {
    "name": ("name", "model_name"),
    "author": ("author", "model_author", "model_creator"),
    "version": ("version", "model_version"),
    "organization": ("organization", "model_organization"),
    "description": ("description", "model_description"),
    "finetune": ("finetune", "model_finetune"),
    "basename": ("basename", "model_basename", "model_type"),
    "size_label": ("size_label", "model_size_label"),
    "source.url": ("url", "model_url"),
    "source.doi": ("doi", "model_doi"),
    "source.uuid": ("uuid", "model_uuid"),
    "source.repo_url": ("repo_url", "model_repo_url"),
    "license": ("license",),
    "license.name": ("license_name",),
    "license.link": ("license_link",),
}
_LISTS = {"tags": ("tags", "pipeline_tag"), "languages": ("languages", "language")}
_RELATIONS = {
    "base_model": ("base_model", "base_models", "base_model_sources"),
    "dataset": ("datasets", "dataset", "dataset_sources"),
}
_RELATION_KEYS = (
    *("name", "author", "version", "organization", "description"),
    *("url", "doi", "uuid", "repo_url"),
)
_HUB_ADDRESS = re.compile(r"https?://huggingface\.co/([^/]+/[^/]+)$")

# generation_config.json's entries for each key of `general.sampling.`.
_SAMPLING: dict[str, tuple[type, tuple[str, ...]]] = {
    "sequence": (str, ("sequence",)),
    "top_k": (np.int32, ("top_k",)),
    "top_p": (float, ("top_p",)),
    "min_p": (float, ("min_p",)),
    "xtc_probability": (float, ("xtc_probability",)),
    "xtc_threshold": (float, ("xtc_threshold",)),
    "temp": (float, ("temperature",)),
    "penalty_last_n": (np.int32, ("penalty_last_n",)),
    "penalty_repeat": (float, ("penalty_repeat", "repetition_penalty")),
    "mirostat": (np.int32, ("mirostat",)),
    "mirostat_tau": (float, ("mirostat_tau",)),
    "mirostat_eta": (float, ("mirostat_eta",)),
}


def read_card(folder: Path) -> Card:
    """The YAML front matter of README.md; empty where there is none.

    Raises `CheckpointError` if it is not valid YAML.
    """
    path = folder / "README.md"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if lines[:1] != ["---"]:
        return {}
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    text = "\n".join([*lines[1:end], ""]).replace("\t", "  ")
    # Norwegian, which YAML would take for the opposite of yes.
    text = text.replace("- no\n", '- "no"\n')
    try:
        card = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{path}: its front matter is not valid YAML ({error})") from None
    return card if isinstance(card, dict) else {}


def card_metadata(card: Card, parameters: int) -> dict[str, Value]:
    """The card's `general.*` keys. `parameters` is how many the model has."""
    keys: dict[str, Value] = {}
    for key, names in _ENTRIES.items():
        value = next((card[name] for name in names if card.get(name) is not None), None)
        if value is not None:
            keys[key] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    for key, names in _LISTS.items():
        if items := [str(item) for name in names for item in _as_list(card.get(name))]:
            keys[key] = items
    for key, names in _RELATIONS.items():
        name = next((name for name in names if name in card), None)
        if name is not None:
            keys |= _relations(key, _as_list(card[name]), parameters)
    return {f"general.{key}": value for key, value in keys.items()}


def sampling_metadata(folder: Path) -> dict[str, Value]:
    """The `general.sampling.*` keys, from generation_config.json where there is one."""
    path = folder / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    keys: dict[str, Value] = {}
    for key, (kind, names) in _SAMPLING.items():
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if value is None:
            continue
        if not isinstance(value, str if kind is str else (int, float)):
            raise CheckpointError(f"{path}: {key} is {value!r}; correct or remove it")
        keys[f"general.sampling.{key}"] = kind(value)
    return keys


def _relations(key: str, entries: list[Any], parameters: int) -> dict[str, Value]:
    """Models or data sets that this one was made from."""
    keys: dict[str, Value] = {f"{key}.count": len(entries)}
    for index, entry in enumerate(entries):
        facts: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
        if isinstance(entry, str):
            facts = _identify(entry, parameters)
        for fact in _RELATION_KEYS:
            if facts.get(fact) is not None:
                keys[f"{key}.{index}.{fact}"] = str(facts[fact])
    return keys


def _identify(reference: str, parameters: int) -> dict[str, str | None]:
    """What the name or address of a model or data set says."""
    if reference.startswith(("http://", "https://", "ssh://")):
        on_hub = _HUB_ADDRESS.match(reference)
        named = _identify(on_hub[1], parameters) if on_hub else {}
        return {**named, "repo_url": reference}
    name = asdict(parse_name(reference, parameters))
    owner, full = name["organization"], name["full"]
    return {
        "name": title(full),
        "organization": title(owner) if owner is not None else None,
        "version": name["version"],
        "repo_url": f"https://huggingface.co/{owner}/{full}" if owner is not None else None,
    }


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
