"""Downloading models: what is fetched, what survives an interruption, and what is refused."""

from __future__ import annotations

import errno
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_hub import COMMIT, closed_port, go_to, sha256
from hub_home import FILES, PARTS, REPOSITORY, SMALL, blobs, install
from huggingface_hub import hf_hub_download, scan_cache_dir, try_to_load_from_cache

from localds.catalog import pull as hub
from localds.catalog.names import parse
from localds.catalog.variants import VariantError
from localds.hub.errors import HubError, NoConnectionError
from localds.hub.transfer import Part, Watch

if TYPE_CHECKING:
    from fake_hub import FakeHub

pytestmark = pytest.mark.usefixtures("home", "impatient")
DATA = FILES[SMALL]


class Log(Watch):
    """What a watch was told."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.checks: list[tuple[str, int]] = []
        self.notes: list[str] = []

    def begin(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def advance(self, size: int) -> None:
        self.done += size

    def check(self, name: str, size: int) -> None:
        self.checks.append((name, size))

    def note(self, line: str) -> None:
        self.notes.append(line)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, which take no time."""
    waits: list[float] = []
    monkeypatch.setattr("localds.hub.transfer.time.sleep", waits.append)
    return waits


def pull(name: str = "tiny") -> tuple[Path, Log]:
    log = Log()
    path = hub.fetch(hub.plan(parse(name)), log)
    assert log.done == log.total
    return path, log


def part_file(home: Path, name: str = SMALL) -> Path:
    folder = home / "hf/hub/models--owner--Tiny-Chat-GGUF/blobs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{sha256(FILES[name])}.localds-part"


def ranges(model_hub: FakeHub, name: str = SMALL) -> list[str | None]:
    """What was asked of a file."""
    return [asked for kind, path, asked in model_hub.requests if path.endswith(name)]


def test_lands_in_the_cache_of_the_library(model_hub: FakeHub, home: Path) -> None:
    path, _ = pull()
    assert path.read_bytes() == DATA
    assert path == home / f"hf/hub/models--owner--Tiny-Chat-GGUF/snapshots/{COMMIT}/{SMALL}"
    assert path.resolve() == blobs(home)[0]
    assert model_hub.downloaded() == [SMALL]
    assert try_to_load_from_cache(REPOSITORY, SMALL, cache_dir=home / "hf/hub") == str(path)
    found = hf_hub_download(REPOSITORY, SMALL, local_files_only=True, cache_dir=home / "hf/hub")
    assert found == str(path)
    cache = scan_cache_dir(home / "hf/hub")
    assert not cache.warnings
    (repo,) = cache.repos
    (revision,) = repo.revisions
    assert (repo.repo_id, repo.size_on_disk, revision.refs) == (REPOSITORY, len(DATA), {"main"})


def test_the_library_takes_what_was_pulled(model_hub: FakeHub, home: Path) -> None:
    path, _ = pull()
    model_hub.requests.clear()
    assert hf_hub_download(REPOSITORY, SMALL, cache_dir=home / "hf/hub") == str(path)
    assert not [kind for kind, name, _ in model_hub.requests if kind == "GET" and SMALL in name]


def test_only_the_parts_that_are_needed(model_hub: FakeHub) -> None:
    path, _ = pull("tiny:q8_0")
    assert model_hub.downloaded() == list(PARTS)
    for name in PARTS:
        assert (path.parent.parent / name).read_bytes() == FILES[name]
    assert path.name == Path(PARTS[0]).name


def test_any_repository(model_hub: FakeHub) -> None:
    assert pull(REPOSITORY)[0].name == SMALL
    assert pull(f"{REPOSITORY}:q2_k")[0].read_bytes() == FILES["Tiny-Chat-Q2_K.gguf"]
    with pytest.raises(VariantError, match=r"no 'Q6_K'; .* Q8_0, Q2_K, Q4_K_M"):
        pull(f"{REPOSITORY}:Q6_K")
    model_hub.files = {"README.md": b""}
    with pytest.raises(VariantError, match="there is no GGUF file"):
        pull(REPOSITORY)


def test_twice_is_once(model_hub: FakeHub) -> None:
    pull()
    model_hub.requests.clear()
    _, log = pull()
    assert model_hub.downloaded() == []
    assert log.checks == []


