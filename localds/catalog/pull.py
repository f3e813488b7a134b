"""Downloading models from a hub: what is to be fetched, and fetching it.

Files land in the hub library's cache in its layout, where other programs find them. The library
itself begins a file anew in every run; here the part that came stays, and a later run goes on.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from filelock import Timeout
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from localds.hub import cache as hub_cache
from localds.hub.errors import FAILURES, HubError, explain
from localds.hub.listing import list_repository
from localds.hub.transfer import Part, Watch, download, is_whole
from localds.hub.verified import is_verified, set_verified

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from localds.catalog.names import Reference
    from localds.hub.listing import Listing, RemoteFile

_BRIEFLY = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class Piece:
    """A file of a model, and how many of its bytes are here."""

    file: RemoteFile
    have: int

    @property
    def missing(self) -> int:
        """Bytes still to be downloaded."""
        return self.file.size - self.have


@dataclass(frozen=True, slots=True)
class Pull:
    """The download of one variant of a model. `pieces` are its files in order."""

    listing: Listing
    quant: str
    pieces: tuple[Piece, ...]

    @property
    def folder(self) -> Path:
        """Where the files are going to be."""
        repository = hub_cache.repository_folder(self.listing.repository)
        return repository / "snapshots" / self.listing.commit

    @property
    def path(self) -> Path:
        """The (first) file of the model."""
        return self.folder / self.pieces[0].file.name

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(piece.file.size for piece in self.pieces)

    @property
    def missing(self) -> int:
        """Bytes still to be downloaded."""
        return sum(piece.missing for piece in self.pieces)


def plan(reference: Reference) -> Pull:
    """Ask the hub what belongs to the model, and look what is here.

    Raises `HubError` if it cannot be asked, or has no such model, `VariantError` or
    `UnknownModelError` where the repository does not have what was named.
    """
    listing = list_repository(reference.repository)
    variant = reference.choose(listing.siblings)
    files = [listing.file(name) for name in variant.files]
    return Pull(listing, variant.quant, tuple(Piece(file, _have(listing, file)) for file in files))


def fetch(pull: Pull, watch: Watch | None = None) -> Path:
    """Download what is missing; returns the (first) file.

    A file is in its place only when its size and hash are right. Raises `HubError`; what came
    until then stays for the next time.
    """
    watch = watch or Watch()
    repository = pull.listing.repository
    short = hub_cache.shortage(pull.missing)
    if short:
        raise HubError(f"{repository}: {short}")
    watch.begin(pull.size, pull.size - pull.missing)
    try:
        # The library takes a repository without a snapshot for broken.
        pull.folder.mkdir(parents=True, exist_ok=True)
        for piece in pull.pieces:
            _fetch_piece(pull, piece, watch)
        folder = hub_cache.repository_folder(repository)
        hub_cache.write_ref(folder, pull.listing.revision, pull.listing.commit)
    except FAILURES as error:
        raise explain(error, repository, pull.listing.revision) from None
    return pull.path


def _fetch_piece(pull: Pull, piece: Piece, watch: Watch) -> None:
    file, repository = piece.file, pull.listing.repository
    blob, pointer = _blob(repository, file), pull.folder / file.name
    with _locked(repository, file, watch):
        present = _present(pull.listing, file)
        if present and not _is_right(present, file, watch):
            present = None
        if present:
            watch.advance(piece.missing)
        else:
            url = hf_hub_url(repository, file.name, revision=pull.listing.commit)
            with Part(_part(repository, file), file, watch) as part:
                watch.advance(part.size - piece.have)
                download(url, file, part, watch)
                part.finish(blob)
            set_verified(blob, file.digest)
        if present != pointer:
            hub_cache.link(blob, pointer)


@contextmanager
def _locked(repository: str, file: RemoteFile, watch: Watch) -> Iterator[None]:
    """Keep other programs from writing the same blob; wait for those that do."""
    lock = hub_cache.lock_file(repository, file.digest)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(lock, timeout=_BRIEFLY))
        except Timeout:
            watch.note(f"{file.name}: another program is downloading it; waiting")
            stack.enter_context(WeakFileLock(lock))
        yield


def _have(listing: Listing, file: RemoteFile) -> int:
    """How many bytes of a file are here, whole or in part."""
    if _present(listing, file):
        return file.size
    part = _part(listing.repository, file)
    size = part.stat().st_size if part.is_file() else 0
    return size if size <= file.size else 0


def _present(listing: Listing, file: RemoteFile) -> Path | None:
    """The file as the cache has it; without links, that is the snapshot's own."""
    folder = hub_cache.repository_folder(listing.repository)
    for path in (folder / "blobs" / file.digest, folder / "snapshots" / listing.commit / file.name):
        if path.is_file() and path.stat().st_size == file.size:
            return path
    return None


def _is_right(path: Path, file: RemoteFile, watch: Watch) -> bool:
    """Check a file that this or another program put into the cache, once."""
    if is_verified(path, file.digest):
        return True
    if is_whole(path, file, watch):
        set_verified(path, file.digest)
        return True
    watch.note(f"{file.name}: the copy in the cache is broken; downloading it again")
    return False


def _blob(repository: str, file: RemoteFile) -> Path:
    return hub_cache.repository_folder(repository) / "blobs" / file.digest


def _part(repository: str, file: RemoteFile) -> Path:
    blob = _blob(repository, file)
    return blob.with_name(blob.name + hub_cache.PART_SUFFIX)
