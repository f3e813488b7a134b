"""Where localds keeps its own files, and the model that was chatted with last."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

_APP = "localds"


def config_folder() -> Path:
    """What the user writes: `models.toml`."""
    return platformdirs.user_config_path(_APP, appauthor=False)


def cache_folder() -> Path:
    """What may be deleted at any time."""
    return platformdirs.user_cache_path(_APP, appauthor=False)


def state_folder() -> Path:
    """What localds remembers from run to run."""
    return platformdirs.user_state_path(_APP, appauthor=False)


@dataclass(frozen=True, slots=True)
class LastUsed:
    """A model file (of a split one, the first part) and what it is called."""

    path: Path
    title: str


def last_used() -> LastUsed | None:
    """The model remembered last; None where there is none, or what was written is unreadable."""
    try:
        state = json.loads(_state_file().read_text(encoding="utf-8"))
        path, title = state["path"], state["title"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if not isinstance(path, str) or not isinstance(title, str) or "\0" in path:
        return None
    return LastUsed(Path(path), title)


def remember(model: LastUsed) -> None:
    """Write down the model used last. Where that is not possible, it is forgotten."""
    try:
        write_whole(_state_file(), json.dumps(asdict(model), default=str))
    except OSError:
        return


def write_whole(path: Path, text: str) -> None:
    """Replace the file `path` at once: whoever reads it finds the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _state_file() -> Path:
    return state_folder() / "last-model.json"