def test_small_files_have_the_hash_of_git(model_hub: FakeHub) -> None:
    """A GGUF file of a few bytes may be in git itself."""
    from localds.hub.listing import list_repository

    listing = list_repository(REPOSITORY)
    readme = listing.file("README.md")
    plan = hub.Pull(listing, "", (hub.Piece(readme, 0),))
    path = hub.fetch(plan)
    assert path.read_bytes() == b"# Tiny"
    assert path.resolve().name == readme.digest
    model_hub.changed["README.md"] = b"# tiny"
    path.resolve().unlink()
    with pytest.raises(HubError, match=r"^README.md: .* does not have the hash"):
        hub.fetch(plan)


@pytest.mark.parametrize("start", [1, 1_500_000, len(DATA)])
def test_goes_on_where_it_stopped(model_hub: FakeHub, home: Path, start: int) -> None:
    part_file(home).write_bytes(DATA[:start])
    plan = hub.plan(parse("tiny"))
    assert (plan.size, plan.missing) == (len(DATA), len(DATA) - start)
    path, log = pull()
    assert path.read_bytes() == DATA
    assert ranges(model_hub) == ([f"bytes={start}-"] if start < len(DATA) else [])
    assert log.checks == [(SMALL, start)]
    assert [blob.name for blob in blobs(home)] == [sha256(DATA)]


def test_a_part_that_is_too_long_is_dropped(model_hub: FakeHub, home: Path) -> None:
    part_file(home).write_bytes(DATA + b"x")
    assert pull()[0].read_bytes() == DATA
    assert ranges(model_hub) == [None]


@pytest.mark.parametrize("name", [SMALL, PARTS[1]])
def test_a_wrong_part_is_found_out(model_hub: FakeHub, home: Path, name: str) -> None:
    part_file(home, name).write_bytes(b"x" * 1000)
    with pytest.raises(HubError, match=f"^{name}: .* does not have the hash .* was removed"):
        pull("tiny" if name == SMALL else "tiny:Q8_0")
    assert not part_file(home, name).exists()
    assert sha256(FILES[name]) not in {blob.name for blob in blobs(home)}
    pull("tiny" if name == SMALL else "tiny:Q8_0")
    assert ranges(model_hub, name) == ["bytes=1000-", None]


def test_a_server_that_ignores_ranges(model_hub: FakeHub, home: Path) -> None:
    part_file(home).write_bytes(b"x" * 1000)
    model_hub.ignore_range = True
    assert pull()[0].read_bytes() == DATA
    assert ranges(model_hub) == ["bytes=1000-"]


def test_a_broken_connection_goes_on(model_hub: FakeHub, impatient: list[float]) -> None:
    model_hub.cut = {SMALL: [700_000, 700_001, 2_000_000, 2_000_000]}
    path, log = pull()
    assert path.read_bytes() == DATA
    asked = ranges(model_hub)
    assert asked[0] is None
    starts = [int(str(word).removeprefix("bytes=").removesuffix("-")) for word in asked[1:]]
    assert starts == sorted(starts)
    assert 0 < starts[0] <= 700_000
    assert starts[-1] <= 2_000_000
    assert len(log.notes) == 4
    assert max(impatient) <= 2


def test_a_connection_that_breaks_for_good(
    model_hub: FakeHub, home: Path, impatient: list[float]
) -> None:
    model_hub.cut = {SMALL: [100_000] + [0] * 50}
    with pytest.raises(NoConnectionError, match=r"cannot reach .* run the same command again"):
        pull()
    assert impatient == [1, 2, 4, 8]
    assert 0 < part_file(home).stat().st_size <= 100_000
    model_hub.cut = {}
    assert pull()[0].read_bytes() == DATA


