"""A model hub on this machine: as much of its HTTP interface as downloads use."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from huggingface_hub import constants

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Serves `files` of one `repository` at `url` while it is entered.

    `denial` is the (status, error code) that all requests get, where set, `file_denial` those for
    files; `busy` are statuses with headers that the next requests get, one each. The connection
    closes after the bytes in `cut`, one entry for each time that a file is asked for. `changed` are
    contents served in place of those that are stated, `hold` the bytes after which a file is held
    back until `go` is set. `requests` logs method, path and the range asked for, `tokens` the
    credentials, `sent` the bytes of each file. With `cdn`, files are at another address, which
    notes its credentials in `cdn_tokens`.
    """

    repository: str
    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main", COMMIT)
    denial: tuple[int, str] | None = None
    cut: dict[str, list[int]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    commit: str = COMMIT
    file_denial: tuple[int, str] | None = None
    busy: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    changed: dict[str, bytes] = field(default_factory=dict)
    ignore_range: bool = False
    without_length: bool = False
    hold: dict[str, int] = field(default_factory=dict)
    go: threading.Event = field(default_factory=threading.Event)
    sent: dict[str, int] = field(default_factory=dict)
    cdn: bool = False
    cdn_tokens: set[str | None] = field(default_factory=set)
    without_hashes: bool = False

    def __enter__(self) -> Self:
        hub = self

        class Handler(_Handler):
            served = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.go.set()
        self._server.shutdown()
        self._server.server_close()

    def downloaded(self) -> list[str]:
        """The files that were asked for, once each, in the order of their names."""
        marker = f"/resolve/{self.commit}/"
        return sorted(
            {p.split(marker)[1] for m, p, _ in self.requests if m == "GET" and marker in p}
        )


def go_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does at the start of a program."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)


def closed_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: FakeHub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        hub, path = self.served, urlsplit(self.path).path
        if path.startswith("/cdn/"):
            hub.cdn_tokens.add(self.headers.get("Authorization"))
            self._send_file(hub.commit, path.removeprefix("/cdn/"), body)
            return
        if path == "/api/agent-harnesses":  # which the library asks on its own account
            self._refuse(404, "NotFound")
            return
        hub.requests.append((self.command, path, self.headers.get("Range")))
        hub.tokens.add(self.headers.get("Authorization"))
        api, files = f"/api/models/{hub.repository}", f"/{hub.repository}/resolve/"
        if hub.busy:
            status, headers = hub.busy.pop(0)
            self._refuse(status, "Busy", headers)
        elif hub.denial is not None:
            self._refuse(*hub.denial)
        elif path == api or path.startswith(api + "/revision/"):
            revision = path.removeprefix(api).removeprefix("/revision/") or "main"
            self._describe(revision, body)
        elif path.startswith(api + "/tree/"):
            self._list(body)
        elif path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            if hub.file_denial is not None:
                self._refuse(*hub.file_denial)
            elif hub.cdn and body:
                self._redirect(name)
            else:
                self._send_file(revision, name, body)
        else:
            self._refuse(404, "RepoNotFound")

    def _describe(self, revision: str, body: bool) -> None:
        hub = self.served
        if revision not in hub.revisions:
            self._refuse(404, "RevisionNotFound")
            return
        blobs = "blobs" in parse_qs(urlsplit(self.path).query) and not hub.without_hashes
        siblings = [
            {"rfilename": name, "size": len(data)} | (_hashes(name, data) if blobs else {})
            for name, data in hub.files.items()
        ]
        info = {"id": hub.repository, "modelId": hub.repository, "sha": hub.commit}
        self._send_json({**info, "siblings": siblings, "tags": [], "private": False}, body)

    def _list(self, body: bool) -> None:
        tree = [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
            for name, data in self.served.files.items()
        ]
        self._send_json(tree, body)

    def _send_json(self, value: Any, body: bool) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _send_file(self, revision: str, name: str, body: bool) -> None:
        hub = self.served
        if revision not in hub.revisions or name not in hub.files:
            self._refuse(404, "EntryNotFound")
            return
        data = hub.changed.get(name, hub.files[name])
        asked = None if hub.ignore_range else self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked and body else 0
        if start and start >= len(data):
            self._refuse(416, "Range", {"Content-Range": f"bytes */{len(data)}"})
            return
        self.send_response(206 if start else 200)
        if not hub.without_length:
            self.send_header("Content-Length", str(len(data) - start))
        if start and not hub.without_length:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if _is_large(name):
            self.send_header("X-Linked-Etag", f'"{sha256(hub.files[name])}"')
            self.send_header("X-Linked-Size", str(len(hub.files[name])))
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("X-Repo-Commit", hub.commit)
        if hub.without_length:
            self.send_header("Connection", "close")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body:
            cuts = hub.cut.get(name)
            stop = cuts.pop(0) if cuts else len(data)
            with suppress(ConnectionError):
                self._send_body(name, data, start, stop)
            self.close_connection = hub.without_length or stop < len(data)

    def _send_body(self, name: str, data: bytes, start: int, stop: int) -> None:
        hub = self.served
        hold = hub.hold.get(name, stop)
        for first, last in ((start, min(hold, stop)), (max(start, hold), stop)):
            if first >= last:
                continue
            if first >= hold:
                hub.go.wait(60)
            self.wfile.write(data[first:last])
            hub.sent[name] = hub.sent.get(name, 0) + last - first

    def _redirect(self, name: str) -> None:
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/cdn/{name}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


def sha256(data: bytes) -> str:
    """What names the blob of a large file."""
    return hashlib.sha256(data).hexdigest()


def _hashes(name: str, data: bytes) -> dict[str, Any]:
    hashes: dict[str, Any] = {"blobId": _etag(data)}
    if _is_large(name):
        hashes["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
    return hashes


def _is_large(name: str) -> bool:
    return name.endswith((".gguf", ".safetensors", ".bin"))


def _etag(data: bytes) -> str:
    """Git's hash of a file."""
    content = b"blob %d\0" % len(data) + data
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
