"""One file from the hub: begun or gone on with, checked to the last byte, and only then whole."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from huggingface_hub import constants
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from localds import __version__
from localds.hub.errors import HubError, describe
from localds.hub.patience import pause

if TYPE_CHECKING:
    from collections.abc import Mapping
    from hashlib import _Hash as Hash
    from pathlib import Path
    from types import TracebackType
    from typing import BinaryIO, Self

    from localds.hub.listing import RemoteFile

_BLOCK = 1 << 20  # bytes
_REMEDY = "run the same command again, and check a proxy or the mirror in HF_ENDPOINT"


class Watch:
    """Is told how a download goes on. This one does not care."""

    def begin(self, total: int, done: int) -> None:
        """There are `total` bytes, of which `done` are here."""

    def advance(self, size: int) -> None:
        """`size` bytes more have come; negative where some must come again."""

    def check(self, name: str, size: int) -> None:
        """`size` bytes of the file `name`, which are here, are going to be checked."""

    def checked(self, size: int) -> None:
        """`size` bytes more are checked."""

    def note(self, line: str) -> None:
        """Something that a person may want to know."""


class Part:
    """The beginning of a file on disk, and the hash of it.

    What an earlier run left is read first; more than the whole file cannot be its beginning, and
    is dropped. Whoever opens it holds the lock of the blob.
    """

    def __init__(self, path: Path, wanted: RemoteFile, watch: Watch) -> None:
        self._path, self._wanted = path, wanted
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("a+b")
        try:
            self._read_hash(watch)
        except BaseException:
            self._file.close()
            raise

    def _read_hash(self, watch: Watch) -> None:
        self.size = 0
        self._hash = self._wanted.hasher()
        size = os.fstat(self._file.fileno()).st_size
        if size > self._wanted.size:
            self.clear()
        elif size:
            watch.check(self._wanted.name, size)
            _feed(self._file, self._hash, watch)
            self.size = size

    def write(self, data: bytes) -> None:
        """Add to the end."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def clear(self) -> None:
        """Start over."""
        self._file.truncate(0)
        self._hash = self._wanted.hasher()
        self.size = 0

    def finish(self, blob: Path) -> None:
        """Make it the file `blob` if it is what the hub stated; otherwise raise `HubError`."""
        if self._hash.hexdigest() != self._wanted.digest:
            self._path.unlink()
            raise HubError(
                f"{self._wanted.name}: what was downloaded does not have the hash that the hub "
                "states, and was removed; run the same command again, and if it happens again "
                "report it to whoever runs the hub, a proxy or the mirror in HF_ENDPOINT"
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        self._path.replace(blob)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if self.size == 0:
            self._path.unlink(missing_ok=True)


def is_whole(path: Path, wanted: RemoteFile, watch: Watch) -> bool:
    """Whether the file `path` is what the hub states, to the last byte."""
    watch.check(wanted.name, wanted.size)
    state = wanted.hasher()
    with path.open("rb") as file:
        _feed(file, state, watch)
    return state.hexdigest() == wanted.digest


def download(url: str, wanted: RemoteFile, part: Part, watch: Watch) -> None:
    """Fetch what `part` lacks, again and again as long as more comes each time.

    Raises the hub library's errors, and `HubError` for answers that cannot be right.
    """
    failures, furthest = 0, part.size
    while part.size < wanted.size:
        problem: Exception | None = None
        try:
            _stream(url, wanted, part, watch)
        except HTTPError as error:
            problem = error
        if part.size == wanted.size:
            return
        failures = 1 if part.size > furthest else failures + 1
        furthest = max(part.size, furthest)
        wait = pause(problem, failures)
        if wait is None:
            raise problem or _ends_early(wanted, furthest)
        watch.note(f"{wanted.name}: {_why(problem)}; trying again in {wait:.0f} s")
        time.sleep(wait)


def _stream(url: str, wanted: RemoteFile, part: Part, watch: Watch) -> None:
    """Add to `part` what one answer brings."""
    headers = build_hf_headers(library_name="localds", library_version=__version__)
    headers["Accept-Encoding"] = "identity"
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        status, stated = response.status_code, response.headers.get("Content-Range", "")
        if status != 416:
            hf_raise_for_status(response)
        total = _total(response.headers, status)
        if total not in (None, wanted.size):
            raise HubError(
                f"{wanted.name}: it has {total} bytes, but the hub states {wanted.size}; {_REMEDY}"
            )
        goes_on = status == 206 and stated.startswith(f"bytes {part.size}-")
        if part.size and not goes_on:
            # The range was ignored: what is here would come again.
            watch.advance(-part.size)
            part.clear()
        if status != 200 and not goes_on:
            return
        for data in response.iter_bytes():
            if part.size + len(data) > wanted.size:
                watch.advance(-part.size)
                part.clear()
                raise HubError(
                    f"{wanted.name}: more comes than the {wanted.size} bytes that the hub states; "
                    f"{_REMEDY}"
                )
            part.write(data)
            watch.advance(len(data))


def _feed(file: BinaryIO, state: Hash, watch: Watch) -> None:
    """Hash all of `file`."""
    file.seek(0)
    while data := file.read(_BLOCK):
        state.update(data)
        watch.checked(len(data))


def _total(headers: Mapping[str, str], status: int) -> int | None:
    """Bytes of the whole file that an answer is about, None where it does not say."""
    if status == 200 and "Content-Encoding" not in headers:
        total = headers.get("Content-Length", "")
    else:
        total = headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdecimal() else None


def _ends_early(wanted: RemoteFile, size: int) -> HubError:
    return HubError(f"{wanted.name}: only {size} of {wanted.size} bytes came; {_REMEDY}")


def _why(problem: Exception | None) -> str:
    return describe(problem) if problem else "the connection broke off"