@pytest.mark.parametrize("before", [0, 5, 2_999_998])
@pytest.mark.parametrize(
    ("served", "message"),
    [
        (DATA[:-1] + b"?", "does not have the hash"),
        (DATA + b"more", "it has 3000004 bytes, but the hub states 3000000"),
        (DATA[:-5], "it has 2999995 bytes"),
        (b"<html>", "it has 6 bytes"),
    ],
)
def test_other_content_than_stated(
    model_hub: FakeHub, home: Path, served: bytes, message: str, before: int
) -> None:
    if before:
        part_file(home).write_bytes(DATA[:before])
    model_hub.changed = {SMALL: served}
    with pytest.raises(HubError, match=f"^{SMALL}: .*{message}"):
        pull()
    assert not [blob for blob in blobs(home) if blob != part_file(home)]
    assert len(ranges(model_hub)) == 1
    model_hub.changed = {}
    assert pull()[0].read_bytes() == DATA


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (DATA[:-1] + b"?", "does not have the hash"),
        (DATA + b"more", "more comes than the 3000000 bytes"),
        (DATA[:-5], "only 2999995 of 3000000 bytes came"),
    ],
)
def test_other_content_of_unknown_size(model_hub: FakeHub, served: bytes, message: str) -> None:
    model_hub.changed = {SMALL: served}
    model_hub.without_length = model_hub.ignore_range = True
    with pytest.raises(HubError, match=f"^{SMALL}: .*{message}"):
        pull()
    model_hub.changed = {}
    assert pull()[0].read_bytes() == DATA


def test_a_new_commit_with_the_same_file(model_hub: FakeHub, home: Path) -> None:
    first, _ = pull()
    model_hub.commit = "f" * 40
    model_hub.revisions = ("main", "f" * 40)
    model_hub.requests.clear()
    second, _ = pull()
    assert model_hub.downloaded() == []
    assert first.resolve() == second.resolve()
    assert second.parent.name == "f" * 40
    assert not scan_cache_dir(home / "hf/hub").warnings


def test_what_another_tool_pulled_is_checked_once(model_hub: FakeHub, home: Path) -> None:
    install(home, REPOSITORY, {SMALL: DATA}, COMMIT)
    _, log = pull()
    assert log.checks == [(SMALL, len(DATA))]
    assert pull()[1].checks == []
    assert model_hub.downloaded() == []


def test_a_blob_without_a_link(model_hub: FakeHub, home: Path) -> None:
    path, _ = pull()
    path.unlink()
    assert pull()[0].read_bytes() == DATA
    assert model_hub.downloaded() == [SMALL]
    assert len(ranges(model_hub)) == 1
    assert len(blobs(home)) == 1


@pytest.mark.parametrize("damaged", [DATA[:-1] + b"?", DATA[:-1], b""])
def test_a_broken_blob_is_replaced(model_hub: FakeHub, home: Path, damaged: bytes) -> None:
    path, _ = pull()
    path.resolve().write_bytes(damaged)
    again, log = pull()
    assert again.read_bytes() == DATA
    assert len(log.notes) == (len(damaged) == len(DATA))
    assert len(ranges(model_hub)) == 2
    assert len(blobs(home)) == 1


def test_disks_without_links(
    model_hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    path, _ = pull()
    assert not path.is_symlink()
    assert path.read_bytes() == DATA
    assert blobs(home) == []
    assert pull()[0] == path
    assert len(ranges(model_hub)) == 1


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "no such model on http://127.*check the spelling"),
        (401, "RepoNotFound", "for a private model log in with `hf auth login` or set HF_TOKEN"),
        (401, "Other", "does not accept the token; log in with"),
        (403, "GatedRepo", "accept the terms on http://127.0.0.1:.*/owner/Tiny-Chat-GGUF, then"),
        (403, "Other", "forbids the download; use a token that may read it"),
        (404, "EntryNotFound", "a file is no longer in the repository"),
        (404, "RevisionNotFound", "no revision 'main'"),
        (429, "Other", "was asked too often; try again later, what is there is kept"),
        (500, "Other", "answered with status 500; try again later"),
        (418, "Other", "answered with status 418; try again later"),
    ],
)
def test_refusals_of_files(
    model_hub: FakeHub, home: Path, status: int, code: str, message: str
) -> None:
    model_hub.file_denial = (status, code)
    with pytest.raises(HubError, match=f"^{REPOSITORY}: .*{message}") as caught:
        pull()
    assert "\n" not in str(caught.value)
    assert blobs(home) == []


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (403, 1), (429, 5), (503, 5)])
def test_refusals_of_the_repository(model_hub: FakeHub, status: int, attempts: int) -> None:
    model_hub.denial = (status, "RepoNotFound" if status == 404 else "Other")
    with pytest.raises(HubError, match=f"^{REPOSITORY}: "):
        pull()
    assert len(model_hub.requests) == attempts


