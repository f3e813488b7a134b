"""Checkpoints on the disk: one safetensors file each, there whole or not at all."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from localds.finetune.loop.errors import TrainingError
from localds.gguf.write import replaced

if TYPE_CHECKING:
    from pathlib import Path

_FORMAT = 1
_KEY = "localds"


def checkpoint_path(folder: Path, step: int) -> Path:
    """The checkpoint after `step` steps."""
    return folder / f"step-{step:08}.safetensors"


def best_path(folder: Path, step: int) -> Path:
    """The parameters after `step` steps, kept because an evaluation found them the best."""
    return folder / f"best-{step:08}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def write(path: Path, tensors: dict[str, mx.array], facts: dict[str, Any]) -> None:
    """Write arrays, and facts as JSON in the header; `path` is replaced once all is on the disk.

    Raises `TrainingError` where the disk refuses.
    """
    header = {"format": _FORMAT, "order": list(tensors), **facts}
    try:
        with replaced(path) as stream:
            mx.save_safetensors(stream, tensors, {_KEY: json.dumps(header)})
    except OSError as error:
        raise TrainingError(
            f"checkpoint {path} could not be written: {error.strerror or error}; free space, then "
            "resume from the checkpoint before it"
        ) from error


def read(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays in the order in which they were written, and the facts.

    Raises `TrainingError` for a file that is no checkpoint or is damaged.
    """
    arrays, facts = _open(path)
    try:
        tensors = {name: arrays[name] for name in facts["order"]}
        mx.eval(tensors)
    except (RuntimeError, KeyError) as error:
        raise _damaged(path, error) from error
    return tensors, facts


def _open(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays, not read yet, and the facts."""
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        facts = json.loads(loaded[1][_KEY])
        version = facts["format"]
    except (RuntimeError, KeyError, ValueError, OSError) as error:
        raise _damaged(path, error) from error
    if version != _FORMAT:
        raise TrainingError(
            f"checkpoint {path} has format {version}, this version reads {_FORMAT}; train "
            "again, or resume with the version that wrote it"
        )
    return loaded[0], facts


def _damaged(path: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"checkpoint {path} cannot be read ({error}); delete it to resume from the one before"
    )


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest checkpoints, and the best parameters that none of them names."""
    saved = checkpoints(folder)
    for path in saved[:-keep]:
        path.unlink()
    named = {_best_file(path) for path in saved[-keep:]}
    for path in folder.glob("best-*.safetensors"):
        if path.name not in named:
            path.unlink()


def _best_file(path: Path) -> str | None:
    best = _open(path)[1]["counters"]["best"]
    return best["file"] if best else None


def remove_partial(folder: Path) -> None:
    """Delete what a killed run left half written."""
    for path in folder.glob("*.safetensors.part"):
        path.unlink()
