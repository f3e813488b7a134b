"""Checkpoints on the Hugging Face hub: finding out what to fetch, and fetching it once.

Files land in the hub library's own cache, where other programs find them, and where a file that is
complete stays when a download is interrupted. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
work as everywhere.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from convert.checkpoint import INDEX, SINGLE, CheckpointError, weight_map
from localds.hub.cache import shortage
from localds.hub.errors import UNREACHABLE, describe, explain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DESCRIPTIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "README.md",
)
"""What a conversion reads besides the weights."""

# The library resumes within a file as long as the program runs, but a program that starts anew
# begins with whole files: few at once means little to fetch twice.
FILES_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A checkpoint in the cache: its folder, and what it is called on the hub."""

    folder: Path
    repository: str
    revision: str


def fetch(
    repository: str, revision: str | None = None, check: Callable[[Path], None] = lambda _: None
) -> Snapshot:
    """Download the checkpoint `repository` ("owner/name") as far as it is not there yet.

    `revision` is a branch, a tag or a commit. `check` is called with the folder when all but the
    weights are there, and may raise. Without a connection, what the cache holds is taken. Raises
    `CheckpointError` if there is no such checkpoint, no access, or no room.
    """
    try:
        return _fetch(repository, revision, check)
    except (HfHubHTTPError, HFValidationError) as error:
        problem = explain(error, repository, revision, nearby="no such folder or file here, and ")
        raise CheckpointError(str(problem)) from None


def _fetch(repository: str, revision: str | None, check: Callable[[Path], None]) -> Snapshot:
    try:
        info = HfApi().model_info(repository, revision=revision)
    except HfHubHTTPError:
        raise
    except UNREACHABLE as error:
        return _cached(repository, revision, error)
    commit = info.sha or revision or constants.DEFAULT_REVISION
    names = [sibling.rfilename for sibling in info.siblings or []]
    descriptions, weights = _descriptions(names), _weights(repository, commit, names)
    try:
        _check_room(repository, commit, descriptions + weights)
        check(_download(repository, revision, descriptions))
        folder = _download(repository, revision, weights)
    except HfHubHTTPError:
        raise
    except UNREACHABLE as error:
        raise CheckpointError(
            f"{repository}: the download stopped ({describe(error)}); "
            "run the same command again, the files that are complete are kept"
        ) from None
    return Snapshot(folder, repository, folder.name)


def _download(repository: str, revision: str | None, names: list[str]) -> Path:
    # By the name that was given, so that the cache knows it when there is no connection.
    folder = snapshot_download(
        repository, revision=revision, allow_patterns=names, max_workers=FILES_AT_ONCE
    )
    return Path(folder)


def _descriptions(names: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in DESCRIPTIONS)]


def _weights(repository: str, commit: str, names: Sequence[str]) -> list[str]:
    """The safetensors files: those of the index, or the single one."""
    if INDEX in names:
        index = Path(hf_hub_download(repository, INDEX, revision=commit))
        files = sorted(set(weight_map(index).values()))
        absent = [file for file in files if file not in names]
        if absent:
            raise CheckpointError(
                f"{repository}: {absent[0]} is listed in {INDEX}, but is not in the repository"
            )
        return [INDEX, *files]
    if SINGLE in names:
        return [SINGLE]
    raise CheckpointError(
        f"{repository}: neither {SINGLE} nor {INDEX} is in the repository; "
        "convert reads safetensors only"
    )


def _check_room(repository: str, commit: str, wanted: list[str]) -> None:
    files = snapshot_download(repository, revision=commit, allow_patterns=wanted, dry_run=True)
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    short = shortage(needed)
    if short:
        raise CheckpointError(f"{repository}: {short}")


def _cached(repository: str, revision: str | None, problem: Exception) -> Snapshot:
    """What the cache holds; whether it is complete shows when it is opened."""
    try:
        folder = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns="config.json", local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repository}: cannot reach {constants.ENDPOINT} ({describe(problem)}), and "
            f"{constants.HF_HUB_CACHE} holds no copy; go online, or give a folder"
        ) from None
    return Snapshot(folder, repository, folder.name)
