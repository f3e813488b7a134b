"""JSON files of a checkpoint, with checked access to their values."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


class CheckpointError(ValueError):
    """A source that is damaged, incomplete, or of a kind that convert does not know."""


class Config:
    """The values of config.json, with typed access. A JSON null counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = values
        self._where = where

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer. Raises `CheckpointError` if it is missing without default, or not one."""
        return int(self._get(key, default, int))

    def integers(self, key: str) -> list[int]:
        """A list of integers; a single one counts as a list."""
        value = self._get(key, None, int, list)
        return [int(item) for item in (value if isinstance(value, list) else [value])]

    def number(self, key: str, default: float | None = None) -> float:
        """A float (or an integer that stands for one)."""
        return float(self._get(key, default, int, float))

    def flag(self, key: str, *, default: bool | None = None) -> bool:
        """A boolean."""
        return bool(self._get(key, default, bool))

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        return str(self._get(key, default, str))

    def strings(self, key: str) -> list[str]:
        """A list of strings."""
        values: list[Any] = self._get(key, None, list)
        return [str(value) for value in values]

    def section(self, key: str) -> Config:
        """A nested object; an absent one is empty."""
        return Config(self._get(key, {}, dict), f"{self._where}: {key}")

    def merged(self, key: str) -> Config:
        """This config with the entries of a nested object on top."""
        values = {k: v for k, v in self._values.items() if k != key}
        return Config({**values, **self.section(key)._values}, f"{self._where}: {key}")

    def _get(self, key: str, default: object, *types: type) -> Any:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self._where}: {key} is missing; convert needs it")
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(kind.__name__ for kind in types)
            raise CheckpointError(f"{self._where}: {key} is {value!r}, expected {wanted}")
        return value


def language_model(config: Config) -> Config:
    """The config of a multimodal model's text part; any other config as it is."""
    if "text_config" not in config:
        return config
    return config.merged("text_config")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `CheckpointError` if the file is missing or holds no object."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is this a whole checkpoint?") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
