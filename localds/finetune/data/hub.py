"""Data sets on the model hub: which of their files are JSON, and fetching these."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Final

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from localds import __version__
from localds.finetune.data.errors import DataError
from localds.hub import cache
from localds.hub.errors import FAILURES, HubError, NoConnectionError, explain
from localds.hub.listing import Listing

if TYPE_CHECKING:
    from collections.abc import Iterable

_SUFFIXES: Final = (".jsonl", ".json")
_TIMEOUT: Final = 30.0
_NOT_DATA: Final = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def fetch_data_set(name: str, pattern: str | None = None) -> tuple[Path, list[str]]:
    """Download the JSON files of the data set `name` ("owner/name") that match `pattern`.

    Returns the folder and the files' names in it. Without a connection it is the copy in the
    cache. Raises `HubError`, and `DataError` for a data set without such files.
    """
    try:
        listing = _list(name)
    except NoConnectionError:
        kept = _in_cache(name, pattern)
        if kept is None:
            raise
        return kept
    names = _choose(name, listing.siblings, pattern)
    _check_room(listing, names)
    try:
        paths = [
            Path(hf_hub_download(name, file, repo_type="dataset", revision=listing.commit))
            for file in names
        ]
    except FAILURES as error:
        raise explain(error, f"datasets/{name}") from None
    return paths[0].parents[names[0].count("/")], names


def _list(name: str) -> Listing:
    api = HfApi(library_name="localds", library_version=__version__)
    try:
        info = api.dataset_info(name, files_metadata=True, timeout=_TIMEOUT)
    except GatedRepoError as error:
        raise explain(error, f"datasets/{name}") from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{name}: no such file here, and no such data set on {constants.ENDPOINT}; check the "
            "spelling, and for a private one log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except FAILURES as error:
        raise explain(error, f"datasets/{name}") from None
    files = {sibling.rfilename: sibling for sibling in info.siblings or []}
    return Listing(name, constants.DEFAULT_REVISION, info.sha or "", files)


def _choose(name: str, files: Iterable[str], pattern: str | None) -> list[str]:
    matched = sorted(file for file in files if pattern is None or fnmatchcase(file, pattern))
    chosen = [
        file
        for file in matched
        if file.lower().endswith(_SUFFIXES) and file.rpartition("/")[2] not in _NOT_DATA
    ]
    if chosen:
        return chosen
    if not matched and pattern:
        raise DataError(f"{name}: no file matches {pattern!r}; it has {', '.join(files) or 'none'}")
    if any(file.endswith(".parquet") for file in matched):
        raise DataError(
            f"{name}: it has Parquet files only, and JSON Lines are read. Write it as such first: "
            f"python -c \"import datasets; datasets.load_dataset('{name}', split='train')"
            ".to_json('train.jsonl')\""
        )
    raise DataError(f"{name}: it has no .jsonl or .json file, only {', '.join(matched[:5])}")


def _check_room(listing: Listing, names: Iterable[str]) -> None:
    missing = [
        name
        for name in names
        if not isinstance(
            try_to_load_from_cache(
                listing.repository, name, revision=listing.commit, repo_type="dataset"
            ),
            str,
        )
    ]
    needed = sum(listing.siblings[name].size or 0 for name in missing)
    short = cache.shortage(needed)
    if short:
        raise HubError(f"{listing.repository}: {short}")


def _in_cache(name: str, pattern: str | None) -> tuple[Path, list[str]] | None:
    """The newest copy, as far as it was downloaded."""
    folder = cache.cache_root() / f"datasets--{name.replace('/', '--')}"
    for snapshot in cache.snapshots(folder)[:1]:
        there = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]
        return snapshot, _choose(name, there, pattern)
    return None
