"""What a repository on the hub holds: its files, their sizes and the hashes they must have."""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from localds import __version__
from localds.hub.errors import FAILURES, HubError, explain
from localds.hub.patience import pause

if TYPE_CHECKING:
    from hashlib import _Hash

_TIMEOUT = 30.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository: its name, bytes, and the hash that also names its blob.

    `digest` is the SHA-256 of a large file (`lfs`), and git's SHA-1 of a small one.
    """

    name: str
    size: int
    digest: str
    lfs: bool

    def hasher(self) -> _Hash:
        """A hash that ends in `digest` when it has seen the whole file."""
        if self.lfs:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit, and its files by name."""

    repository: str
    revision: str
    commit: str
    siblings: dict[str, Any]

    def file(self, name: str) -> RemoteFile:
        """The file `name`. Raises `HubError` where the hub does not say what it must be."""
        sibling = self.siblings[name]
        lfs = sibling.lfs
        size, digest = (lfs.size, lfs.sha256) if lfs else (sibling.size, sibling.blob_id)
        if size is None or not re.fullmatch("[0-9a-f]{64}" if lfs else "[0-9a-f]{40}", str(digest)):
            raise HubError(
                f"{self.repository}: {constants.ENDPOINT} does not state the size and hash of "
                f"{name}; use another HF_ENDPOINT, or unset it"
            )
        return RemoteFile(name, size, digest, lfs is not None)


def list_repository(repository: str, revision: str | None = None) -> Listing:
    """Ask the hub about the model `repository`, at a branch, tag or commit. Raises `HubError`."""
    try:
        info = _patiently_ask(repository, revision)
    except FAILURES as error:
        raise explain(error, repository, revision) from None
    if not _COMMIT.fullmatch(info.sha or ""):
        raise HubError(
            f"{repository}: {constants.ENDPOINT} names no commit; use another HF_ENDPOINT"
        )
    siblings = {s.rfilename: s for s in info.siblings or [] if _is_safe(s.rfilename)}
    return Listing(repository, revision or constants.DEFAULT_REVISION, info.sha, siblings)


def _patiently_ask(repository: str, revision: str | None) -> Any:
    api = HfApi(library_name="localds", library_version=__version__)
    failures = 0
    while True:
        try:
            return api.model_info(
                repository, revision=revision, files_metadata=True, timeout=_TIMEOUT
            )
        except HfHubHTTPError as error:
            failures += 1
            wait = pause(error, failures)
            if wait is None:
                raise
        time.sleep(wait)


def _is_safe(name: str) -> bool:
    """Whether a file name stays in the folder that it is put into."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name