def test_a_busy_hub_is_asked_again(model_hub: FakeHub, impatient: list[float]) -> None:
    model_hub.busy = [(429, {"Retry-After": "7"}), (500, {}), (502, {}), (503, {})]
    assert pull()[0].read_bytes() == DATA
    assert impatient == [8, 2, 4, 8]


def test_a_busy_hub_for_a_file(model_hub: FakeHub, impatient: list[float], home: Path) -> None:
    plan = hub.plan(parse("tiny"))
    part_file(home).write_bytes(DATA[:1000])
    limit = {"RateLimit": '"resolvers";r=0;t=12', "RateLimit-Policy": '"w";"resolvers";q=9;w=300'}
    model_hub.busy = [(429, limit), (500, {})]
    log = Log()
    assert hub.fetch(plan, log).read_bytes() == DATA
    assert impatient == [13, 2]
    assert ranges(model_hub) == ["bytes=1000-"] * 3
    assert len(log.notes) == 2


@pytest.mark.parametrize(
    ("after", "said"), [("90", "in 90 s"), ("1000", "in 17 minutes"), ("soon", "later")]
)
def test_long_waits_are_left_to_the_person(
    model_hub: FakeHub, impatient: list[float], after: str, said: str
) -> None:
    model_hub.busy = [(429, {"Retry-After": after})] * 5
    with pytest.raises(HubError, match=f"asked too often; try again {said}, what is there"):
        pull()
    assert len(impatient) == (4 if after == "soon" else 0)


def test_retry_after_as_a_date(model_hub: FakeHub) -> None:
    from email.utils import formatdate

    model_hub.busy = [(429, {"Retry-After": formatdate(time.time() + 600, usegmt=True)})]
    with pytest.raises(HubError, match=r"try again in (10|9|11) minutes"):
        pull()


def test_no_connection(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home.exists()
    go_to(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    with pytest.raises(NoConnectionError, match=r"cannot reach http://127.*check the connection"):
        pull()


def test_a_mirror_without_hashes(model_hub: FakeHub) -> None:
    model_hub.without_hashes = True
    with pytest.raises(HubError, match="does not state the size and hash of"):
        pull()


def test_names_that_leave_the_folder(model_hub: FakeHub, home: Path) -> None:
    model_hub.files = {"../../evil-Q4_K_M.gguf": DATA, "/evil-Q4_K_M.gguf": DATA}
    with pytest.raises(VariantError, match="there is no GGUF file"):
        pull(REPOSITORY)
    assert not list(home.rglob("*evil*"))


def test_full_disk_is_foreseen(
    model_hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_000_000))
    with pytest.raises(HubError, match=r"^owner/.*: 0.0 GB are still to be downloaded, but .*room"):
        pull()
    assert model_hub.downloaded() == []
    part_file(home).write_bytes(DATA[:1_500_000])
    assert pull()[0].read_bytes() == DATA


def test_full_disk_in_the_middle(
    model_hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Part.write

    def full(self: Part, data: bytes) -> None:
        if self.size + len(data) > 1_000_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(Part, "write", full)
    with pytest.raises(
        HubError, match=r"no room is left in .*; free some and run the same command"
    ):
        pull()
    kept = part_file(home).stat().st_size
    assert kept > 900_000 - (1 << 20)
    monkeypatch.setattr(Part, "write", write)
    model_hub.requests.clear()
    pull()
    assert ranges(model_hub) == [f"bytes={kept}-"]


def test_a_cache_that_cannot_be_written(model_hub: FakeHub, home: Path) -> None:
    (home / "hf").mkdir()
    (home / "hf" / "hub").write_bytes(b"a file")
    with pytest.raises(HubError, match=r"hf/hub.*; make it writable, or set HF_HOME"):
        pull()
    assert model_hub.downloaded() == []


def test_tokens_go_to_the_hub_only(model_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    model_hub.cdn = True
    assert pull()[0].read_bytes() == DATA
    assert model_hub.tokens == {"Bearer hf_secret"}
    assert model_hub.cdn_tokens == {None}
